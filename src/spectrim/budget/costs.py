"""What a layer costs at each rank, in the network it stands in."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from spectrim.forms.form import Form
from spectrim.layers import FactorizedLayer, Site, named_factors, sites
from spectrim.layers.alike import description
from spectrim.layers.uses import Call, Work
from spectrim.layers.watching import calls_for, runs_factors
from spectrim.metrics.calls import watched
from spectrim.metrics.inputs import batch_size_of
from spectrim.protocols import Latencies
from spectrim.surgery.coverage import break_evens


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
class UnitCost:
    """What a network costs in one unit.

    Attributes:
        weights: of each factorized weight: entry ``r - 1`` is its cost at rank ``r``.
        dense: of all of them, dense.
        fixed: of everything else.
        whole: of the dense network.
    """

    weights: Mapping[str, Sequence[float]]
    dense: float
    fixed: float
    whole: float


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
        SettingError: when the batch size cannot be derived from `inputs`.
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
    work: dict[tuple[FactorizedLayer, str], list[Work]] = defaultdict(list)
    shapes: dict[tuple[FactorizedLayer, str], list[Any]] = defaultdict(list)
    for call in used:
        work[call.layer, call.weight].append(call.macs)
        shapes[call.layer, call.weight].append(call.shape)
    limits, batch = break_evens(model, latency), batch_size_of(inputs, model=model, unknown=1)
    users: dict[Form, list[_User]] = defaultdict(list)
    for site in sites(model):
        users[site.factors].append(_User(site, limits[site.name], work.get((site.layer, site.key), [])))
    priced: dict[Any, RankCosts] = {}
    found: dict[str, RankCosts] = {}
    for name, factors in named_factors(model):
        alike = _alike(users[factors], shapes) if latency is None else None
        found[name] = priced[alike] if alike in priced else _costs(factors, users[factors], batch, latency)
        if alike is not None:
            priced[alike] = found[name]
    return found


def calls(model: nn.Module, inputs: Any) -> list[Call]:
    """Run the model once and return every use of a factorized weight, in order.

    Args:
        model: factorized.
        inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
    """
    found: list[Call] = []

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.extend(calls_for(module, args, kwargs))

    watched(model, inputs, filter(runs_factors, model.modules()), called)
    return found


PADDED = (1, 2, 4, 8, 16)
"""Multiples to which kernels may pad a rank."""


def with_counts(cost: RankCosts, count: Callable[[int], float]) -> RankCosts:
    """Return costs whose multiply-accumulates are those counted at rank 1 and behind the first step, and what follows at other ranks.

    Kernels of grouped products pad a rank, to 4 in float32: the first step is then from rank 4 to 5.

    Args:
        cost: by the formulas.
        count: returns what is counted at a rank.
    """
    pair = [macs != cost.dense_macs or params != cost.dense_params for macs, params in zip(cost.macs, cost.params, strict=True)]
    one, width = count(1), 1
    step = one if len(pair) < 2 or not pair[1] else 0.0
    for wide in PADDED:
        if wide < len(pair) and pair[wide] and not step:
            step, width = count(1 + wide) - one, wide
    macs = tuple(one + rank // width * step if is_pair else cost.dense_macs for rank, is_pair in enumerate(pair))
    return replace(cost, macs=macs)


@dataclass(frozen=True)
class _User:
    """A layer that uses some factors: up to which rank as two operations, and what each of its calls costs."""

    site: Site
    limit: int
    calls: Sequence[Work]

    def written(self, rank: int | None) -> int | None:
        """Return the rank that `merge` writes, None for the dense form."""
        return rank if rank is not None and rank <= self.limit else None


def _alike(users: Sequence[_User], shapes: Mapping[tuple[FactorizedLayer, str], list[Any]]) -> Hashable | None:
    """Return what a weight has in common with those of the same costs; None for a tied one, or where a layer says what its calls are."""
    if len(users) > 1 or type(users[0].site.layer).calls_for is not FactorizedLayer.calls_for:
        return None
    own = description(users[0].site)
    met = tuple(shapes.get((users[0].site.layer, users[0].site.key), ()))
    return None if own is None else (own, users[0].limit, met)


def _costs(factors: Form, users: Sequence[_User], batch: int, latency: Latencies | None) -> RankCosts:
    def macs(rank: int | None) -> float:
        return sum(call(user.written(rank)) for user in users for call in user.calls) / batch

    def params(rank: int | None) -> int:
        parts: dict[str, int] = {}  # what `merge` writes: tied tensors of the same layout once
        for user in users:
            parts |= user.site.layer.params_written(user.site.key, user.written(rank), user.site.name)
        return factors.blocks * sum(parts.values())

    def seconds(rank: int | None) -> float | None:
        each = [latency.seconds(user.site.name, user.written(rank)) if latency else None for user in users]
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
