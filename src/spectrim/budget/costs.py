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

from spectrim.forms.svd import Factors
from spectrim.layers import FactorizedLayer, factor_name, named_factors, named_layers
from spectrim.layers.embedding import FactorizedEmbedding
from spectrim.layers.geometry import memory_format_of
from spectrim.layers.weights import OneWeight
from spectrim.metrics.calls import call_model, evaluating, unfused
from spectrim.metrics.inputs import batch_size_of
from spectrim.protocols import Latencies
from spectrim.surgery.coverage import break_evens

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
        seconds: as `macs`, for one call on the whole batch, by the table given; None without one, and for a weight that it could not time.
        dense_seconds: of the dense weight.
    """

    macs: tuple[float, ...]
    params: tuple[int, ...]
    dense_macs: float
    dense_params: int
    seconds: tuple[float, ...] | None = None
    dense_seconds: float | None = None


@dataclass(frozen=True)
class Call:
    """One use of a factorized weight as a model runs.

    Attributes:
        layer: that runs.
        weight: name of its weight.
        shape: of the input: ``(time, batch, features)`` for a recurrent layer, however it came; None for a packed projection of a query and
            a key that differ, which is no single product.
        dtype: of the input.
        memory_format: of the input.
        macs: what it costs.
    """

    layer: FactorizedLayer
    weight: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype
    memory_format: torch.memory_format
    macs: Work


def rank_costs(model: nn.Module, inputs: Any, latency: Latencies | None = None) -> dict[str, RankCosts]:
    """Return what each factorized weight costs at each rank up to the one it has.

    Tied weights and layers that run more than once count every time they run; parameters count once.

    Args:
        model: factorized.
        inputs: one batch; costs are for one example of it.
        latency: the table that `merge` will be given; above a measured break-even rank a weight costs what the dense one costs.

    Returns:
        By the names of `named_factors`.

    Raises:
        SettingError: when the batch size cannot be read off `inputs`.
        LayerError: when `latency` is of another model.
    """
    return costs_of(model, calls(model, inputs), inputs, latency)


def costs_of(model: nn.Module, used: Sequence["Call"], inputs: Any, latency: Latencies | None = None) -> dict[str, RankCosts]:
    """Return what each factorized weight costs at each rank, from the calls that were seen; otherwise as `rank_costs`.

    Args:
        model: factorized.
        used: what `calls` returned.
        inputs: one batch; costs are for one example of it.
        latency: the table that `merge` will be given.
    """
    work: dict[tuple[int, str], list[Work]] = defaultdict(list)
    for call in used:
        work[id(call.layer), call.weight].append(call.macs)
    limits, batch = break_evens(model, latency), batch_size_of(inputs, model=model, unknown=1)
    users: dict[int, list[_User]] = defaultdict(list)
    for layer_name, layer in named_layers(model):
        for weight, factors in layer.named_factors():
            key = (id(layer), weight)
            users[id(factors)].append(_User(factor_name(layer_name, weight), layer, weight, limits[key], work.get(key, [])))
    return {name: _costs(factors, users[id(factors)], batch, latency) for name, factors in named_factors(model)}


def calls(model: nn.Module, inputs: Any) -> list[Call]:
    """Run the model once and return every use of a factorized weight, in order.

    Args:
        model: factorized.
        inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
    """
    found: list[Call] = []

    def note(layer: FactorizedLayer, x: Any, weights: Sequence[str]) -> None:
        data = x.data if isinstance(x, PackedSequence) else x
        shape = _time_first(layer, x) if isinstance(layer, nn.RNNBase) else tuple(data.shape)
        for weight in weights:
            work = partial(_work, layer, weight, tuple(data.shape))
            found.append(Call(layer, weight, shape, data.dtype, memory_format_of(data), work))

    def called(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(layer, nn.MultiheadAttention):
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            if isinstance(layer.out_proj, FactorizedLayer):  # attention reads its weight and does not call it
                note(layer.out_proj, query, ("weight",))
            if isinstance(layer, FactorizedLayer) and layer._qkv_same_embed_dim:
                shape = tuple(query.shape) if query is key and key is value else None
                work = _packed_projection(layer.embed_dim, query, key, value)
                found.append(Call(layer, "in_proj_weight", shape, query.dtype, torch.contiguous_format, work))
            elif isinstance(layer, FactorizedLayer):
                for x, name in zip((query, key, value), ("q_proj_weight", "k_proj_weight", "v_proj_weight"), strict=True):
                    note(layer, x, (name,))
        else:
            note(layer, args[0] if args else next(iter(kwargs.values())), [name for name, _ in layer.named_factors()])

    hooked = [m for m in model.modules() if isinstance(m, FactorizedLayer | nn.MultiheadAttention)]
    handles = [module.register_forward_pre_hook(called, with_kwargs=True) for module in hooked]
    try:
        with unfused(), evaluating(model):
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _time_first(layer: Any, x: Any) -> tuple[int, ...]:
    """Return ``(time, batch, features)`` of a recurrent layer's input; of a packed one as if every sequence had full length."""
    if isinstance(x, PackedSequence):
        return (len(x.batch_sizes), int(x.batch_sizes[0]), x.data.shape[-1])
    if x.dim() == 2:
        return (x.shape[0], 1, x.shape[1])
    time, batch = (x.shape[1], x.shape[0]) if layer.batch_first else (x.shape[0], x.shape[1])
    return (time, batch, x.shape[2])


