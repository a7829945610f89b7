"""What a network takes on crossbars: tiles, cells, converters and reads, counted; area and energy by stated constants."""

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from spectrim.metrics.calls import watched
from spectrim.metrics.inputs import batch_size_of
from spectrim.runtimes.crossbar.device import Device
from spectrim.runtimes.crossbar.layers import mapped_layers
from spectrim.runtimes.crossbar.mapping import Mapping


@dataclass(frozen=True)
class Peripherals:
    """Constants of the periphery; every one is an assumption in the order of ISAAC (Shafiee et al., ISCA 2016, table I), in 32 nm.

    Args:
        cell_um2: area of a cell, in square micrometers.
        adc_um2: area of a converter at the columns.
        dac_um2: area of a converter at a row.
        shared: columns that share a converter.
        adc_pj: energy of one conversion at the columns, in picojoules.
        dac_pj: energy of one conversion at a row.
        cell_fj: energy of one read of a cell, in femtojoules.
    """

    cell_um2: float = 0.0016
    adc_um2: float = 1200.0
    dac_um2: float = 0.17
    shared: int = 64
    adc_pj: float = 1.67
    dac_pj: float = 0.003
    cell_fj: float = 1.0

    def read_nj(self, mapping: Mapping) -> float:
        """Return the energy of one read of one tile, in nanojoules: a conversion at each row and column, a read of each cell.

        Examples:
            >>> round(Peripherals().read_nj(Mapping(rows=128, columns=64)), 4)  # 128 x 0.003 + 64 x 1.67 + 8,192 x 0.001 pJ
            0.1155
        """
        cells = mapping.rows * mapping.columns
        return (mapping.rows * self.dac_pj + mapping.columns * self.adc_pj + cells * self.cell_fj / 1e3) / 1e3


@dataclass(frozen=True)
class CrossbarPrice:
    """What a network takes on crossbars.

    Attributes:
        tiles: crossbars, both of each pair and all slices counted.
        cells: memristors in them.
        adcs: converters at the columns.
        dacs: converters at the rows.
        area_mm2: square millimeters, by `Peripherals`.
        reads: products of one input with one tile, for one example; None without inputs.
        energy_nj: of them, in nanojoules, by `Peripherals`; None without inputs.
    """

    tiles: int
    cells: int
    adcs: int
    dacs: int
    area_mm2: float
    reads: int | None = None
    energy_nj: float | None = None


def price_on_crossbars(
    model: nn.Module,
    device: Device,
    mapping: Mapping | None = None,
    peripherals: Peripherals | None = None,
    *,
    inputs: Any = None,
    batch_size: int | None = None,
) -> CrossbarPrice:
    """Count the crossbars of a network; rows and columns of a weight that are zero throughout take no room, see `Mapping.built`.

    Args:
        model: dense or merged.
        device: has the bits of one cell.
        mapping: its tiles; the defaults when omitted.
        peripherals: constants of area and energy; the defaults, assumptions all, when omitted.
        inputs: one batch, for the reads of one example.
        batch_size: examples in it; None to find it.

    Raises:
        LayerError: as for `on_crossbars`.

    Examples:
        >>> price_on_crossbars(nn.Linear(64, 32), Device(bits=4), Mapping(rows=32, columns=32, bits=4)).tiles
        4
    """
    mapping, constants = mapping or Mapping(), peripherals or Peripherals()
    arrays, layers = 2 * mapping.slices(device), mapped_layers(model)
    counts = {module: arrays * mapping.tiles(cast(Tensor, module.weight).detach().flatten(1)) for module in layers}
    tiles = sum(counts.values())
    cells, adcs, dacs = tiles * mapping.rows * mapping.columns, tiles * -(-mapping.columns // constants.shared), tiles * mapping.rows
    area = cells * constants.cell_um2 + adcs * constants.adc_um2 + dacs * constants.dac_um2
    reads = None
    if inputs is not None:
        places = places_of(model, inputs, batch_size)
        reads = round(sum(count * places[module] for module, count in counts.items()))
    return CrossbarPrice(tiles, cells, adcs, dacs, area / 1e6, reads, None if reads is None else reads * constants.read_nj(mapping))


def places_of(model: nn.Module, inputs: Any, batch_size: int | None = None) -> dict[nn.Module, float]:
    """Return how many inputs each mapped layer multiplies for one example: the places of a convolution's output, the calls of a layer.

    Args:
        model: dense or merged; runs once.
        inputs: one batch.
        batch_size: examples in it; None to find it.

    Examples:
        >>> import torch
        >>> layer = nn.Conv2d(3, 8, 3, padding=1)
        >>> places_of(layer, torch.zeros(2, 3, 10, 10))[layer]
        100.0
    """
    batch, layers = batch_size_of(inputs, batch_size, model=model, unknown=1), mapped_layers(model)
    found = dict.fromkeys(layers, 0.0)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        found[module] += output.numel() / len(cast(Tensor, module.weight)) / batch

    watched(model, inputs, layers, after=after)
    return found
