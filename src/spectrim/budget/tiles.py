"""Tiles and their reads as units: what each weight takes on crossbars at every rank, as `merge` writes it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

from torch import Tensor, nn

from spectrim.budget.costs import UnitCost
from spectrim.budget.stand_ins import true_values
from spectrim.errors import LayerError
from spectrim.layers import Site, named_factors, sites
from spectrim.runtimes.crossbar import Crossbars
from spectrim.runtimes.crossbar.layers import base_of, mapped_layers
from spectrim.runtimes.crossbar.prices import places_of

Shape = tuple[int, int]
"""Outputs and inputs of one matrix on crossbars."""


def tile_units(
    model: nn.Module,
    pairs: nn.Module,
    whole: nn.Module,
    inputs: Any,
    crossbars: Crossbars,
    limits: Mapping[str, int],
    *,
    stand_in: bool,
) -> dict[str, UnitCost]:
    """Return the prices in tiles, and in reads of tiles for one example.

    Args:
        model: factorized.
        pairs: the network that `merge` writes of it at rank 1, with the dense values of all other layers.
        whole: the dense network.
        inputs: one batch.
        crossbars: what is counted on.
        limits: the break-even rank of each weight.
        stand_in: whether the values of `whole` are not the dense network's, so that its sizes alone count.

    Raises:
        LayerError: where a layer is not mapped, see `mapped_layers`; or is written in another way than pairs.
    """
    mapped_layers(whole)
    mapped_layers(pairs)
    for site in sites(model):
        if site.layer.writing != "pair":
            problem = f"is written {site.layer.writing}: what that takes on crossbars is not known"
            raise LayerError(site.name, problem, hint="writing='pair'")
    with true_values(pairs, model):
        split = _by_name(pairs, places_of(pairs, inputs))
    with true_values(whole, model) if stand_in else nullcontext():
        dense = _by_name(whole, places_of(whole, inputs))
    counted, own = _Tiles(crossbars, limits, split, dense), [site.layer_name for site in sites(model)]
    found: dict[str, dict[str, list[tuple[float, ...]]]] = {"tiles": defaultdict(list), "tile_reads": defaultdict(list)}
    full: dict[str, float] = dict.fromkeys(found, 0.0)
    names = {factors: name for name, factors in named_factors(model)}
    for site in sites(model):
        for unit, (table, most) in counted.site(site, cast(Tensor, whole.get_submodule(site.layer_name).weight)).items():
            found[unit][names[site.factors]].append(table)
            full[unit] += most
    rest = counted.network(pairs, split, but=own)
    everything = {unit: rest[unit] + full[unit] for unit in found} if stand_in else counted.network(whole, dense)
    return {
        unit: UnitCost(
            {name: tuple(map(sum, zip(*tables, strict=True))) for name, tables in by_name.items()}, full[unit], rest[unit], everything[unit]
        )
        for unit, by_name in found.items()
    }


def _by_name(network: nn.Module, places: Mapping[nn.Module, float]) -> dict[str, float]:
    """Return the places of each mapped layer, by its name."""
    return {name: places[module] for name, module in network.named_modules() if module in places}


class _Tiles:
    """Counts tiles and reads of matrices."""

    def __init__(self, crossbars: Crossbars, limits: Mapping[str, int], split: Mapping[str, float], dense: Mapping[str, float]) -> None:
        self.crossbars, self.limits, self.split, self.dense = crossbars, limits, split, dense

    def network(self, network: nn.Module, places: Mapping[str, float], but: Sequence[str] = ()) -> dict[str, float]:
        """Return what the layers of a network take that are not among those of some names, by their values."""
        total = {"tiles": 0.0, "tile_reads": 0.0}
        layers = {module: name for name, module in network.named_modules()}
        for module in mapped_layers(network):
            name = layers[module]
            if not any(name == one or name.startswith(f"{one}." if one else "") for one in but):
                tiles = self.crossbars.arrays * self.crossbars.mapping.tiles(cast(Tensor, module.weight).detach().flatten(1))
                total["tiles"] += tiles
                total["tile_reads"] += tiles * places.get(name, 0.0)
        return total

    def site(self, site: Site, weight: Tensor) -> dict[str, tuple[tuple[float, ...], float]]:
        """Return for each unit what a weight takes at every rank, and dense."""
        held = range(1, site.factors.rank + 1)
        dense = self._priced({site.layer_name: (len(weight), weight[0].numel())}, self.dense)
        tables = [self._priced(shapes, self.split) for shapes in _written(site, min(self.limits[site.name], site.factors.rank))]
        rungs = [tables[rank - 1] if rank <= len(tables) else dense for rank in held]
        return {unit: (tuple(rung[unit] for rung in rungs), dense[unit]) for unit in dense}

    def _priced(self, shapes: Mapping[str, Shape], places: Mapping[str, float]) -> dict[str, float]:
        """Return what matrices take; a layer that is not mapped has no places and takes nothing."""
        tiles = {name: self.crossbars.arrays * self.crossbars.mapping.tiles_of(*shape) for name, shape in shapes.items() if name in places}
        return {"tiles": float(sum(tiles.values())), "tile_reads": sum(count * places[name] for name, count in tiles.items())}


def _written(site: Site, most: int) -> list[dict[str, Shape]]:
    """Return the matrices that `merge` writes for a weight at each rank up to `most`, by the names that they have in the merged network.

    Of a product of two matrices every size grows with the rank along a line, so two ranks tell all of them.
    """
    if not most:
        return []
    if not site.factors.is_matrix or most < 4:
        return [_pieces(site, rank) for rank in range(1, most + 1)]
    one, last = _pieces(site, 1), _pieces(site, most)

    def between(name: str, axis: int, rank: int) -> int:
        return one[name][axis] + (last[name][axis] - one[name][axis]) * (rank - 1) // (most - 1)

    return [{name: (between(name, 0, rank), between(name, 1, rank)) for name in one} for rank in range(1, most + 1)]


def _pieces(site: Site, rank: int) -> dict[str, Shape]:
    """Return the matrices of one rank."""
    pieces = site.layer.written_on_meta(site.key, rank)
    found: dict[str, Shape] = {}
    for name, piece in pieces.named_modules():
        if base_of(piece) is not None:
            weight = cast(Tensor, piece.weight)
            found[".".join(part for part in (site.layer_name, name) if part)] = len(weight), weight[0].numel()
    return found
