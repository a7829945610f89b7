"""`nn.TransformerEncoder` on exchanged layers: what it computes at padding stays what torch's fused kernel computes."""

from typing import Any

import torch
from torch import Tensor, nn

from .chain import PlainPair
from .exchanged import Exchanged, class_of


class PaddedEncoder(nn.TransformerEncoder):
    """An encoder whose layers do not run in the fused kernel, which reads dense weights.

    Where torch would hand padded sequences to that kernel as nested tensors, its output at padding is that of zeros behind the last layer.
    This one puts the same values there.
    """

    def forward(
        self, src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool | None = None
    ) -> Tensor:
        """Run the layers, then write at padding what torch's encoder of dense layers writes.

        Args:
            src: ``(batch, time, features)``, or as `nn.TransformerEncoder` takes it.
            mask: attention mask.
            src_key_padding_mask: ``(batch, time)``; True, or what is added to the scores, marks padding.
            is_causal: hint about `mask`.
        """
        output = super().forward(src, mask, src_key_padding_mask, is_causal)
        if mask is not None or src_key_padding_mask is None or not self._nests(src, src_key_padding_mask):
            return output
        zeros = torch.zeros_like(output)
        return torch.where(src_key_padding_mask.bool().unsqueeze(-1), zeros if self.norm is None else self.norm(zeros), output)

    def _nests(self, src: Tensor, padding: Tensor) -> bool:
        """Whether torch's encoder of dense layers would go by nested tensors."""
        first: Any = self.layers[0]
        checks = getattr(self, "mask_check", True)
        if not (torch.backends.mha.get_fastpath_enabled() and self.use_nested_tensor) or first.training or src.dim() != 3 or src.is_nested:
            return False
        if torch.is_autocast_enabled() or (checks and torch.compiler.is_compiling()):
            return False
        if torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in first.parameters())):
            return False
        return not checks or bool(torch._nested_tensor_from_mask_left_aligned(src, padding.bool().logical_not()))


def follow_layers(model: nn.Module) -> None:
    """Make every `nn.TransformerEncoder` with exchanged layers a `PaddedEncoder`, in place, and an ordinary one of all others."""
    for encoder in model.modules():
        if not isinstance(encoder, nn.TransformerEncoder):
            continue
        exchanged = any(isinstance(part, Exchanged | PlainPair) for layer in encoder.layers for part in layer.modules())
        if exchanged and not isinstance(encoder, PaddedEncoder):
            encoder.__class__ = class_of(PaddedEncoder, type(encoder), nn.TransformerEncoder)  # type: ignore[assignment]
        elif not exchanged and isinstance(encoder, PaddedEncoder) and isinstance(encoder, Exchanged):
            encoder.__class__ = type(encoder)._own
