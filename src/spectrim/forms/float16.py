"""Factors that fit into float16, whose largest number is 65,504: singular values of weights that fit may be above it."""

import torch
from torch import Tensor


def evened(heavy: Tensor, light: Tensor, dtype: torch.dtype, across: tuple[int, ...] = (-2,)) -> tuple[Tensor, Tensor]:
    """Return two factors of a product between which sizes above one are shared, where operations run in float16; else as they are.

    The light factor takes about the root of each size, a power of two, which rounds nothing. Where neither the input nor the output of the
    product overflows, what is between them does not either: it is their geometric mean.

    Args:
        heavy: ``(..., rank)``, which holds the sizes.
        light: ``(..., rank)``.
        dtype: of the weight.
        across: axes of `heavy` along which all have one share.

    Examples:
        >>> evened(torch.tensor([[65536.0, 0.5]]), torch.tensor([[1.0, 1.0]]), torch.float16)
        (tensor([[256.0000,   0.5000]]), tensor([[256.,   1.]]))
    """
    kind = heavy.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    if not autocast and dtype != torch.float16:
        return heavy, light
    with torch.no_grad():
        share = torch.exp2(torch.log2(heavy.abs().amax(across, keepdim=True).clamp_min(1.0)).div(2).round())
    return heavy / share, light * share.reshape(share.shape[-light.dim() :])
