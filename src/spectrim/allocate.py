"""Ranks for the whole network under one budget."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spectrim.costs import rank_costs, spectra
from spectrim.errors import LayerError, SettingError
from spectrim.factorize import merge
from spectrim.layers import named_factors
from spectrim.linalg import tail_energy
from spectrim.measure import count_macs
from spectrim.protocols import Latencies


@dataclass(frozen=True)
class Budget:
    """What the whole network may keep, as fractions of the dense one.

    Args:
        macs: fraction of the multiply-accumulates, in (0, 1].
        params: fraction of the stored parameters, in (0, 1].

    Raises:
        SettingError: for a fraction outside (0, 1], or when nothing is limited.
    """

    macs: float | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if all(value is None for value in values.values()):
            raise SettingError("Budget", "macs or params", got=None, rule="given", hint="Budget(macs=0.4) keeps 40 %")
        for name, value in values.items():
            if value is not None and not 0 < value <= 1:
                raise SettingError("Budget", name, got=value, rule="the fraction kept, in (0, 1]", hint="Budget(macs=0.4) keeps 40 %")


def allocate(
    model: nn.Module, budget: Budget, inputs: Any, *, latency: Latencies | None = None, multiple: int | None = None
) -> dict[str, int]:
    """Return the rank of each factorized weight that loses the least spectral energy within a budget.

    The multiple-choice knapsack ``min sum_l tail_l(r_l) / tail_l(0)`` subject to ``sum_l cost_l(r_l) <= budget - fixed``, solved to a
    relative gap of 1e-4. Costs are those of the network that `merge` will write, and the budget is met by count.

    Args:
        model: factorized, at any rank.
        budget: fractions of the dense network.
        inputs: one batch of inputs, for the layers' sizes.
        latency: a `LatencyTable` of the model. Ranks above a layer's measured break-even rank then cost what the dense layer costs, so that
            a layer for which no rank is faster stays dense; give `merge` the same table.
        multiple: ranks are multiples of it, at least 1, or the rank that a weight has now. When omitted, the multiples of the table
            (8, less for small layers); 1 without a table.

    Returns:
        ``{name: rank}`` for `prune`.

    Raises:
        LayerError: when nothing is factorized.
        SettingError: when the budget is below the smallest network that ranks can reach (the fraction of that is named), or for a
            `multiple` below 1.

    Examples:
        >>> from spectrim.factorize import factorize
        >>> low = factorize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), where=lambda name, module: True)
        >>> ranks = allocate(low, Budget(macs=0.5), torch.zeros(1, 8))
        >>> sum(16 * rank for rank in ranks.values()) <= 0.5 * 128
        True

    Source: energy as importance: Idelbayev and Carreira-Perpinan, CVPR 2020 (learned ranks); the knapsack is ours.
    """
    names = [name for name, _ in named_factors(model)]
    if not names:
        raise LayerError(type(model).__name__, "has no factorized layer", hint="call factorize(model) first")
    if multiple is not None and multiple < 1:
        raise SettingError("allocate", "multiple", got=multiple, rule="at least 1")
    by_name, values = rank_costs(model, inputs, latency), spectra(model)
    costs = [by_name[name] for name in names]
    steps = [multiple or (latency.multiple(name) if latency else 1) for name in names]
    choices = [[*range(step, len(cost.macs), step), len(cost.macs)] for step, cost in zip(steps, costs, strict=True)]
    tails = [tail_energy(values[name]) for name in names]
    losses = [tail[ranks] / tail[0].clamp(min=1e-300) for tail, ranks in zip(tails, choices, strict=True)]
    merged, limits = merge(model, latency=latency), []
    if budget.macs is not None:
        tables = [[cost.macs[rank - 1] for rank in ranks] for cost, ranks in zip(costs, choices, strict=True)]
        dense = sum(cost.dense_macs for cost in costs)
        limits.append(_limit("macs", budget.macs, tables, dense, float(count_macs(merged, inputs))))
    if budget.params is not None:
        tables = [[float(cost.params[rank - 1]) for rank in ranks] for cost, ranks in zip(costs, choices, strict=True)]
        dense = float(sum(cost.dense_params for cost in costs))
        limits.append(_limit("params", budget.params, tables, dense, float(sum(p.numel() for p in merged.parameters()))))
    return {name: ranks[index] for name, ranks, index in zip(names, choices, _knapsack(losses, limits), strict=True)}


@dataclass(frozen=True)
class _Limit:
    """One row of the knapsack: the cost of every choice, what they may sum to, and the dense network's cost as a scale."""

    row: NDArray[np.float64]
    most: float
    scale: float


def _limit(kind: str, fraction: float, tables: Sequence[Sequence[float]], dense: float, present: float) -> _Limit:
    """Return what the factorized weights may cost together.

    Args:
        kind: the field of the budget.
        fraction: of the dense network.
        tables: what each weight costs at each rank to choose from, the present one last.
        dense: what all of them cost dense.
        present: what the whole network costs at the present ranks.
    """
    fixed = present - sum(table[-1] for table in tables)
    whole, least = fixed + dense, fixed + sum(min(table) for table in tables)
    most = math.floor(fraction * whole + 1e-9)
    if most < least:
        smallest = math.ceil(least / whole * 1e4) / 1e4
        hint = "every factorized weight is at its cheapest rank then; factorize more layers to go below"
        raise SettingError("Budget", kind, got=fraction, rule=f"at least {smallest:.4f} for this network", hint=hint)
    return _Limit(np.concatenate([np.asarray(table, dtype=float) for table in tables]), most - fixed, whole)


def _knapsack(losses: Sequence[Tensor], limits: Sequence[_Limit]) -> list[int]:
    """Choose one rank for each weight: its place in `losses`, which holds what each of the ranks loses."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # here, because it takes long to import and few commands need it
    from scipy.sparse import csr_array

    starts = np.cumsum([0, *(len(entry) for entry in losses)])
    choices = np.arange(starts[-1])
    one_each = csr_array((np.ones(len(choices)), (np.repeat(np.arange(len(losses)), np.diff(starts)), choices)))
    slack = [0.0] * len(limits)
    for _ in range(10):
        rows = [
            LinearConstraint(limit.row[None] / limit.scale, ub=(limit.most - less) / limit.scale)
            for limit, less in zip(limits, slack, strict=True)
        ]
        solution = milp(
            torch.cat(list(losses)).numpy(),
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
    raise SettingError("Budget", "macs and params", got="limits that no ranks meet together", rule="looser", hint=str(solution.message))
