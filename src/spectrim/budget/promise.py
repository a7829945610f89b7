"""Checks of a budget: the merged network is counted on the actual inputs."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from spectrim.budget.budget import ABSOLUTE, FRACTIONS, Budget, BudgetError
from spectrim.budget.costs import UnitCost
from spectrim.budget.ladder import Ladder
from spectrim.budget.plan_rows import Totals
from spectrim.errors import SpectrimError
from spectrim.forms.form import Form, Size
from spectrim.metrics.macs import count_macs
from spectrim.metrics.measurement import measure
from spectrim.surgery.merge import merge


def cut_totals(held: Mapping[str, Form], ranks: Mapping[str, Size], prices: Ladder) -> Totals:
    """Return what the merged network costs by its ladder.

    Args:
        held: the weights before the cut, which know the rung of a size.
        ranks: the size of each weight.
        prices: the ladder of the network before the cut.
    """
    rungs = {name: held[name].rung_of(size) for name, size in ranks.items()}
    counts = {
        name: unit.fixed + sum(unit.weights[weight][rung - 1] for weight, rung in rungs.items())
        for name, unit in prices.units.items()
        if name != "latency"
    }
    if "macs" not in counts:
        raise prices.missing["macs"]
    whole = {name: round(counts[name]) for name in ("tiles", "tile_reads") if name in counts}
    return Totals(round(counts["macs"]), round(counts["params"]), round(counts["size"]), **whole)


def whole_and_fixed(units: Mapping[str, UnitCost]) -> tuple[Totals, Totals]:
    """Return the totals of the dense network, and of the part of it that no rank changes.

    Args:
        units: of its ladder.
    """
    fields = {"macs": "macs", "params": "params", "size": "size_bytes", "tiles": "tiles", "tile_reads": "tile_reads"}
    counts = {part: {fields[name]: round(getattr(units[name], part)) for name in fields if name in units} for part in ("whole", "fixed")}
    if "latency" in units:
        counts = {part: {**found, "latency_s": getattr(units["latency"], part)} for part, found in counts.items()}
    return Totals(**counts["whole"]), Totals(**counts["fixed"])


def recounted(owner: str, budget: Budget, model: nn.Module, inputs: Any, prices: Ladder) -> Totals:
    """Merge a cut network and count it; raise a BudgetError where it is over a limit.

    Args:
        owner: what an error names.
        budget: that it was cut to.
        model: cut.
        inputs: one batch.
        prices: the ladder of the network before the cut.
    """
    merged = merge(model, latency=prices.latency)
    return counted(owner, budget, merged, count_macs(merged, inputs), prices, inputs)


def counted(owner: str, budget: Budget, merged: nn.Module, macs: int | None, prices: Ladder, inputs: Any = None) -> Totals:
    """Return what a merged network costs by count; raise a BudgetError where it is over a limit.

    Args:
        owner: what an error names.
        budget: that it was cut to.
        merged: the network.
        macs: its multiply-accumulates for one example, counted; None where they cannot be.
        prices: the ladder of the network before the cut.
        inputs: one batch, for reads of tiles.
    """
    found = measure(merged, latency=False)
    counts: dict[str, float | None] = {"macs": macs, "params": found.params, "size": found.size_bytes}
    on_tiles: dict[str, int | None] = {}
    if prices.crossbars is not None:
        price = prices.crossbars.price(merged, inputs)
        on_tiles = {"tiles": price.tiles, "tile_reads": price.reads}
    for name, value in budget.limits.items():
        unit = (FRACTIONS | ABSOLUTE)[name]
        count = (counts | on_tiles).get(unit)
        if count is None:
            continue
        most = value * prices.unit(unit).whole if name in FRACTIONS else value
        if count > math.floor(most + 1e-9):
            suspects = ", ".join(f"'{weight}'" for weight in list(prices.corrected)[:5])
            problem = f"{name}={value:g} allows {most:,.0f}, and the merged network has {count:,}"
            if not prices.corrected:  # what routing, lengths or detections add
                why = "no layer of it costs more than was reckoned, so what it costs seems to depend on the values that it computes"
                raise BudgetError(f"{problem}; {why}: ask for {name}={value * most / count * 0.999:.3g}")
            raise BudgetError(f"{problem}; {owner} found layers that cost more than two calls: {suspects}; leave them out with where=")
    if macs is None:
        raise SpectrimError(f"{owner}: the multiply-accumulates of the merged network cannot be counted")
    return Totals(macs, found.params, found.size_bytes, **on_tiles)
