"""`ladder`: what a network costs at every rank of every weight, in every unit; computed once and passed on."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from spectrim.budget.coded import coded_unit
from spectrim.budget.costs import RankCosts, UnitCost, calls, costs_of, with_counts
from spectrim.budget.latency_table import _key
from spectrim.budget.stand_ins import Only, dense, thin, true_values
from spectrim.budget.tiles import tile_units
from spectrim.budget.timed import LatencyTable
from spectrim.errors import LayerError, SettingError, SpectrimError
from spectrim.layers import named_factors, sites
from spectrim.layers.uses import Call
from spectrim.metrics.calls import evaluating
from spectrim.metrics.macs import count_macs
from spectrim.metrics.measurement import measure
from spectrim.protocols import Latencies
from spectrim.runtimes.crossbar import Crossbars
from spectrim.surgery.coverage import break_evens
from spectrim.surgery.merge import merge
from spectrim.surgery.same_function import same_function

ROUNDING = 2.0
"""Multiply-accumulates for one example by which two counts may differ: each is rounded to an integer."""


@dataclass(frozen=True)
class Ladder:
    """What one network costs at every rank: `ladder` computes it once; `allocate`, `plan`, `as_fractions` and `Squeeze` take it.

    Attributes:
        weights: costs of each factorized weight.
        units: by name: ``macs`` of one example, ``params``, ``size`` in bytes, ``latency`` in seconds of a call, ``tiles`` and
            ``tile_reads`` of one example, ``coded`` in bytes of a coded file where weights are held pruned or rounded.
        missing: why a unit is not there.
        latency: the table that decides what `merge` writes.
        corrected: weights whose multiply-accumulates were counted in place of the formula, and why.
        crossbars: what tiles are counted on.
    """

    weights: Mapping[str, RankCosts]
    units: Mapping[str, UnitCost]
    missing: Mapping[str, SpectrimError]
    latency: Latencies | None = None
    corrected: Mapping[str, str] = ()  # type: ignore[assignment]
    crossbars: Crossbars | None = None

    def unit(self, name: str) -> UnitCost:
        """Return the costs in one unit.

        Args:
            name: a key of `units`.

        Raises:
            SpectrimError: when the unit is missing.
        """
        if name in self.missing:
            raise self.missing[name]
        return self.units[name]

    def check(self, model: nn.Module) -> None:
        """Raise a LayerError unless this is the ladder of such a model: the same weights, at the same ranks."""
        for name, factors in named_factors(model):
            if name not in self.weights or len(self.weights[name].macs) != factors.rank:
                held = len(self.weights[name].macs) if name in self.weights else 0
                problem = f"has rank {factors.rank}, the ladder has {held} rungs"
                raise LayerError(name, problem, hint="make the ladder of this model: ladder(model, inputs)")


def ladder(
    model: nn.Module,
    inputs: Any,
    latency: Latencies | None = None,
    *,
    crossbars: Crossbars | None = None,
    dense_model: nn.Module | None = None,
    check: bool = False,
    own: bool = False,
    used: Sequence[Call] | None = None,
    before: Ladder | None = None,
) -> Ladder:
    """Return what a factorized network costs at each rank of each weight, in every unit.

    The formulas of the layers give multiply-accumulates, parameters and bytes; then the network that `merge` writes at rank 1 is counted.
    Where that count differs from the formulas (a weight that is read instead of called, sizes that are given at the call), the weights
    that differ are found and priced by counting.

    Args:
        model: factorized, at any rank.
        inputs: one batch of inputs; costs are for one example of it.
        latency: the `LatencyTable` that `merge` will be given.
        crossbars: what tiles are counted on; no tiles without it.
        dense_model: the dense network, where it is at hand; a stand-in without memory is made otherwise.
        check: whether to compare what the network at rank 1 and its pairs compute, see `same_function`.
        own: whether the model's factors may be exchanged and put back on the way, which saves copies of its modules.
        used: what `spectrim.budget.costs.calls` returned for this model and these inputs; the model runs once more without.
        before: the ladder of the same network in other forms, which has counted the dense one.

    Returns:
        The ladder. Nothing of it depends on the values of the weights.

    Raises:
        LayerError: when nothing is factorized, when `latency` is of another model, with `crossbars` where a layer is not mapped to them,
            or, with `check`, when pairs of layers do not compute what the factorized layers do.
        SettingError: when the batch size cannot be derived from `inputs`.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> import torch
        >>> low = factorize(nn.Linear(10, 4, bias=False))
        >>> costs = ladder(low, torch.zeros(1, 10)).unit("macs")
        >>> costs.whole, costs.weights[""]
        (40.0, (14.0, 28.0, 40.0, 40.0))
    """
    if next(named_factors(model), None) is None:
        raise LayerError(type(model).__name__, "has no factorized layer", hint="call factorize(model) first")
    used = calls(model, inputs) if used is None else used
    by_name = costs_of(model, used, inputs, latency)
    whole_network = dense(model) if dense_model is None else dense_model
    counted = _Counts(model, inputs, latency, own)
    first = counted.pairs(1, check=check)
    missing: dict[str, SpectrimError] = {}
    try:
        known = (
            {} if before is None or "macs" in before.missing else {name: before.units[name].whole for name in ("macs", "params", "size")}
        )
        whole = known or counted.of(whole_network, stand_in=dense_model is None)
        by_name, jump, corrected = _proved(counted, first, by_name, whole)
    except (LayerError, SettingError):
        raise
    except SpectrimError as error:  # a kernel that cannot be counted: the other units remain valid
        missing["macs"], jump, corrected = error, {}, {}
        whole = counted.of(whole_network, macs=False)
    tables = _tables(model, by_name)
    units: dict[str, UnitCost] = {}
    for name in whole:
        weights, dense_cost = tables[name]
        units[name] = UnitCost(weights, dense_cost, whole[name] - dense_cost + jump.get(name, 0.0), whole[name])
    coded = coded_unit(model, by_name, whole["size"])
    if isinstance(coded, UnitCost):
        units["coded"] = coded
    else:
        missing["coded"] = coded
    seconds = _seconds(model, used, by_name, latency)
    if isinstance(seconds, UnitCost):
        units["latency"] = seconds
    else:
        missing["latency"] = seconds
    if crossbars is None:
        hint = "crossbars=Crossbars(Device(bits=4), Mapping(rows=128, columns=64, bits=8)), from spectrim.runtimes.crossbar"
        why = SettingError("allocate", "crossbars", got=None, rule="given for a budget of tiles", hint=hint)
        missing |= {"tiles": why, "tile_reads": why}
    else:
        limits = break_evens(model, latency)
        units |= tile_units(model, first, whole_network, inputs, crossbars, limits, stand_in=dense_model is None)
    return Ladder(by_name, units, missing, latency, corrected, crossbars)


def _tables(model: nn.Module, costs: Mapping[str, RankCosts]) -> dict[str, tuple[dict[str, tuple[float, ...]], float]]:
    """Return the costs of each weight by rank, and of all of them dense, for each unit that is counted."""
    item = {name: factors.dtype.itemsize for name, factors in named_factors(model)}
    params, sizes = dict[str, tuple[float, ...]](), dict[str, tuple[float, ...]]()
    alike: dict[tuple[int, int], tuple[tuple[float, ...], tuple[float, ...]]] = {}  # weights of the same costs share their tables
    for name, cost in costs.items():
        key = (id(cost), item[name])
        if key not in alike:
            alike[key] = tuple(map(float, cost.params)), tuple([float(count * item[name]) for count in cost.params])
        params[name], sizes[name] = alike[key]
    return {
        "macs": ({name: cost.macs for name, cost in costs.items()}, float(sum(cost.dense_macs for cost in costs.values()))),
        "params": (params, float(sum(cost.dense_params for cost in costs.values()))),
        "size": (sizes, float(sum(cost.dense_params * item[name] for name, cost in costs.items()))),
    }


@dataclass(frozen=True)
class _Counts:
    """Counts networks that stand for the model, on its inputs."""

    model: nn.Module
    inputs: Any
    latency: Latencies | None
    own: bool

    def pairs(self, rank: int, names: Collection[str] | None = None, *, check: bool = False) -> nn.Module:
        """Return what `merge` writes of the network at a rank, with pairs for some weights alone."""
        latency = self.latency if names is None else Only(names, self.latency)
        with thin(self.model, rank, own=self.own) as network:
            merged = merge(network, latency=latency)
            if check:
                same_function(network, merged, self.inputs, names=("cut", "merged"))
        return merged

    def of(self, network: nn.Module, *, macs: bool = True, stand_in: bool = True) -> dict[str, float]:
        """Return multiply-accumulates of one example, parameters and bytes."""
        found = measure(network, latency=False)
        counts = {"params": float(found.params), "size": float(found.size_bytes)}
        if not macs:
            return counts
        if not stand_in:
            return {"macs": float(count_macs(network, self.inputs))} | counts
        with evaluating(self.model), true_values(network, self.model):
            return {"macs": float(count_macs(network, self.inputs))} | counts


def _proved(
    counted: _Counts, first: nn.Module, costs: dict[str, RankCosts], whole: Mapping[str, float]
) -> tuple[dict[str, RankCosts], dict[str, float], dict[str, str]]:
    """Count the network at rank 1, which is `first`, and correct what the formulas say where they are wrong.

    Returns:
        The costs; what any pair at all adds to the rest of the network, by unit; and the weights that were counted, with the reason.
    """
    names = list(costs)

    def excess(chosen: Collection[str]) -> float:
        """Return what the formulas miss of the network with pairs of rank 1 for these weights alone."""
        network = first if len(chosen) == len(names) else counted.pairs(1, chosen)
        expected = whole["macs"] + sum(costs[name].macs[0] - costs[name].dense_macs for name in chosen)
        return counted.of(network)["macs"] - expected

    total = excess(names)
    if abs(total) <= ROUNDING:
        return costs, {}, {}
    half = len(names) // 2
    if half:
        left, right = excess(names[:half]), excess(names[half:])
        if abs(left - total) <= ROUNDING and abs(right - total) <= ROUNDING:
            return (
                costs,
                {"macs": max(0.0, total)},
                dict.fromkeys(names, "replacing any layer by a pair changes how the rest of the network runs"),
            )
        culprits = _culprits(excess, names[:half], left) + _culprits(excess, names[half:], right)
    else:
        culprits = names
    found = dict(costs)
    for name in culprits:
        found[name] = with_counts(costs[name], partial(_change, counted, name, whole["macs"] - costs[name].dense_macs))
    why = "its pair does not cost what two calls cost: the weight is read, or sizes are passed to the call"
    return found, {}, dict.fromkeys(culprits, why)


def _culprits(excess: Any, names: Sequence[str], missed: float) -> list[str]:
    """Return the weights whose formulas are wrong, by bisection."""
    if abs(missed) <= ROUNDING or not names:
        return []
    if len(names) == 1:
        return list(names)
    half = len(names) // 2
    left, right = names[:half], names[half:]
    return _culprits(excess, left, excess(left)) + _culprits(excess, right, excess(right))


def _change(counted: _Counts, name: str, rest: float, rank: int) -> float:
    """Return what the network costs with a pair of a rank for one weight, less `rest`."""
    return counted.of(counted.pairs(rank, (name,)))["macs"] - rest


# Seconds


def _seconds(model: nn.Module, used: Sequence[Call], costs: Mapping[str, RankCosts], latency: Latencies | None) -> UnitCost | SpectrimError:
    """Return the seconds of the network, or why they are not known."""
    if latency is None:
        rule = "a latency table for Budget(latency=...) and Budget(latency_s=...)"
        return SettingError(
            "allocate", "latency", got=None, rule=rule, hint="table = latency_table(model, inputs) makes one; give merge the same"
        )
    other = _other_batch(model, used, latency)
    if other is not None:
        return other
    whole = getattr(latency, "dense_s", None)
    if whole is None:
        rule = "a table that holds the seconds of the whole dense network"
        why = getattr(latency, "dense_untimed", "") or "it has no dense_s"
        return SettingError("allocate", "latency", got=type(latency).__name__, rule=rule, hint=why)
    seconds = {name: cost.seconds or (0.0,) * len(cost.macs) for name, cost in costs.items()}  # untimed ones are of the rest
    timed = sum(cost.dense_seconds or 0.0 for cost in costs.values() if cost.seconds)
    fixed = max(0.0, whole - timed)
    return UnitCost(seconds, timed, fixed, fixed + timed)


def _other_batch(model: nn.Module, used: Sequence[Call], latency: Latencies) -> SettingError | None:
    """Return an error when a latency table was made with other inputs."""
    if not isinstance(latency, LatencyTable):
        return None
    names = {(site.layer, site.key): site.name for site in sites(model)}
    for call in used:
        timed = latency.weights.get(names[call.layer, call.weight])
        if timed and timed.calls and _key(call) not in timed.calls:
            hint = f"it timed {timed.calls[0]}; here it is {_key(call)}"
            return SettingError("allocate", "inputs", got="another batch", rule="the batch that the latency table was made with", hint=hint)
    return None
