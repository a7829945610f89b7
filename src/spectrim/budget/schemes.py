"""`schemes_at`: the form of each convolution with which a network loses least at a budget."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spectrim import linalg
from spectrim.budget.budget import ABSOLUTE, FRACTIONS, Budget, BudgetError
from spectrim.budget.costs import UnitCost, calls
from spectrim.budget.knapsack import _knapsack, _limit
from spectrim.budget.ladder import Ladder, ladder
from spectrim.forms import FORMS, Form, Size
from spectrim.forms.derived import affordable, measure_cuts, measured_tail
from spectrim.layers import Site, sites
from spectrim.layers.alike import description
from spectrim.layers.geometry import stored
from spectrim.layers.uses import Call
from spectrim.linalg.fold import KERNELS, MATRICES, Fold
from spectrim.metrics.inputs import batch_size_of
from spectrim.surgery.refold import refold_

POINTS = 48
"""Sizes of each scheme that are compared, evenly spaced: the budget's own choice, among all, comes later."""

AMONG: dict[str, tuple[Fold, ...]] = {"auto": MATRICES, "all": MATRICES + KERNELS}
"""What is chosen from at a budget, by the scheme that was asked for."""

UNITS = ("macs", "params", "size")
"""Units in which a scheme has a price before anything is measured."""

_Prices = Sequence[tuple[int, dict[str, float]]]
"""Rungs, and what each costs in each unit."""


@dataclass(frozen=True)
class Choice:
    """One size of one scheme: what it costs in each unit, and the share of the weight's energy that it loses."""

    scheme: Fold
    costs: dict[str, float]
    lost: float


def schemes_at(
    model: nn.Module,
    budget: Budget,
    inputs: Any,
    prices: Ladder,
    *,
    among: Sequence[Fold] = MATRICES,
    used: Sequence[Call] | None = None,
    made: dict[tuple[str, Fold], Form] | None = None,
) -> dict[str, Fold]:
    """Choose the scheme of each convolution together with all ranks: the knapsack of `allocate` over every scheme and size at once.

    Distortion is the share of the spectral energy that is lost; prices are the formulas of the layers at the inputs that they meet. So a
    scheme is compared at the rank that the budget leaves the layer, not at one energy for all. Forms whose cuts are improved beyond their
    distortion (Tucker-2, CP, tensor trains) are cut at a few sizes to see what they lose; one whose cuts take too long for that
    (`spectrim.forms.derived.AFFORDABLE`) is left out.

    Args:
        model: factorized at full rank, in any schemes.
        budget: of multiply-accumulates, parameters or bytes.
        inputs: one batch of inputs.
        prices: the ladder of the model.
        among: the schemes to choose from.
        used: as for `ladder`.
        made: filled with the forms of kernels that were decomposed, by layer and scheme.

    Returns:
        By the names of layers that have several schemes and are cut; none for a budget of seconds, or one that cannot be met.

    Examples:
        >>> from spectrim.budget.ladder import ladder
        >>> from spectrim.surgery.factorize import factorize
        >>> low, x = factorize(nn.Sequential(nn.Conv2d(8, 8, 3)), scheme="channel"), torch.randn(1, 8, 9, 9)
        >>> list(schemes_at(low, Budget(macs=0.5), x, ladder(low, x)))
        ['0']
    """
    units = {name: (FRACTIONS | ABSOLUTE)[name] for name in budget.limits}
    if any(unit not in UNITS or unit in prices.missing for unit in units.values()) or all(len(_offered(site)) < 2 for site in sites(model)):
        return {}
    choices = _choices(model, inputs, prices, among, calls(model, inputs) if used is None else used, {} if made is None else made)
    tables = {
        unit: UnitCost(
            {name: [choice.costs[unit] for choice in found] for name, found in choices.items()},
            prices.unit(unit).dense,
            prices.unit(unit).fixed,
            prices.unit(unit).whole,
        )
        for unit in units.values()
    }
    places = {name: range(1, len(found) + 1) for name, found in choices.items()}
    losses = [torch.tensor([choice.lost for choice in found], dtype=torch.float64) for found in choices.values()]
    try:
        limits = [_limit(name, value, tables[units[name]], places) for name, value in budget.limits.items()]
        picked = _knapsack(losses, limits, 1.0)
    except BudgetError:  # `allocate` says why, on the schemes at hand
        return {}
    named = {site.name: site for site in sites(model)}
    taken = {name: found[place] for (name, found), place in zip(choices.items(), picked, strict=True)}
    return {named[name].layer_name: choice.scheme for name, choice in taken.items() if choice.lost > 0 and len(_offered(named[name])) > 1}


def at_budget(
    low: nn.Module,
    budget: Budget,
    inputs: Any,
    prices: Ladder,
    dense: nn.Module,
    used: Sequence[Call],
    *,
    among: Sequence[Fold] = MATRICES,
) -> tuple[nn.Module, Ladder]:
    """Give a factorized network the schemes of `schemes_at`, in place; return it and its ladder, the given one where nothing changed.

    Args:
        low: factorized at full rank.
        budget: what the network keeps.
        inputs: one batch of inputs.
        prices: its ladder.
        dense: the network before it.
        used: what `calls` returned for it; the inputs of its layers stay the same.
        among: the schemes to choose from.
    """
    made: dict[tuple[str, Fold], Form] = {}
    changed = refold_(low, schemes_at(low, budget, inputs, prices, among=among, used=used, made=made), dense, made)
    on: Any = {"crossbars": prices.crossbars, "dense_model": dense, "used": used, "before": prices}
    return low, ladder(low, inputs, check=True, own=True, **on) if changed else prices


