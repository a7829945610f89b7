"""Ranks for the whole network under one budget."""

import importlib
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spectrim.costs import calls, rank_costs
from spectrim.errors import SettingError
from spectrim.factorize import merge
from spectrim.files import printing_to_stderr
from spectrim.importance import SpectralEnergy, harms_of
from spectrim.latency import LatencyTable, _key
from spectrim.layers import factor_name, named_factors, named_layers
from spectrim.measure import compare_latency, count_macs, measure
from spectrim.protocols import Importance, Latencies

FRACTIONS = {"macs": "macs", "params": "params", "size": "size", "latency": "latency"}
"""Fields of a budget that are fractions of the dense network, and the cost that each limits."""

ABSOLUTE = {"size_bytes": "size", "latency_s": "latency"}
"""Fields of a budget that have a unit, and the cost that each limits."""

UNITS = {"size_bytes": "bytes", "latency_s": "seconds"}


@dataclass(frozen=True, repr=False)
class Budget:
    """What the whole network may keep, in any combination; at least one.

    Args:
        macs: fraction of the multiply-accumulates of the dense network, in (0, 1].
        params: fraction of its stored parameters, in (0, 1].
        size: fraction of its bytes, in (0, 1], as `measure` counts them: parameters and buffers, two bytes for each in half precision.
        latency: fraction of the seconds that it takes, in (0, 1]; `allocate` then needs a latency table.
        size_bytes: bytes, at least 1.
        latency_s: seconds for one call on the table's batch, above 0.

    Raises:
        SettingError: for a fraction outside (0, 1], for a number of bytes or seconds that is none, or when nothing is limited.

    Examples:
        >>> Budget(macs=0.4)
        Budget(macs=0.4)
        >>> Budget(params=0.5, latency_s=0.002)
        Budget(params=0.5, latency_s=0.002)
    """

    macs: float | None = None
    params: float | None = None
    size: float | None = None
    latency: float | None = None
    size_bytes: float | int | None = None
    latency_s: float | None = None

    def __post_init__(self) -> None:
        hint = "Budget(macs=0.4) keeps 40 %"
        if not self.limits:
            raise SettingError("Budget", f"one of {', '.join(f.name for f in fields(self))}", got=None, rule="given", hint=hint)
        for name, value in self.limits.items():
            if name in FRACTIONS and not 0 < value <= 1:
                hint = next((f"write {other}= for {unit}" for other, unit in UNITS.items() if FRACTIONS[name] == ABSOLUTE[other]), hint)
                raise SettingError("Budget", name, got=value, rule="the fraction kept, in (0, 1]", hint=hint)
        if self.size_bytes is not None and not 1 <= self.size_bytes < math.inf:
            raise SettingError("Budget", "size_bytes", got=self.size_bytes, rule="bytes, at least 1", hint="Budget(size=0.4) keeps 40 %")
        if self.latency_s is not None and not 0 < self.latency_s < math.inf:
            raise SettingError("Budget", "latency_s", got=self.latency_s, rule="seconds, above 0", hint="Budget(latency=0.4) keeps 40 %")

    @property
    def limits(self) -> dict[str, float | int]:
        """What is limited: field to value."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in self.limits.items())})"


def allocate(
    model: nn.Module,
    budget: Budget,
    inputs: Any,
    *,
    importance: Importance | None = None,
    latency: Latencies | None = None,
    multiple: int | None = None,
) -> dict[str, int]:
    """Return the rank of each factorized weight that does the least harm within a budget.

    The multiple-choice knapsack ``min sum_l harm_l(r_l)`` subject to ``sum_l cost_l(r_l) <= budget - fixed`` for each limit of the budget,
    solved exactly by dynamic programming where one limit is counted in units that are large enough (most budgets of multiply-accumulates),
    else by mixed-integer programming to a relative gap of 1e-4 (or to the best found in a minute). Costs are those of the network that
    `merge` will write, and multiply-accumulates, parameters and bytes are met by count. Seconds are the table's for the weights that it
    timed; the rest of the network takes what the dense one, run once as a whole in the table's backend, takes beyond its timed weights.

    Args:
        model: factorized, at any rank.
        budget: what the network keeps of the dense one.
        inputs: one batch of inputs, for the layers' sizes; for a latency budget the batch that the table was made with.
        importance: what is harm, see `spectrim.importance`; the relative `SpectralEnergy` when omitted.
        latency: a `LatencyTable` of the model. Ranks above a layer's measured break-even rank then cost what the dense layer costs, so that
            a layer for which no rank is faster stays dense; give `merge` the same table.
        multiple: ranks are multiples of it, at least 1, or the rank that a weight has now. When omitted, the multiples of the table
            (8, less for small layers); 1 without a table.

    Returns:
        ``{name: rank}`` for `prune`.

    Raises:
        LayerError: when nothing is factorized, or for harms that are none, see `spectrim.importance.harms_of`.
        SettingError: when the budget is below the smallest network that ranks can reach (which is named), for a latency budget without
            a table or with inputs that it was not made with, or for a `multiple` below 1.

    Examples:
        >>> from spectrim.factorize import factorize
        >>> low = factorize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), where=lambda name, module: True)
        >>> ranks = allocate(low, Budget(macs=0.5), torch.zeros(1, 8))
        >>> sum(16 * rank for rank in ranks.values()) <= 0.5 * 128
        True

    Source: energy as importance: Idelbayev and Carreira-Perpinan, CVPR 2020 (learned ranks); the knapsack is ours.
    """
    if multiple is not None and multiple < 1:
        raise SettingError("allocate", "multiple", got=multiple, rule="at least 1")
    harms = harms_of(model, importance or SpectralEnergy())
    costs = _costs(model, {(FRACTIONS | ABSOLUTE)[name] for name in budget.limits}, inputs, latency)
    choices = {}
    for name, factors in named_factors(model):
        step = multiple or (latency.multiple(name) if latency else 1)
        tables = [cost.weights[name] for cost in costs.values()]
        cheaper = [rank for rank in range(step, factors.rank, step) if any(table[rank - 1] < table[-1] for table in tables)]
        choices[name] = [*cheaper, factors.rank]  # what costs as much as the present rank is worse than that
    limits = [_limit(name, value, costs[(FRACTIONS | ABSOLUTE)[name]], choices) for name, value in budget.limits.items()]
    typical = float(torch.stack([harm[0] for harm in harms.values()]).mean())
    picked = _knapsack([harms[name][ranks] for name, ranks in choices.items()], limits, typical)
    return {name: ranks[index] for (name, ranks), index in zip(choices.items(), picked, strict=True)}


def as_fractions(budget: Budget, model: nn.Module, inputs: Any, *, latency: Latencies | None = None) -> Budget:
    """Return a budget in which bytes and seconds are fractions of the dense network, for what goes down to a target step by step.

    Args:
        budget: in any units; one that has fractions only comes back as it is. Of a cost that is limited twice, the lower limit stays.
        model: factorized, at any rank.
        inputs: as for `allocate`.
        latency: as for `allocate`.

    Raises:
        SettingError: as `allocate` for a latency budget.

    Examples:
        >>> from spectrim.factorize import factorize
        >>> low = factorize(nn.Linear(10, 4, bias=False))  # 160 bytes dense
        >>> as_fractions(Budget(macs=0.9, size_bytes=120), low, torch.zeros(1, 10))
        Budget(macs=0.9, size=0.75)
    """
    given = {name: value for name, value in budget.limits.items() if name in ABSOLUTE}
    costs = _costs(model, {ABSOLUTE[name] for name in given}, inputs, latency)
    kept = {ABSOLUTE[name]: min(1.0, value / costs[ABSOLUTE[name]].whole) for name, value in given.items()}
    for name, fraction in kept.items():
        kept[name] = min(fraction, budget.limits.get(name, 1.0))
    return replace(budget, **kept, **dict.fromkeys(given))


@dataclass(frozen=True)
class _Cost:
    """What the network costs in one unit.

    Attributes:
        weights: of each factorized weight at every rank from 1.
        dense: of all of them, dense.
        fixed: of everything else.
    """

    weights: Mapping[str, Sequence[float]]
    dense: float
    fixed: float

    @property
    def whole(self) -> float:
        """Of the dense network."""
        return self.fixed + self.dense


def _costs(model: nn.Module, kinds: set[str], inputs: Any, latency: Latencies | None) -> dict[str, _Cost]:
    """Return costs by kind: ``macs`` of one example, ``params``, ``size`` in bytes, ``latency`` in seconds of a call."""
    if not kinds:
        return {}
    if "latency" in kinds:
        _check_table(model, inputs, latency)
    by_name, merged = rank_costs(model, inputs, latency), merge(model, latency=latency)
    bytes_each = {name: factors.dtype.itemsize for name, factors in named_factors(model)}
    found = {}
    if "macs" in kinds:
        macs = {name: cost.macs for name, cost in by_name.items()}
        found["macs"] = _counted(macs, sum(cost.dense_macs for cost in by_name.values()), count_macs(merged, inputs))
    if "params" in kinds:
        params = {name: [float(count) for count in cost.params] for name, cost in by_name.items()}
        dense = float(sum(cost.dense_params for cost in by_name.values()))
        found["params"] = _counted(params, dense, sum(p.numel() for p in merged.parameters()))
    if "size" in kinds:
        size = {name: [float(count * bytes_each[name]) for count in cost.params] for name, cost in by_name.items()}
        dense = float(sum(cost.dense_params * bytes_each[name] for name, cost in by_name.items()))
        found["size"] = _counted(size, dense, measure(merged, latency=False).size_bytes)
    if "latency" in kinds:
        seconds = {name: cost.seconds or (0.0,) * len(cost.macs) for name, cost in by_name.items()}  # untimed ones are of the rest
        dense = sum(cost.dense_seconds or 0.0 for cost in by_name.values() if cost.seconds)
        found["latency"] = _Cost(seconds, dense, max(0.0, _dense_seconds(model, inputs, latency) - dense))
    return found


def _counted(weights: Mapping[str, Sequence[float]], dense: float, present: int) -> _Cost:
    """Return a cost whose fixed part is what the present network has beyond its factorized weights."""
    return _Cost(weights, float(dense), present - sum(ranks[-1] for ranks in weights.values()))


def _check_table(model: nn.Module, inputs: Any, latency: Latencies | None) -> None:
    """Raise a SettingError unless there is a latency table, made with such inputs."""
    if latency is None:
        hint = "table = latency_table(model, inputs) makes one; give merge the same"
        raise SettingError(
            "allocate", "latency", got=None, rule="a latency table for Budget(latency=...) and Budget(latency_s=...)", hint=hint
        )
    if not isinstance(latency, LatencyTable):
        return
    names = {(id(layer), weight): factor_name(name, weight) for name, layer in named_layers(model) for weight in layer.factors}
    for call in calls(model, inputs):
        timed = latency.weights.get(names[id(call.layer), call.weight])
        if timed and timed.calls and _key(call) not in timed.calls:
            hint = f"it timed {timed.calls[0]}; here it is {_key(call)}"
            raise SettingError("allocate", "inputs", got="another batch", rule="the batch that the latency table was made with", hint=hint)


class _AllDense:
    """Stands for a latency table by which no pair is ever faster, so that `merge` writes the dense network."""

    def limits(self, model: nn.Module) -> dict[tuple[int, str], int]:
        return {(id(layer), weight): 0 for _, layer in named_layers(model) for weight in layer.factors}

    def seconds(self, name: str, rank: int | None) -> float | None:
        return None

    def multiple(self, name: str) -> int:
        return 1

    def verdict(self, name: str, rank: int) -> str:
        return "merges to one dense layer"


def _dense_seconds(model: nn.Module, inputs: Any, latency: Any) -> float:
    """Time one call of the dense network as the table timed its layers: in its backend, with its threads."""
    dense: Any = merge(model, latency=_AllDense())
    backend, threads = getattr(latency, "backend", "eager"), getattr(latency, "threads", 1)
    if backend == "onnx":
        dense = _Exported(dense, inputs, threads)
    elif backend == "compile":
        dense = torch.compile(dense, dynamic=False)
    return compare_latency({"dense": dense}, inputs, threads=threads)["dense"].median_s


class _Exported(nn.Module):
    """A network in ONNX Runtime, for one batch."""

    def __init__(self, model: nn.Module, inputs: Any, threads: int) -> None:
        super().__init__()
        ort = importlib.import_module("onnxruntime")  # an extra; a table of this backend could not have been made without it

        kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
        args = () if kwargs else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            program = torch.onnx.export(model.eval(), args, kwargs=kwargs, dynamo=True, verbose=False)
        assert program is not None
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        self.session = ort.InferenceSession(program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.feed = {given.name: tensor.cpu().numpy() for given, tensor in zip(self.session.get_inputs(), tensors, strict=True)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.session.run(None, self.feed)


def _limit(name: str, value: float | int, cost: _Cost, choices: Mapping[str, Sequence[int]]) -> "_Limit":
    """Return what the factorized weights may cost together.

    Args:
        name: the field of the budget.
        value: what it says.
        cost: of what it limits.
        choices: the ranks to choose from, by weight.
    """
    tables = [[cost.weights[weight][rank - 1] for rank in ranks] for weight, ranks in choices.items()]
    least = cost.fixed + sum(min(table) for table in tables)
    most = value * cost.whole if name in FRACTIONS else value
    counted = (FRACTIONS | ABSOLUTE)[name] != "latency"
    most = math.floor(most + 1e-9) if counted else most
    if most < least:
        if name in FRACTIONS:
            smallest = f"{math.ceil(least / cost.whole * 1e4) / 1e4:.4f}"
        else:
            smallest = f"{math.ceil(least)} bytes" if counted else f"{math.ceil(least * 1e7) / 1e7:.7f} seconds"
        hint = "every factorized weight is at its cheapest rank then; factorize more layers to go below"
        raise SettingError("Budget", name, got=value, rule=f"at least {smallest} for this network", hint=hint)
    unit = 1.0 if counted else 1e9  # nanoseconds: what the solver lets through must be nothing
    row = np.concatenate([np.asarray(table, dtype=float) for table in tables])
    return _Limit(name, row * unit, (most - cost.fixed) * unit, cost.whole * unit)


@dataclass(frozen=True)
class _Limit:
    """One row of the knapsack: the cost of every choice, what they may sum to, and the dense network's cost as a scale."""

    name: str
    row: NDArray[np.float64]
    most: float
    scale: float


