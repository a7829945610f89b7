"""`allocate`: ranks for the whole network under one budget."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spectrim.budget.budget import ABSOLUTE, FRACTIONS, Budget, as_budget
from spectrim.budget.distortion.base import harms_of
from spectrim.budget.distortion.energy import SpectralEnergy
from spectrim.budget.knapsack import _knapsack, _limit
from spectrim.budget.prices import _costs
from spectrim.checks import check, unwrapped
from spectrim.layers import named_factors
from spectrim.protocols import Importance, Latencies


def allocate(
    model: nn.Module,
    budget: Budget | float | Mapping[str, Any],
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
        budget: what the network keeps of the dense one: a `Budget`, a fraction of its multiply-accumulates, or a dict of a budget's fields.
        inputs: one batch of inputs, for the layers' sizes; for a latency budget the batch that the table was made with.
        importance: what is harm, see `spectrim.budget.distortion.base`; the relative `SpectralEnergy` when omitted.
        latency: a `LatencyTable` of the model. Ranks above a layer's measured break-even rank then cost what the dense layer costs, so that
            a layer for which no rank is faster stays dense; give `merge` the same table.
        multiple: ranks are multiples of it, at least 1, or the rank that a weight has now. When omitted, the multiples of the table
            (8, less for small layers); 1 without a table.

    Returns:
        ``{name: rank}`` for `prune`.

    Raises:
        LayerError: when nothing is factorized, or for harms that are none, see `spectrim.budget.distortion.base.harms_of`.
        SettingError: when the budget is below the smallest network that ranks can reach (which is named), for a latency budget without
            a table or with inputs that it was not made with, or for a `multiple` below 1.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> low = factorize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), where=lambda name, module: True)
        >>> ranks = allocate(low, Budget(macs=0.5), torch.zeros(1, 8))
        >>> sum(16 * rank for rank in ranks.values()) <= 0.5 * 128
        True

    Source: energy as importance: Idelbayev and Carreira-Perpinan, CVPR 2020 (learned ranks); the knapsack is ours.
    """
    check("allocate", model=model, inputs=inputs, latency=latency, multiple=multiple)
    model = unwrapped(model)
    budget = as_budget(budget, "allocate")
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
        >>> from spectrim.surgery.factorize import factorize
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