def _choices(
    model: nn.Module, inputs: Any, prices: Ladder, among: Sequence[Fold], used: Sequence[Call], made: dict[tuple[str, Fold], Form]
) -> dict[str, list[Choice]]:
    """Return the choices of each factorized weight, tied ones once; the last one is the dense weight."""
    batch, shapes = batch_size_of(inputs, model=model, unknown=1), defaultdict[Any, list[Any]](list)
    for call in used:
        shapes[call.layer, call.weight].append(call.shape)
    users, found = Counter(site.factors for site in sites(model)), dict[str, list[Choice]]()
    alike: dict[Any, _Prices] = {}
    for site in sites(model):
        if site.name not in prices.weights:
            continue
        free = users[site.factors] == 1 and site.name not in prices.corrected
        offered = [fold for fold in _offered(site) if fold in among or fold == site.layer.scheme] if free else []
        found[site.name] = (
            [choice for fold in offered for choice in _priced(site, fold, shapes[site.layer, site.key], batch, alike, made)]
            if len(offered) > 1
            else _as_priced(site, prices)
        )
        found[site.name].append(Choice(site.layer.scheme, _dense_costs(site, prices), 0.0))
    return found


def _offered(site: Site) -> tuple[Fold, ...]:
    layer: Any = site.layer
    return tuple(layer.schemes(layer))


def _dense_costs(site: Site, prices: Ladder) -> dict[str, float]:
    cost, item = prices.weights[site.name], site.factors.dtype.itemsize
    return {"macs": cost.dense_macs, "params": float(cost.dense_params), "size": float(cost.dense_params * item)}


def _as_priced(site: Site, prices: Ladder) -> list[Choice]:
    """Return the sizes of the form at hand, as the ladder prices them."""
    tail, cost, item = site.factors.tail(), prices.weights[site.name], site.factors.dtype.itemsize
    shares = (tail / tail[0].clamp(min=1e-300)).tolist()
    return [
        Choice(
            site.layer.scheme,
            {"macs": cost.macs[rung - 1], "params": float(cost.params[rung - 1]), "size": float(cost.params[rung - 1] * item)},
            shares[rung],
        )
        for rung in _thinned(site.factors.rank)
    ]


def _priced(
    site: Site, fold: Fold, shapes: Iterable[Any], batch: int, alike: dict[Any, _Prices], made: dict[tuple[str, Fold], Form]
) -> list[Choice]:
    """Return the sizes of one scheme that cost less than the dense weight in every unit."""
    (tail, sizes), own, shapes = _distortions(site, fold, made), description(site), tuple(shapes)
    key = None if own is None else (own, fold, shapes, tuple(sizes))
    if key is None or key not in alike:
        alike[key] = _prices(site, fold, sizes, shapes, batch)
    shares = (tail / tail[0].clamp(min=1e-300)).tolist()
    return [Choice(fold, costs, shares[rung]) for rung, costs in alike[key]]


def _prices(site: Site, fold: Fold, sizes: Sequence[Size], shapes: Iterable[Any], batch: int) -> _Prices:
    """Return the rungs of one scheme that cost less than the dense weight, and what they cost."""
    layer, shapes, blocks, made = site.layer, (None, *shapes), site.factors.blocks, []
    dense, item = layer.work(layer, site.key, fold, None, None), site.factors.dtype.itemsize
    short = layer.writing == "interpolative" and layer.interpolated_kind(layer, fold) is not None
    for rung in _thinned(len(sizes)):
        size, params = sizes[rung - 1], stored(layer, fold, sizes[rung - 1])
        if short and isinstance(size, int):
            single, *each = (layer.interpolated_work(layer, fold, size, shape) for shape in shapes)
            params -= blocks * size**2
        else:
            single, *each = (layer.work(layer, site.key, fold, size, shape) for shape in shapes)
        if single < dense:  # else `merge` writes the dense one
            made.append((rung, {"macs": sum(each) / batch, "params": float(params), "size": float(params * item)}))
    return made


def _distortions(site: Site, fold: Fold, made: dict[tuple[str, Fold], Form]) -> tuple[Tensor, Sequence[Size]]:
    """Return the energy lost at each rung of a scheme, and the sizes; none of a form whose cuts take too long."""
    held, layer = site.factors, site.layer
    if fold == layer.scheme:
        measure_cuts(held)
        return measured_tail(held, held.tail()), [held.size_of(rung) for rung in range(1, held.rank + 1)]
    folded = layer.fold(layer, site.key, layer.dense_weight(site.key).detach(), fold)
    if fold in MATRICES:
        tail = linalg.tail_energy(linalg.pooled_spectrum(linalg.spectrum(folded)))
        return tail, range(1, len(tail))
    form = FORMS[fold].of(layer.dense_weight(site.key).detach(), folded, name=site.name)
    if not affordable(form):
        return form.tail(), ()
    measure_cuts(form)
    made[site.layer_name, fold] = form
    return measured_tail(form, form.tail()), form.path()


def _thinned(rungs: int) -> list[int]:
    """Return at most `POINTS` rungs, the first and the last among them."""
    return sorted({round(rung) for rung in np.linspace(1, rungs, min(POINTS, rungs)).tolist()})