def _work(layer: FactorizedLayer, weight: str, shape: tuple[int, ...], rank: int | None) -> float:
    return layer.written_work(weight, rank, shape)


def _packed_projection(embed: int, query: Tensor, key: Tensor, value: Tensor) -> Work:
    """Query, key and value through one matrix; of two operations the first runs once for each distinct input."""
    every = sum(math.prod(x.shape[:-1]) for x in (query, key, value))
    distinct = every - (query is key) * math.prod(query.shape[:-1]) - (value is key) * math.prod(value.shape[:-1])
    return lambda rank: float(embed * (every * embed if rank is None else rank * (distinct + every)))


@dataclass(frozen=True)
class _User:
    """A layer that uses some factors: up to which rank as two operations, and what each of its calls costs."""

    name: str
    layer: FactorizedLayer
    weight: str
    limit: int
    calls: Sequence[Work]

    def written(self, rank: int | None) -> int | None:
        """Return the rank that `merge` writes, None for the dense form."""
        return rank if rank is not None and rank <= self.limit else None


def _costs(factors: Factors, users: Sequence[_User], batch: int, latency: Latencies | None) -> RankCosts:
    out, in_ = factors.shape

    def macs(rank: int | None) -> float:
        return sum(call(user.written(rank)) for user in users for call in user.calls) / batch

    def params(rank: int | None) -> int:
        parts: dict[object, int] = {}  # what `merge` writes: tied tensors of the same layout once
        for user in users:
            written = user.written(rank)
            if written is None:
                parts["dense"] = out * in_
            elif user.layer.interpolates(user.weight, written):
                parts[user.name] = written * (out + in_ - written)
            elif isinstance(user.layer, OneWeight):
                parts["left"] = written * out
                parts["right, transposed" if isinstance(user.layer, FactorizedEmbedding) else "right"] = written * in_
            else:
                parts[user.name] = written * (out + in_)
        return factors.blocks * sum(parts.values())

    def seconds(rank: int | None) -> float | None:
        each = [latency.seconds(user.name, user.written(rank)) if latency else None for user in users]
        return None if None in each else sum(s for s in each if s is not None)

    ranks = range(1, factors.rank + 1)
    timed = [seconds(rank) for rank in ranks]
    return RankCosts(
        tuple(macs(rank) for rank in ranks),
        tuple(params(rank) for rank in ranks),
        macs(None),
        params(None),
        None if None in timed else tuple(s for s in timed if s is not None),
        seconds(None),
    )


def spectra(model: nn.Module) -> dict[str, Tensor]:
    """Return the true singular values of each factorized weight, descending, in float64; blocks pooled."""
    return {name: factors.spectrum() for name, factors in named_factors(model)}
