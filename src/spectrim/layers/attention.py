"""Factorized `torch.nn.MultiheadAttention`, with packed or separate input projections."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from spectrim.layers.base import FactorizedLayer, Share
from spectrim.layers.linear import FactorizedLinear, linear_of
from spectrim.layers.taking_over import become
from spectrim.layers.weights import SeveralWeights
from spectrim.linalg.fold import Fold
from spectrim.plain.attention import PlainAttention
from spectrim.plain.chain import PlainPair

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class FactorizedMultiheadAttention(SeveralWeights, nn.MultiheadAttention):
    """Attention whose input projections are composed for torch's own forward; the packed one is a single ``(3 embed, embed)`` matrix.

    The output projection is a layer of its own, ``out_proj``, and is factorized (or not) under that name.
    """

    dense_kinds = (nn.MultiheadAttention,)

    @classmethod
    def weights(cls, module: Any) -> tuple[str, ...]:
        """Return the packed projection, or the three separate ones."""
        return PROJECTIONS[:1] if module._qkv_same_embed_dim else PROJECTIONS[1:]

    @classmethod
    def work(cls, module: Any, name: str, scheme: Fold, rank: int | None, shape: Sequence[int] | None) -> float:
        """``out * in``, or ``rank * (out + in)``, for each position."""
        out = module.embed_dim * (3 if name == "in_proj_weight" else 1)
        in_ = {"k_proj_weight": module.kdim, "v_proj_weight": module.vdim}.get(name, module.embed_dim)
        rows = 1 if shape is None else math.prod(shape[:-1])
        return float(rows * (out * in_ if rank is None else rank * (out + in_)))

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Run torch's own forward, which reads its weights several times, on weights composed once."""
        layer: Any = self if torch.compiler.is_compiling() else self.composed()
        return nn.MultiheadAttention.forward(layer, *arguments, **options)

    def split(self, share: Share, paying: Collection[str]) -> nn.Module | None:
        """A `PlainAttention` in which every projection that pays is a pair of `Linear` layers."""
        return plain_attention(self, paying)


def plain_attention(attention: Any, paying: Collection[str]) -> nn.Module | None:
    """Return a `PlainAttention` for a torch or factorized attention where any of its projections pays, else None.

    Args:
        attention: left untouched.
        paying: names of the weights to write as two operations, ``out_proj.weight`` among them.
    """
    weights: dict[str, Any] = {}
    for name in FactorizedMultiheadAttention.weights(attention):
        if name in paying:
            weights[name] = attention.factors_of(name).balanced()
        else:
            weights[name] = getattr(attention, name).detach()
    out = attention.out_proj
    if "out_proj.weight" in paying:
        weights["out_proj.weight"] = out.factors_of("weight").balanced()
    else:
        weights["out_proj.weight"] = out.dense_weight("weight").detach() if isinstance(out, FactorizedLayer) else out.weight.detach()
    if not paying:
        return None
    biases = {"in_proj_bias": attention.in_proj_bias, "out_proj.bias": out.bias, "bias_k": attention.bias_k, "bias_v": attention.bias_v}
    weights |= {name: tensor.detach() for name, tensor in biases.items() if tensor is not None}
    plain = PlainAttention(
        attention.embed_dim,
        attention.num_heads,
        dropout=attention.dropout,
        bias=attention.in_proj_bias is not None,
        add_bias_kv=attention.bias_k is not None,
        add_zero_attn=attention.add_zero_attn,
        kdim=attention.kdim,
        vdim=attention.vdim,
        batch_first=attention.batch_first,
        weights=weights,
    )
    return plain.requires_grad_(any(parameter.requires_grad for parameter in attention.parameters()))


def become_attention(attention: Any, plain: Any) -> None:
    """Make an attention, dense or factorized, the plain one in place; its output projection stays the layer that it is, too."""
    out = attention.out_proj
    if isinstance(plain.out_proj, PlainPair):
        become(out, plain.out_proj, FactorizedLinear.base_of(type(out)))
    plain.out_proj = out
    become(attention, plain, FactorizedMultiheadAttention.base_of(type(attention)))


def observed_attention(attention: Any) -> nn.Module:
    """Return an attention, any part of it factorized, in which every factorized matrix is a layer of the same factors that is called."""
    held = dict(attention.named_factors()) if isinstance(attention, FactorizedLayer) else {}
    factorized_out = isinstance(attention.out_proj, FactorizedLayer)
    plain: Any = plain_attention(attention, [*held, *(["out_proj.weight"] if factorized_out else [])])
    if factorized_out:
        plain.out_proj = attention.out_proj
    for name, factors in held.items():
        part = name.removesuffix("_weight")
        setattr(plain, part, linear_of(factors, getattr(plain, part)[1].bias))
    return plain  # type: ignore[no-any-return]
