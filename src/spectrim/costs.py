"""What a layer costs at each rank, in the network it stands in."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from spectrim.layers import FactorizedLayer, Factors, named_factors, named_layers
from spectrim.layers.base import OneWeight
from spectrim.layers.embedding import FactorizedEmbedding
from spectrim.linalg import pooled_spectrum, svd_of_product
from spectrim.measure import batch_size_of, call_model, evaluating

Work = Callable[[int | None], float]
"""Multiply-accumulates of one use of a weight at a rank, or dense for None."""


@dataclass(frozen=True)
class RankCosts:
    """The cost of one factorized weight at every rank, as `merge` will write it.

    Attributes:
        macs: entry ``r - 1`` is the multiply-accumulates for one example at rank ``r``; the dense cost where two operations do not pay.
        params: the same for stored parameters.
        dense_macs: of the dense weight.
        dense_params: of the dense weight.
    """

    macs: tuple[float, ...]
    params: tuple[int, ...]
    dense_macs: float
    dense_params: int


def rank_costs(model: nn.Module, inputs: Any) -> dict[str, RankCosts]:
    """Return what each factorized weight costs at each rank up to the one it has.

    Tied weights and layers that run more than once count every time they run; parameters count once.

    Args:
        model: factorized.
        inputs: one batch; costs are for one example of it.

    Returns:
        By the names of `named_factors`.

    Raises:
        SettingError: when the batch size cannot be read off `inputs`.
    """
    work = works(model, inputs)
    batch = batch_size_of(inputs)
    users: dict[int, list[tuple[FactorizedLayer, str]]] = defaultdict(list)
    for _, layer in named_layers(model):
        for weight, factors in layer.named_factors():
            users[id(factors)].append((layer, weight))
    return {name: _costs(factors, users[id(factors)], work, batch) for name, factors in named_factors(model)}


def works(model: nn.Module, inputs: Any) -> dict[tuple[int, str], list[Work]]:
    """Run the model once and return what each use of a factorized weight costs, by the ``id`` of its layer and the weight's name.

    Args:
        model: factorized.
        inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
    """
    found: dict[tuple[int, str], list[Work]] = defaultdict(list)

    def note(layer: FactorizedLayer, shape: Sequence[int], weights: Sequence[str]) -> None:
        for weight in weights:
            found[id(layer), weight].append(partial(_work, layer, weight, tuple(shape)))

    def called(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(layer, nn.MultiheadAttention):
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            if isinstance(layer.out_proj, FactorizedLayer):  # attention reads its weight and does not call it
                note(layer.out_proj, query.shape, ("weight",))
            if isinstance(layer, FactorizedLayer) and layer._qkv_same_embed_dim:
                found[id(layer), "in_proj_weight"].append(_packed_projection(layer.embed_dim, query, key, value))
            elif isinstance(layer, FactorizedLayer):
                for x, name in zip((query, key, value), ("q_proj_weight", "k_proj_weight", "v_proj_weight"), strict=True):
                    note(layer, x.shape, (name,))
        else:
            first = args[0] if args else next(iter(kwargs.values()))
            note(layer, (first.data if isinstance(first, PackedSequence) else first).shape, [name for name, _ in layer.named_factors()])

    hooked = [m for m in model.modules() if isinstance(m, FactorizedLayer | nn.MultiheadAttention)]
    handles = [module.register_forward_pre_hook(called, with_kwargs=True) for module in hooked]
    fused = torch.backends.mha.get_fastpath_enabled()  # the kernel of a whole encoder layer calls none of its children
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model):
            call_model(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()
    return found


def _work(layer: FactorizedLayer, weight: str, shape: tuple[int, ...], rank: int | None) -> float:
    return layer.work(layer, weight, layer.scheme, rank, shape)


def _packed_projection(embed: int, query: Tensor, key: Tensor, value: Tensor) -> Work:
    """Query, key and value through one matrix; of two operations the first runs once for each distinct input."""
    every = sum(math.prod(x.shape[:-1]) for x in (query, key, value))
    distinct = every - (query is key) * math.prod(query.shape[:-1]) - (value is key) * math.prod(value.shape[:-1])
    return lambda rank: float(embed * (every * embed if rank is None else rank * (distinct + every)))


def _costs(
    factors: Factors, users: Sequence[tuple[FactorizedLayer, str]], work: dict[tuple[int, str], list[Work]], batch: int
) -> RankCosts:
    out, in_ = factors.shape

    def macs(rank: int | None) -> float:
        total = 0.0
        for layer, weight in users:
            own = rank if rank is not None and rank <= layer.break_even(weight) else None
            total += sum(use(own) for use in work[id(layer), weight])
        return total / batch

    def params(rank: int | None) -> int:
        parts: dict[object, int] = {}  # what `merge` writes: tied tensors of the same layout once
        for layer, weight in users:
            if rank is None or rank > layer.break_even(weight):
                parts["dense"] = out * in_
            elif isinstance(layer, OneWeight):
                parts["left"] = rank * out
                parts["right, transposed" if isinstance(layer, FactorizedEmbedding) else "right"] = rank * in_
            else:
                parts[id(layer), weight] = rank * (out + in_)
        return factors.blocks * sum(parts.values())

    ranks = range(1, factors.rank + 1)
    return RankCosts(tuple(macs(rank) for rank in ranks), tuple(params(rank) for rank in ranks), macs(None), params(None))


def spectra(model: nn.Module) -> dict[str, Tensor]:
    """Return the true singular values of each factorized weight, descending, in float64; blocks pooled."""
    return {name: pooled_spectrum(svd_of_product(f.U.detach(), f.S.detach(), f.Vh.detach())[1]) for name, f in named_factors(model)}
