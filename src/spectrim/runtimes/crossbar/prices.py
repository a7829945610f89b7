"""What a network takes on crossbars: tiles, cells and converters, counted; area and energy by stated constants."""

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

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


@dataclass(frozen=True)
class CrossbarPrice:
    """What a network takes on crossbars.

    Attributes:
        tiles: crossbars, both of each pair and all slices counted.
        cells: memristors in them.
        adcs: converters at the columns.
        dacs: converters at the rows.
        area_mm2: square millimeters, by `Peripherals`.
    """

    tiles: int
    cells: int
    adcs: int
    dacs: int
    area_mm2: float


def price_on_crossbars(
    model: nn.Module, device: Device, mapping: Mapping | None = None, peripherals: Peripherals | None = None
) -> CrossbarPrice:
    """Count the crossbars of a network; rows and columns of a weight that are zero throughout take no room.

    Args:
        model: dense or merged.
        device: has the bits of one cell.
        mapping: its tiles; the defaults when omitted.
        peripherals: constants of the area; the defaults, assumptions all, when omitted.

    Raises:
        LayerError: as for `on_crossbars`.

    Examples:
        >>> price_on_crossbars(nn.Linear(64, 32), Device(bits=4), Mapping(rows=32, columns=32, bits=4)).tiles
        4
    """
    mapping, constants = mapping or Mapping(), peripherals or Peripherals()
    weights = [cast(Tensor, module.weight).detach().flatten(1) for module in mapped_layers(model)]
    tiles = 2 * mapping.slices(device) * sum(map(mapping.tiles, weights))
    cells, adcs, dacs = tiles * mapping.rows * mapping.columns, tiles * -(-mapping.columns // constants.shared), tiles * mapping.rows
    area = cells * constants.cell_um2 + adcs * constants.adc_um2 + dacs * constants.dac_um2
    return CrossbarPrice(tiles, cells, adcs, dacs, area / 1e6)
