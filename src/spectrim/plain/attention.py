"""Plain multi-head attention with low-rank projections."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chain import PlainPair, refuse_dense
from .parts import Weight, _check_shapes, _projection, _shapes

PACKED, SEPARATE = ("in_proj_weight",), ("q_proj_weight", "k_proj_weight", "v_proj_weight")
"""What torch calls the weights of the input projections."""


class PlainAttention(nn.Module):
    """`nn.MultiheadAttention` with low-rank projections: same call, same results (nested tensors are not taken).

    It can be the ``self_attn`` or ``multihead_attn`` of torch's transformer layers, which then run their ordinary path.

    Args:
        embed_dim: features of the query and the output.
        num_heads: attention heads; a divisor of `embed_dim`.
        dropout: probability in [0, 1] of dropping an attention weight, while training.
        bias: whether `weights` holds biases of the projections.
        add_bias_kv: whether `weights` holds ``bias_k`` and ``bias_v``, a learned key and value added to each sequence.
        add_zero_attn: whether a zero key and value are added to each sequence.
        kdim: features of the key; None for `embed_dim`.
        vdim: features of the value; None for `embed_dim`.
        batch_first: tensors are ``(batch, time, features)``, not ``(time, batch, features)``.
        weights: tensors under the names that `nn.MultiheadAttention` gives them: ``in_proj_weight``, or ``q_proj_weight``,
            ``k_proj_weight`` and ``v_proj_weight``; ``out_proj.weight``, ``in_proj_bias``, ``out_proj.bias``, ``bias_k``, ``bias_v``; a
            matrix is a dense ``(out, in)`` tensor or a pair ``(out, rank), (rank, in)`` whose product it is.

    Raises:
        ValueError: a weight is missing, unknown or of the wrong shape; at a call, a mask is of the wrong shape.

    Examples:
        >>> weights = dict(nn.MultiheadAttention(8, 2).state_dict())
        >>> low = {"in_proj_weight": (torch.randn(24, 2), torch.randn(2, 8))}
        >>> attention = PlainAttention(8, 2, weights=weights | low)
        >>> x = torch.randn(5, 3, 8)
        >>> attention(x, x, x)[0].shape
        torch.Size([5, 3, 8])
    """

    settings: ClassVar[dict[str, Any]] = {"_qkv_same_embed_dim": False}  # torch's transformer layers read it before they choose a path
    _qkv_same_embed_dim = False
    __jit_unused_properties__ = (*PACKED, *SEPARATE, "in_proj_bias")

    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        weights: Mapping[str, Weight],
    ) -> None:
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"PlainAttention: num_heads must be a divisor of embed_dim={embed_dim}, got {num_heads}")
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.add_zero_attn = add_zero_attn
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first = batch_first
        self.packed = "in_proj_weight" in weights

        inputs = {"q_proj_weight": embed_dim, "k_proj_weight": self.kdim, "v_proj_weight": self.vdim}
        shapes: dict[str, tuple[int, ...]] = {"out_proj.weight": (embed_dim, embed_dim)}
        shapes |= {"in_proj_weight": (3 * embed_dim, embed_dim)} if self.packed else {name: (embed_dim, n) for name, n in inputs.items()}
        if bias:
            shapes |= {"in_proj_bias": (3 * embed_dim,), "out_proj.bias": (embed_dim,)}
        if add_bias_kv:
            shapes |= {"bias_k": (1, 1, embed_dim), "bias_v": (1, 1, embed_dim)}
        _check_shapes("PlainAttention", weights, shapes)
        self.given = _shapes(weights)
        given: dict[str, Any] = dict(weights)
        in_bias = given.get("in_proj_bias")
        if self.packed:
            self.in_proj = _projection(given["in_proj_weight"], in_bias)
        else:
            biases = (None, None, None) if in_bias is None else in_bias.chunk(3)
            self.q_proj, self.k_proj, self.v_proj = (_projection(given[name], b) for name, b in zip(inputs, biases, strict=True))
        self.out_proj = _projection(given["out_proj.weight"], given.get("out_proj.bias"))
        for name in ("bias_k", "bias_v"):
            self.register_parameter(name, nn.Parameter(given[name].detach().clone()) if name in given else None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: ``(target, batch, embed)``, ``(batch, target, embed)`` if `batch_first`, or ``(target, embed)``.
            key: the same with ``source`` and ``kdim``.
            value: the same with ``source`` and ``vdim``.
            key_padding_mask: ``(batch, source)``, ``(source,)`` when unbatched; True (or what is added to the scores) hides a key.
            need_weights: return the attention weights too; False is faster.
            attn_mask: ``(target, source)`` or ``(batch * heads, target, source)``; True (or what is added to the scores) hides a pair.
            average_attn_weights: return the mean over heads.
            is_causal: a hint that `attn_mask`, which must be given too, is the causal one.

        Returns:
            The outputs, laid out as `query`, and the attention weights or None: ``(batch, target, source)``, with ``heads`` after ``batch``
            if not averaged, without ``batch`` when unbatched.
        """
        if query.is_nested or query.dim() not in (2, 3):
            raise ValueError(f"PlainAttention: query must be an ordinary tensor of 2 or 3 dimensions, got {query.dim()}")
        if is_causal and attn_mask is None:
            raise ValueError("PlainAttention: is_causal is a hint about attn_mask; give the mask too")
        batched = query.dim() == 3
        if not batched:
            query, key, value = _same(lambda x: x.unsqueeze(0), query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = _same(lambda x: x.transpose(0, 1), query, key, value)
        is_causal = is_causal and key_padding_mask is None and not need_weights  # then the kernel makes the mask
        mask = None if is_causal else self._mask(query, key, key_padding_mask, attn_mask)

        q, k, v = self._project(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], 1)
        q, k, v = (x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))

        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        output: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not batched:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        return output, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Project ``(batch, time, features)``; a packed projection runs once for each distinct input.

        It is called for all three thirds of its outputs, unless it is nothing but an `nn.Linear`: adapters, hooks and quantized weights
        take effect.
        """
        if not self.packed:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if query is key and key is value:
            return self.in_proj(query).chunk(3, -1)  # type: ignore[no-any-return]
        last = self.in_proj
        if isinstance(last, PlainPair):
            query, key, value = _same(last[0], query, key, value)
            last = last[1]
        if _is_bare(last):  # then its thirds can run alone
            biases = (None, None, None) if last.bias is None else last.bias.chunk(3)
            return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), last.weight.chunk(3), biases, strict=True))
        projected = _same(last, query, key, value)
        return tuple(x.chunk(3, -1)[third] for third, x in enumerate(projected))

    def _mask(self, query: Tensor, key: Tensor, padding: Tensor | None, attn: Tensor | None) -> Tensor | None:
        """Return what is added to the scores ``(batch, heads, target, source)``, or None."""
        batch, target, source = query.shape[0], query.shape[1], key.shape[1]
        mask: Tensor | None = None
        if attn is not None:
            if tuple(attn.shape) not in ((target, source), (batch * self.num_heads, target, source)):
                allowed = f"{(target, source)} or {(batch * self.num_heads, target, source)}"
                raise ValueError(f"PlainAttention: attn_mask must be {allowed}, got {tuple(attn.shape)}")
            mask = _additive(attn, query.dtype)
            mask = mask if mask.dim() == 2 else mask.view(batch, self.num_heads, target, source)
        if padding is not None:
            if tuple(padding.shape) != (batch, source):
                raise ValueError(f"PlainAttention: key_padding_mask must be {(batch, source)}, got {tuple(padding.shape)}")
            hidden = _additive(padding, query.dtype)[:, None, None, :]
            mask = hidden if mask is None else mask + hidden
        return mask

    @classmethod
    def stands_for(cls, base: type) -> bool:
        """Whether it behaves as a layer of class `base` does."""
        return base is nn.MultiheadAttention

    @staticmethod
    def takes_over(layer: nn.Module) -> tuple[str, ...]:
        """Return the names of the parameters of a `nn.MultiheadAttention` that this one holds otherwise."""
        return (*PACKED, *SEPARATE, "in_proj_bias", "bias_k", "bias_v")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        refuse_dense((*PACKED, *SEPARATE, "in_proj_bias"), state_dict, prefix, rest[-1])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _get_name(self) -> str:
        return "PlainAttention"

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The packed weight ``(3 * embed, embed)``; None where there are three. A product of two is read only."""
        return self.in_proj.weight if self.packed else None

    @property
    def q_proj_weight(self) -> Tensor | None:
        """The weight of the queries ``(embed, embed)``; None where all are packed. Read only."""
        return None if self.packed else self.q_proj.weight

    @property
    def k_proj_weight(self) -> Tensor | None:
        """The weight of the keys ``(embed, kdim)``; None where all are packed. Read only."""
        return None if self.packed else self.k_proj.weight

    @property
    def v_proj_weight(self) -> Tensor | None:
        """The weight of the values ``(embed, vdim)``; None where all are packed. Read only."""
        return None if self.packed else self.v_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The packed bias ``(3 * embed,)``, or None."""
        each = [self.in_proj] if self.packed else [self.q_proj, self.k_proj, self.v_proj]
        biases: list[Any] = [layer.bias for layer in each]
        return None if biases[0] is None else biases[0] if self.packed else torch.cat(biases)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, batch_first={self.batch_first}"


def _is_bare(layer: Any) -> bool:
    """Whether calling a layer is nothing but `torch.nn.functional.linear` on an ordinary weight."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not (layer._forward_hooks or layer._forward_pre_hooks)


def _same(change: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Apply `change` to each, once where they are the same tensor."""
    new_key = change(key)
    return (new_key if query is key else change(query)), new_key, (new_key if value is key else change(value))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return mask if mask.is_floating_point() else torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
