"""`allocate`: ranks for the whole network under one budget."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spectrim.budget.budget import ABSOLUTE, CODED, FRACTIONS, Budget, as_budget
from spectrim.budget.costs import UnitCost
from spectrim.budget.distortion.base import distortions_of
from spectrim.budget.distortion.energy import SpectralEnergy
from spectrim.budget.knapsack import _knapsack, _Limit, _limit
from spectrim.budget.ladder import Ladder, ladder
from spectrim.checks import check, unwrapped
from spectrim.errors import LayerError
from spectrim.forms.constrained import kind_of_form
from spectrim.forms.form import Form, Size
from spectrim.layers import named_factors
from spectrim.protocols import Importance, Latencies
from spectrim.runtimes.crossbar import Crossbars


def allocate(
    model: nn.Module,
    budget: Budget | float | Mapping[str, Any],
    inputs: Any,
    *,
    importance: Importance | None = None,
    latency: Latencies | None = None,
    crossbars: Crossbars | None = None,
    multiple: int | None = None,
    prices: Ladder | None = None,
) -> dict[str, Size]:
    """Return the rank of each factorized weight that adds the least distortion within a budget.

    The multiple-choice knapsack ``min sum_l distortion_l(r_l)`` subject to ``sum_l cost_l(r_l) <= budget - fixed`` for each limit of the
    budget, solved exactly by dynamic programming where one limit is counted in units that are large enough (most budgets of
    multiply-accumulates), else by mixed-integer programming to a relative gap of 1e-4 (or to the best found in a minute). Costs are those
    of the network that `merge` will write, see `ladder`: multiply-accumulates, parameters and bytes are met by count. Seconds are the
    table's for the weights that it timed; the rest of the network takes what the dense one takes beyond them.

    Args:
        model: factorized, at any rank.
        budget: what the network keeps of the dense one: a `Budget`, a fraction of the multiply-accumulates, or a dict of `Budget`'s fields.
            ``coded_bytes`` chooses bits, or counts, of weights that `spectrim.surgery.constrain.constrain` has made `Rounded` or
            `Sparse`, by their entropy; `spectrim.budget.rounding.round_to.round_to` chooses ranks with them, and needs no forms.
        inputs: one batch of inputs, for the layers' sizes; for a latency budget the batch that the table was made with.
        importance: measures distortion, see `spectrim.budget.distortion.base`; the relative `SpectralEnergy` when omitted.
        latency: a `LatencyTable` of the model. Ranks above a layer's measured break-even rank then cost what the dense layer costs, so that
            a layer for which no rank is faster stays dense; give `merge` the same table.
        crossbars: `spectrim.runtimes.crossbar.Crossbars`, for a budget of tiles. A rank is then the largest of those that take as many
            tiles: one that saves none is no rung.
        multiple: ranks are multiples of it, at least 1, or the rank that a weight has now. When omitted, the multiples of the table
            (8, less for small layers); 1 without a table.
        prices: the `ladder` of this model, with the table that `latency` and the crossbars that `crossbars` would be; then nothing is run
            or counted, and `inputs` may be None.

    Returns:
        ``{name: rank}`` for `prune`; of a Tucker form the ranks of outputs and inputs.

    Raises:
        LayerError: when nothing is factorized, or for invalid distortions, see
            `spectrim.budget.distortion.base.distortions_of`.
        SettingError: when the budget is below the smallest network that ranks can reach (which is named), for a latency budget without
            a table or with inputs that it was not made with, for a budget of tiles without crossbars, or for a `multiple` below 1.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> low = factorize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), where=lambda name, module: True)
        >>> ranks = allocate(low, Budget(macs=0.5), torch.zeros(1, 8))
        >>> sum(16 * rank for rank in ranks.values()) <= 0.5 * 128
        True

    Source: energy as importance: Idelbayev and Carreira-Perpinan, CVPR 2020 (learned ranks); the knapsack is ours.
    """
    check("allocate", model=model, inputs=inputs, latency=latency, crossbars=crossbars, multiple=multiple)
    model = unwrapped(model)
    budget = as_budget(budget, "allocate", coded=any(kind_of_form(form) for _, form in named_factors(model)))
    if next(named_factors(model), None) is None:
        raise LayerError(type(model).__name__, "has no factorized layer", hint="call factorize(model) first")
    prices = _prices(model, inputs, latency, crossbars, prices)
    held = dict(named_factors(model))
    limits_of(budget, prices, choices_of(held, budget, prices, multiple))  # what no ranks reach is refused before any decomposition
    return allocated(held, budget, prices, distortions_of(model, importance or SpectralEnergy()), multiple)


def allocated(
    held: Mapping[str, Form], budget: Budget, prices: Ladder, distortions: Mapping[str, Tensor], multiple: int | None
) -> dict[str, Size]:
    """Solve the knapsack of `allocate`, from what is computed already.

    Args:
        held: the factors of each weight.
        budget: what the network keeps.
        prices: its ladder.
        distortions: of each weight, checked.
        multiple: as for `allocate`.
    """
    choices = choices_of(held, budget, prices, multiple)
    limits = limits_of(budget, prices, choices)
    typical = float(torch.stack([entry[0] for entry in distortions.values()]).mean())
    picked = _knapsack([distortions[name][ranks] for name, ranks in choices.items()], limits, typical)
    return {name: held[name].size_of(ranks[index]) for (name, ranks), index in zip(choices.items(), picked, strict=True)}


def check_floor(model: nn.Module, budget: Budget, prices: Ladder) -> None:
    """Raise a SettingError when a limit is below the smallest network that ranks can reach; no importance is needed for that.

    Args:
        model: factorized.
        budget: what the network keeps of the dense one.
        prices: its ladder.
    """
    limits_of(budget, prices, choices_of(dict(named_factors(model)), budget, prices, None))


def choices_of(held: Mapping[str, Form], budget: Budget, prices: Ladder, multiple: int | None) -> dict[str, list[int]]:
    """Return the rungs to choose from for each weight: those that cost less than the next one in a limited unit, and the present one."""
    tables = [unit.weights for _, _, unit in asked(budget, prices)]
    choices, alike = {}, dict[Any, list[int]]()
    for name, factors in held.items():
        step, rank = multiple or (prices.latency.multiple(name) if prices.latency else 1), factors.rank
        key = (step, rank, *(id(table[name]) for table in tables))  # weights of the same costs share one tuple of them
        if key not in alike:
            ranks = np.arange(step, rank, step)
            costs = [np.asarray(table[name], dtype=float) for table in tables]
            cheaper = np.any([cost[ranks - 1] < cost[-1] for cost in costs], axis=0)
            ranks = np.append(ranks[cheaper], rank)  # what costs as much as the present rank is worse than that
            saves = np.any([cost[ranks[:-1] - 1] < cost[ranks[1:] - 1] for cost in costs], axis=0)
            alike[key] = ranks[np.append(saves, True)].tolist()  # and a rank below the one that is left, too
        choices[name] = alike[key]
    return choices


def limits_of(budget: Budget, prices: Ladder, choices: Mapping[str, Sequence[int]]) -> list[_Limit]:
    """Return what the factorized weights may cost together, for each limit of a budget."""
    return [_limit(name, value, unit, choices) for name, value, unit in asked(budget, prices)]


def asked(budget: Budget, prices: Ladder) -> list[tuple[str, float | int, UnitCost]]:
    """Return the limits of a budget that rungs decide: field, value and costs; coded bytes where weights are held pruned or rounded."""
    found = [(name, value, prices.unit((FRACTIONS | ABSOLUTE)[name])) for name, value in budget.limits.items()]
    if budget.coded_bytes is not None:
        unit = prices.unit("coded")
        found.append((CODED, budget.coded_bytes if budget.coded_bytes >= 1 else budget.coded_bytes * unit.whole, unit))
    return found


def _prices(model: nn.Module, inputs: Any, latency: Latencies | None, crossbars: Crossbars | None, prices: Ladder | None) -> Ladder:
    """Return the ladder given, checked, or make it."""
    if prices is None:
        return ladder(model, inputs, latency, crossbars=crossbars)
    prices.check(model)
    return prices


def as_fractions(
    budget: Budget,
    model: nn.Module,
    inputs: Any,
    *,
    latency: Latencies | None = None,
    crossbars: Crossbars | None = None,
    prices: Ladder | None = None,
) -> Budget:
    """Return a budget in which bytes, seconds and tiles are fractions of the dense network, for schedules that approach it step by step.

    Args:
        budget: in any units; one that has fractions only comes back as it is. Of a cost that is limited twice, the lower limit stays.
        model: factorized, at any rank.
        inputs: as for `allocate`.
        latency: as for `allocate`.
        crossbars: as for `allocate`.
        prices: as for `allocate`.

    Raises:
        SettingError: as `allocate` for a latency budget, and one of tiles.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> low = factorize(nn.Linear(10, 4, bias=False))  # 160 bytes dense
        >>> as_fractions(Budget(macs=0.9, size_bytes=120), low, torch.zeros(1, 10))
        Budget(macs=0.9, size=0.75)
    """
    given = {name: value for name, value in budget.limits.items() if name in ABSOLUTE}
    if not given:
        return budget
    prices = _prices(model, inputs, latency, crossbars, prices)
    kept = {ABSOLUTE[name]: min(1.0, value / prices.unit(ABSOLUTE[name]).whole) for name, value in given.items()}
    for name, fraction in kept.items():
        kept[name] = min(fraction, budget.limits.get(name, 1.0))
    return replace(budget, **kept, **dict.fromkeys(given))
