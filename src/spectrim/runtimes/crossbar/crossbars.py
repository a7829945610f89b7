"""`Crossbars`: the hardware that a network is mapped to, as one value."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from spectrim.errors import SettingError
from spectrim.runtimes.crossbar.device import Device
from spectrim.runtimes.crossbar.mapping import Mapping
from spectrim.runtimes.crossbar.prices import CrossbarPrice, Peripherals, price_on_crossbars


@dataclass(frozen=True)
class Crossbars:
    """What budgets of tiles are counted on: cells, tiles and periphery. `allocate`, `compress`, `plan` and `measure` take it.

    Args:
        device: has the bits of one cell.
        mapping: size of a tile, and bits of a weight.
        peripherals: constants of area and energy, assumptions all.

    Raises:
        SettingError: for a value of another class.

    Examples:
        >>> Crossbars(mapping=Mapping(rows=32, columns=32, bits=4)).arrays
        2
        >>> Crossbars(Device(bits=2), Mapping(bits=8)).arrays
        8
    """

    device: Device = field(default_factory=Device)
    mapping: Mapping = field(default_factory=Mapping)
    peripherals: Peripherals = field(default_factory=Peripherals)

    def __post_init__(self) -> None:
        for name, kind in (("device", Device), ("mapping", Mapping), ("peripherals", Peripherals)):
            if not isinstance(getattr(self, name), kind):
                raise SettingError("Crossbars", name, got=getattr(self, name), rule=f"a {kind.__name__}")

    @property
    def arrays(self) -> int:
        """Physical tiles for each tile of a matrix: both of a pair, and every slice."""
        return 2 * self.mapping.slices(self.device)

    def price(self, model: nn.Module, inputs: Any = None, batch_size: int | None = None) -> CrossbarPrice:
        """Return what a network takes, see `price_on_crossbars`."""
        return price_on_crossbars(model, self.device, self.mapping, self.peripherals, inputs=inputs, batch_size=batch_size)
