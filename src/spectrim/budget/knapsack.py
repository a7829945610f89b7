"""The multiple-choice knapsack: by its relaxation where that is close enough, by dynamic programming, else mixed-integer programming."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectrim.budget.budget import ABSOLUTE, CODED, FRACTIONS, UNITS, BudgetError, FloorError
from spectrim.budget.costs import UnitCost
from spectrim.files import printing_to_stderr


def _limit(name: str, value: float | int, cost: UnitCost, choices: Mapping[str, Sequence[int]]) -> "_Limit":
    """Return what the factorized weights may cost together.

    Args:
        name: the field of the budget.
        value: of that field.
        cost: of what it limits.
        choices: the ranks to choose from, by weight.
    """
    alike: dict[tuple[int, int], tuple[NDArray[np.float64], float]] = {}  # weights of the same costs and choices share both
    for weight, ranks in choices.items():
        if (key := (id(cost.weights[weight]), id(ranks))) not in alike:
            table = np.asarray([cost.weights[weight][rank - 1] for rank in ranks], dtype=float)
            alike[key] = table, float(table.min())
    tables, cheapest = zip(*(alike[id(cost.weights[weight]), id(ranks)] for weight, ranks in choices.items()), strict=True)
    least = cost.fixed + sum(cheapest)
    most = value * cost.whole if name in FRACTIONS else value
    counted = name == CODED or (FRACTIONS | ABSOLUTE)[name] != "latency"
    most = math.floor(most + 1e-9) if counted else most
    if most < least:
        if name in FRACTIONS:
            smallest = f"{math.ceil(least / cost.whole * 1e4) / 1e4:.4f}"
        else:
            smallest = f"{math.ceil(least)} {UNITS[name]}" if counted else f"{math.ceil(least * 1e7) / 1e7:.7f} seconds"
        hint = _floor(cost, dict(zip(choices, cheapest, strict=True)), least)
        raise FloorError(name, got=value, rule=f"at least {smallest} for this network", hint=hint)
    unit = 1.0 if counted else 1e9  # nanoseconds: what the solver lets through must be nothing
    row = np.concatenate(tables)
    return _Limit(name, row * unit, (most - cost.fixed) * unit, cost.whole * unit, f"{name}={value:g}")


def _floor(cost: UnitCost, cheapest: Mapping[str, float], least: float) -> str:
    """Say which parts of the network set the smallest cost that it can have."""
    largest = sorted(cheapest, key=lambda weight: -cheapest[weight])[:3]
    parts = [f"{100 * cost.fixed / least:.0f} % of that stay dense"] if cost.fixed > 0 else []
    parts += [f"'{weight}' has {100 * cheapest[weight] / least:.0f} %" for weight in largest]
    return f"every factorized weight is at its cheapest rank then; {', '.join(parts)}; factorize more layers to go below"


@dataclass(frozen=True)
class _Limit:
    """One row of the knapsack: the cost of every choice, what they may sum to, and the dense network's cost as a scale."""

    name: str
    row: NDArray[np.float64]
    most: float
    scale: float
    said: str = ""


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
        scale, most = lost, 2.0  # again, in the unit of the total loss; a choice with a larger loss is not in the optimum


STATES = 2**28
"""Choices times units of cost up to which the knapsack is solved by dynamic programming: a second or two."""


FEW_STATES = 2**22
"""Choices times units of cost up to which that is done first: a few hundredths of a second."""


GAP = 1e-4
"""Relative loss by which a solution may exceed the bound of its relaxation."""


CORE = 24
"""Weights that are solved exactly after the relaxation of all."""


AROUND = 32
"""Choices of each of them: those that cost nearly what the relaxation chose."""


RESOLVED = 1e-2
"""Loss, in the unit that the solver sees, above which its absolute gap of 1e-6 is no wider than its relative one of 1e-4."""


def _solve(objective: NDArray[np.float64], starts: NDArray[np.int64], limits: Sequence[_Limit]) -> list[int]:
    """Return the place of the choice for each weight, whose choices are those from its start to the next."""
    if len(limits) == 1:
        for solve in (partial(_by_dynamic_programming, states=FEW_STATES), _by_relaxation, _by_dynamic_programming):
            if (found := solve(objective, starts, limits[0])) is not None:
                return found
    return _by_integer_programming(objective, starts, limits)


def _by_integer_programming(objective: NDArray[np.float64], starts: NDArray[np.int64], limits: Sequence[_Limit]) -> list[int]:
    """Return the optimum within the solver's relative gap, for any number of limits."""
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
                options={"mip_rel_gap": GAP, "time_limit": 60},
            )
        if solution.x is None:
            break
        picked = [int(np.argmax(solution.x[start:end])) for start, end in itertools.pairwise(starts)]
        excess = [float(limit.row[starts[:-1] + picked].sum() - limit.most) for limit in limits]
        if max(excess) <= 1e-6:
            return picked
        # the solver's tolerance lets through about a millionth more than the limit: ask for as much less
        slack = [less + max(over, 0.0) for less, over in zip(slack, excess, strict=True)]
    together = " and ".join(limit.said or limit.name for limit in limits)
    if solution.status == 2:
        raise BudgetError(f"no ranks satisfy {together} together; relax one of them")
    raise BudgetError(f"no ranks for {together} were found in a minute; multiple=4 leaves fewer ranks to choose from")


