"""One knapsack over rank, zeros and step of every weight, under limits of coded bytes, bytes, parameters and multiply-accumulates."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from spectrim.budget.budget import ABSOLUTE, FRACTIONS, Budget, BudgetError
from spectrim.budget.knapsack import _knapsack, _Limit
from spectrim.budget.rounding.curves import Curve, Rounding, curve_of
from spectrim.budget.rounding.pairs import Option
from spectrim.budget.rounding.weights import Weight
from spectrim.layers.uses import first_argument
from spectrim.metrics.calls import watched
from spectrim.metrics.macs import count_macs
from spectrim.metrics.measurement import size_bytes_of

KEEPS = (0.6, 0.4, 0.25, 0.15, 0.08)
"""Shares of the entries that are kept, beside all of them."""

PRICES = 28
"""Prices of a bit at which the steps of the two weights of a pair are looked at."""


@dataclass(frozen=True)
class Costs:
    """What weights cost beside bits: of one option of each weight, and of the whole dense network.

    Attributes:
        works: multiply-accumulates of one example, by weight and rank (None for the weight as it is).
        whole: of the dense network, by unit.
    """

    works: Mapping[tuple[str, int | None], float]
    whole: Mapping[str, float]


def sparse_options(rounding: Rounding) -> list[Option]:
    """Return the weight with zeros forced to be at least as many as each of `KEEPS` says, the others on steps.

    Args:
        rounding: of the weight.
    """
    return [Option(None, [curve_of(replace(rounding, kept=share).rough, rounding.size)], keep=share) for share in KEEPS]


def costs_of(dense: nn.Module, weights: Mapping[str, Weight], options: Mapping[str, Sequence[Option]], batch: Any, size: int) -> Costs:
    """Return what each option costs, from the shapes that the layers meet.

    Args:
        dense: the network.
        weights: of its layers.
        options: of the weights that have several.
        batch: inputs.
        size: examples in it.
    """
    shapes: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    names = {weight.layer: name for name, weight in weights.items()}

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes[names[module]].append(tuple(first_argument(args, kwargs).shape))

    watched(dense, batch, list(names), called)
    works = {}
    for name, found in options.items():
        geometry = weights[name].geometry
        for rank in {option.rank for option in found}:
            works[name, rank] = sum(geometry.work(geometry, "weight", "channel", rank, shape) for shape in shapes[name]) / size
    params = sum(parameter.numel() for parameter in dense.parameters())
    whole = {"macs": float(count_macs(dense, batch, batch_size=size)), "params": float(params), "size": float(size_bytes_of(dense))}
    return Costs(works, whole)


def chosen(
    options: Mapping[str, Sequence[Option]], rest: Mapping[str, Curve], bits: float, budget: Budget | None, costs: Costs | None
) -> dict[str, Option]:
    """Return the option of each weight of the least distortion within all limits, solved with the steps of all weights at once.

    Args:
        options: of the weights that have several ways to be held.
        rest: curves of the other weights, which take part by their steps.
        bits: that all weights may take, by the entropy of their levels.
        budget: further limits; None for none.
        costs: for those.

    Raises:
        BudgetError: when nothing fits the limits together.
    """
    ways = {name: [(option, *point) for option in found for point in _points(option)] for name, found in options.items()}
    ways |= {name: [(Option(None, [curve]), b, d) for b, d in _steps(curve)] for name, curve in rest.items()}
    losses = [torch.tensor([way[2] for way in held], dtype=torch.float64) for held in ways.values()]
    limits = [_limit("coded_bytes", np.concatenate([[way[1] for way in held] for held in ways.values()]), bits)]
    for field, value in budget.limits.items() if budget is not None and costs is not None else ():
        assert costs is not None
        unit = (FRACTIONS | ABSOLUTE)[field]
        price = _prices(unit, options, costs)
        row = np.concatenate([[price.get((name, way[0].rank), 0.0) for way in held] for name, held in ways.items()])
        fixed = costs.whole[unit] - sum(price[name, None] for name in options)
        limits.append(_limit(f"{field}={value:g}", row, (value * costs.whole[unit] if field in FRACTIONS else value) - fixed))
    typical = float(torch.stack([loss.max() for loss in losses]).mean())
    picked = _knapsack(losses, limits, typical)
    return {name: held[place][0] for (name, held), place in zip(ways.items(), picked, strict=True) if name in options}


def _prices(unit: str, options: Mapping[str, Sequence[Option]], costs: Costs) -> dict[tuple[str, int | None], float]:
    """Return what the options of each weight cost in one unit, by weight and rank."""
    if unit == "macs":
        return dict(costs.works)
    item = 1 if unit == "params" else 4
    numbers = {(name, option.rank): option.numbers for name, found in options.items() for option in found}
    return {key: float(count * item) for key, count in numbers.items()}


def _limit(said: str, row: np.ndarray, most: float) -> _Limit:
    if most <= 0:
        raise BudgetError(f"no ranks satisfy {said}: the weights that are not chosen from cost more")
    return _Limit(said, row, most, max(most, 1e-12), said)


def _steps(curve: Curve) -> list[tuple[float, float]]:
    """Return bits and distortion of the steps that no other step beats in both."""
    return _undominated(list(zip(curve.bits, curve.distortions, strict=True)))


def _points(option: Option) -> list[tuple[float, float]]:
    """Return bits and distortion of an option; of a pair at the steps that one price of a bit gives both."""
    if len(option.curves) == 1:
        return [(bits, option.lost + distortion) for bits, distortion in _steps(option.curves[0])]
    slopes = [abs(np.diff(curve.distortions) / np.minimum(np.diff(curve.bits), -1e-9)) for curve in option.curves]
    found = np.concatenate(slopes)
    found = found[found > 0]
    prices = np.geomspace(found.min() / 2, found.max() * 2, PRICES) if len(found) else np.ones(1)
    return _undominated([(option.bits(price), option.distortion(price)) for price in prices])


def _undominated(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    kept: list[tuple[float, float]] = []
    for bits, distortion in sorted(set(points)):
        if not kept or distortion < kept[-1][1]:
            kept.append((bits, distortion))
    return kept
