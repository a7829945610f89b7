"""Factorized `torch.nn.MultiheadAttention`, with packed or separate input projections."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.layers.base import FactorizedLayer
from spectrim.layers.exchanged import Share
from spectrim.layers.linear import FactorizedLinear, linear_of
from spectrim.layers.recurrent import FactorizedRecurrent
from spectrim.layers.taking_over import become
from spectrim.layers.uses import Call, Features, Work, arguments_of_attention, call_on
from spectrim.layers.weights import SeveralWeights
from spectrim.linalg.fold import Fold
from spectrim.plain.attention import PlainAttention
from spectrim.plain.chain import PlainPair

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class FactorizedMultiheadAttention(SeveralWeights, nn.MultiheadAttention):
    """Attention whose input projections are composed for torch's own forward; the packed one is a single ``(3 embed, embed)`` matrix.

    The output projection is a separate layer, ``out_proj``, and is factorized (or not) under that name.
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

    def calls_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
        """Yield the uses of the input projections; that of the output projection, a layer of its own, is not among them."""
        given = arguments_of_attention(args, kwargs)
        query, key, value = given
        if not self._qkv_same_embed_dim:
            yield from (call_on(self, name, x) for x, name in zip(given, PROJECTIONS[1:], strict=True))
            return
        shape = tuple(query.shape) if query is key and key is value else None
        work = _packed_projection(self.embed_dim, query, key, value)
        yield Call(self, "in_proj_weight", shape, query.dtype, torch.contiguous_format, work)

    def features_read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Features]:
        """Each projection reads its input; the packed one where there is one input."""
        held, (query, key, value) = dict(self.named_factors()), arguments_of_attention(args, kwargs)
        if "in_proj_weight" in held and query is key and key is value:
            yield Features(held["in_proj_weight"], "columns", query, -1)
        named = zip((query, key, value), PROJECTIONS[1:], strict=True)
        yield from (Features(held[name], "columns", x, -1) for x, name in named if name in held)

    def timed_forms(self, name: str, rank: int) -> tuple[nn.Module, nn.Module]:
        """A projection is a linear layer."""
        factors = self.factors_of(name)
        out, in_ = factors.shape
        linear = nn.Linear(in_, out, bias=self.in_proj_bias is not None, device=factors.device, dtype=factors.dtype)
        return FactorizedLinear.adopt(linear, {"weight": factors}, "channel").timed_forms("weight", rank)

    def split(self, share: Share, paying: Collection[str]) -> nn.Module | None:
        """A `PlainAttention` in which every projection that pays is a pair of `Linear` layers."""
        return plain_attention(self, paying)


def _packed_projection(embed: int, query: Tensor, key: Tensor, value: Tensor) -> Work:
    """Query, key and value through one matrix; of two operations the first runs once for each distinct input."""
    every = sum(math.prod(x.shape[:-1]) for x in (query, key, value))
    distinct = every - (query is key) * math.prod(query.shape[:-1]) - (value is key) * math.prod(value.shape[:-1])
    return lambda rank: float(embed * (every * embed if rank is None else rank * (distinct + every)))


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
            held = isinstance(attention, FactorizedLayer) and name in attention.factors
            weights[name] = (attention.dense_weight(name) if held else getattr(attention, name)).detach()
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
    for name in held:
        factors = attention.factors_of(name)
        part = name.removesuffix("_weight")
        setattr(plain, part, linear_of(factors, getattr(plain, part)[1].bias))
    return plain  # type: ignore[no-any-return]


def merge_attention_(attention: nn.MultiheadAttention, paying: Mapping[nn.Module, Collection[str]], share: Share) -> None:
    """Make an attention, any part of it factorized, ordinary in place, with its output projection, which torch reads and does not call.

    Args:
        attention: torch's or factorized.
        paying: by layer, the names of the weights to write as two operations.
        share: makes the parameter for a tensor.
    """
    out, own = attention.out_proj, paying.get(attention, ())
    outer = paying.get(out, ())
    plain: Any = plain_attention(attention, [*own, *(f"out_proj.{weight}" for weight in outer)])
    pair = out.split(share, outer) if isinstance(out, FactorizedLayer) else None
    if isinstance(out, FactorizedLayer) and pair is None:
        out.release(share)
    if plain is not None:
        plain.out_proj = out if pair is None else pair
        become_attention(attention, plain)
    elif isinstance(attention, FactorizedLayer):
        attention.release(share)


def make_observable_(model: nn.Module) -> None:
    """Exchange, in place, recurrent layers and attention for layers in which every factorized matrix is a layer that is called."""
    for module in list(model.modules()):
        if isinstance(module, FactorizedRecurrent):
            become(module, module.observed().requires_grad_(False))
        elif isinstance(module, nn.MultiheadAttention) and (
            isinstance(module, FactorizedLayer) or isinstance(module.out_proj, FactorizedLayer)
        ):
            become_attention(module, observed_attention(module).requires_grad_(False))