def _by_relaxation(objective: NDArray[np.float64], starts: NDArray[np.int64], limit: _Limit) -> list[int] | None:
    """Return a solution within `GAP` of the optimum, from the linear relaxation; None where it is not shown to be that close.

    The relaxation takes steps along the lower convex hull of each weight's choices, the steepest first, and a part of the step that no
    longer fits. The weights whose steps are about as steep as that one, the core, are then solved exactly for what is left of the limit.

    Source: Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), sections 11.2 and 11.4.
    """
    pairs = [(limit.row[start:end], objective[start:end]) for start, end in itertools.pairwise(starts)]
    hulls = [_lower_hull(costs, losses) for costs, losses in pairs]
    picked = [hull[0] for hull in hulls]
    room = limit.most - sum(float(costs[place]) for (costs, _), place in zip(pairs, picked, strict=True))
    bound = sum(float(losses[place]) for (_, losses), place in zip(pairs, picked, strict=True))
    if room < 0:
        return None
    if (np.mod(limit.row, 1) == 0).all() and limit.row.max() < 2**53:  # what is left of the last unit buys nothing
        unit = np.gcd.reduce(np.concatenate([costs - costs.min() for costs, _ in pairs]).astype(np.int64))
        room = float(room // unit * unit) if unit else 0.0
    steps = sorted(
        ((losses[new] - losses[old]) / (costs[new] - costs[old]), weight, new)
        for weight, ((costs, losses), hull) in enumerate(zip(pairs, hulls, strict=True))
        for old, new in itertools.pairwise(hull)
    )
    taken = len(steps)
    for at, (slope, weight, new) in enumerate(steps):
        costs, losses = pairs[weight]
        extra = float(costs[new] - costs[picked[weight]])
        if extra > room:
            bound, taken = bound + float(slope) * room, at
            break
        bound, room = bound + float(losses[new] - losses[picked[weight]]), room - extra
        picked[weight] = new
    if core := _core(steps, taken, [costs for costs, _ in pairs]):
        left = room + sum(float(pairs[weight][0][picked[weight]]) for weight in core)
        around = [np.argsort(np.abs(pairs[weight][0] - pairs[weight][0][picked[weight]]), kind="stable")[:AROUND] for weight in core]
        row, losses = (np.concatenate([pairs[w][part][near] for w, near in zip(core, around, strict=True)]) for part in (0, 1))
        own = np.cumsum([0, *map(len, around)])
        found = _by_integer_programming(losses, own, [replace(limit, row=row, most=left)])
        for weight, near, place in zip(core, around, found, strict=True):
            picked[weight] = int(near[place])
    lost = sum(float(losses[place]) for (_, losses), place in zip(pairs, picked, strict=True))
    return picked if lost - bound <= GAP * abs(lost) else None


def _core(steps: Sequence[tuple[float, int, int]], taken: int, costs: Sequence[NDArray[np.float64]]) -> list[int]:
    """Return weights with steps about as steep as the first that was not taken, of as many different prices as there are."""
    core, alike = dict[int, None](), Counter[float]()
    for at in sorted(range(len(steps)), key=lambda at: abs(at - taken)) if taken < len(steps) else ():
        _, weight, new = steps[at]
        price = float(costs[weight][new] - costs[weight].min()) / (new + 1)
        if weight not in core and alike[price] < CORE // 4:
            core[weight] = None
            alike[price] += 1
        if len(core) == CORE:
            break
    return list(core)


def _lower_hull(costs: NDArray[np.float64], losses: NDArray[np.float64]) -> list[int]:
    """Return the places of the choices on the lower convex hull, by rising cost and falling loss."""
    hull: list[int] = []
    for place in np.lexsort((losses, costs)).tolist():
        if hull and losses[place] >= losses[hull[-1]]:
            continue
        while len(hull) > 1:
            before, last = hull[-2], hull[-1]
            gained = (losses[before] - losses[last]) * (costs[place] - costs[before])
            if gained > (losses[before] - losses[place]) * (costs[last] - costs[before]):
                break
            hull.pop()
        hull.append(place)
    return hull


def _by_dynamic_programming(
    objective: NDArray[np.float64], starts: NDArray[np.int64], limit: _Limit, states: int | None = None
) -> list[int] | None:
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
    if (room + 1) * len(objective) > (STATES if states is None else states):
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