def _knapsack(losses: Sequence[Tensor], limits: Sequence[_Limit], scale: float) -> list[int]:
    """Choose one rank for each weight: its place in `losses`, which holds what each of the ranks loses.

    Args:
        losses: of each weight, at the ranks to choose from.
        limits: of the sums of costs.
        scale: a typical loss; the solver sees losses in this unit.
    """
    objective, starts = torch.cat(list(losses)).numpy(), np.cumsum([0, *(len(entry) for entry in losses)])
    most = math.inf
    while True:
        picked = _solve(np.minimum(objective / (scale or 1.0), most), starts, limits)
        lost = float(objective[starts[:-1] + picked].sum())
        if not 0 < lost < RESOLVED * scale:
            return picked
        scale, most = lost, 2.0  # once more in the unit of what was lost; a choice that alone loses more than all is not in the best


STATES = 2**28
"""Choices times units of cost up to which the knapsack is solved by dynamic programming: a second or two."""

RESOLVED = 1e-2
"""Loss, in the unit that the solver sees, above which its absolute gap of 1e-6 is no wider than its relative one of 1e-4."""


def _solve(objective: NDArray[np.float64], starts: NDArray[np.int64], limits: Sequence[_Limit]) -> list[int]:
    """Return the place of the choice for each weight, whose choices are those from its start to the next."""
    if len(limits) == 1 and (exact := _by_dynamic_programming(objective, starts, limits[0])) is not None:
        return exact
    from scipy.optimize import Bounds, LinearConstraint, milp  # here, because it takes long to import and few commands need it
    from scipy.sparse import csr_array

    choices = np.arange(starts[-1])
    one_each = csr_array((np.ones(len(choices)), (np.repeat(np.arange(len(starts) - 1), np.diff(starts)), choices)))
    slack = [0.0] * len(limits)
    for _ in range(10):
        rows = [
            LinearConstraint(limit.row[None] / limit.scale, ub=(limit.most - less) / limit.scale)
            for limit, less in zip(limits, slack, strict=True)
        ]
        with printing_to_stderr(unless=b"HighsMipSolverData::"):
            solution = milp(
                objective,
                integrality=np.ones(len(choices), int),
                bounds=Bounds(0, 1),
                constraints=[LinearConstraint(one_each, 1, 1), *rows],
                options={"mip_rel_gap": 1e-4, "time_limit": 60},
            )
        if solution.x is None:
            break
        picked = [int(np.argmax(solution.x[start:end])) for start, end in itertools.pairwise(starts)]
        excess = [float(limit.row[starts[:-1] + picked].sum() - limit.most) for limit in limits]
        if max(excess) <= 1e-6:
            return picked
        # the solver's tolerance lets through about a millionth more than the limit: ask for as much less
        slack = [less + max(over, 0.0) for less, over in zip(slack, excess, strict=True)]
    together, infeasible = " and ".join(limit.name for limit in limits), solution.status == 2
    got = "limits that no ranks meet together" if infeasible else "limits for which no ranks were found in a minute"
    hint = str(solution.message) if infeasible else "multiple=4 leaves fewer ranks to choose from"
    raise SettingError("Budget", together, got=got, rule="looser", hint=hint)


def _by_dynamic_programming(objective: NDArray[np.float64], starts: NDArray[np.int64], limit: _Limit) -> list[int] | None:
    """Return the optimum for one limit of whole numbers, in units of their greatest common divisor; None where that takes too long.

    Ranks of one layer cost multiples of one number, and those numbers have large divisors in common.
    """
    if not (np.mod(limit.row, 1) == 0).all() or limit.row.max() > 2**53:
        return None
    costs = [limit.row[start:end].astype(np.int64) for start, end in itertools.pairwise(starts)]
    least = [int(cost.min()) for cost in costs]
    extra = [cost - low for cost, low in zip(costs, least, strict=True)]
    unit = int(np.gcd.reduce(np.concatenate(extra))) or 1
    room = min(math.floor(limit.most) - sum(least), sum(int(cost.max()) for cost in extra)) // unit
    if (room + 1) * len(objective) > STATES:
        return None
    best, places = np.zeros(room + 1), []  # the least loss of the weights so far, with at most so many units
    for cost, start in zip(extra, starts[:-1], strict=True):
        found, place = np.full(room + 1, np.inf), np.zeros(room + 1, dtype=np.int32)
        for choice, units in enumerate((cost // unit).tolist()):
            if units <= room:
                candidate = best[: room + 1 - units] + objective[start + choice]
                better = candidate < found[units:]
                np.copyto(found[units:], candidate, where=better)
                place[units:][better] = choice
        best = found
        places.append(place)
    picked = []
    for place, cost in zip(reversed(places), reversed(extra), strict=True):
        picked.append(int(place[room]))
        room -= int(cost[picked[-1]]) // unit
    return picked[::-1]
