"""`Mapping`: how a weight becomes levels of cells in pairs, slices and tiles."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.errors import SettingError
from spectrim.runtimes.crossbar.device import Device


@dataclass(frozen=True)
class Mapping:
    """Maps a matrix ``(out, in)`` to crossbars: rows are inputs, columns are outputs.

    A weight is a whole number of steps, ``w = step (p - n)``; ``p`` and ``n`` (one of them is zero) lie in two cells of a differential
    pair, or in several pairs whose slices of `Device.bits` bits are weighed by powers of two.

    Args:
        rows: inputs of one tile, >= 1.
        columns: outputs of one tile, >= 1.
        bits: of the magnitude of a weight, in [1, 16].

    Raises:
        SettingError: for a value outside its range.

    Examples:
        >>> Mapping(rows=32, columns=32).tiles(torch.ones(40, 100))
        8

    Source: differential pairs and bit slicing: Yuan et al., ISLPED 2019; Shafiee et al. (ISAAC), ISCA 2016.
    """

    rows: int = 128
    columns: int = 64
    bits: int = 8

    def __post_init__(self) -> None:
        for name, most in (("rows", 2**16), ("columns", 2**16), ("bits", 16)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise SettingError("Mapping", name, got=value, rule=f"an integer in [1, {most}]")

    def slices(self, device: Device) -> int:
        """Return how many cells hold one magnitude."""
        return -(-self.bits // device.bits)

    def step(self, weight: Tensor) -> float:
        """Return the weight of the lowest bit: the largest magnitude has all bits."""
        return float(weight.detach().abs().max()) / (2**self.bits - 1) or 1.0

    def quantized(self, weight: Tensor) -> Tensor:
        """Return the weight that an ideal device holds."""
        step = self.step(weight)
        return ((weight.detach().double() / step).round() * step).to(weight.dtype)

    def levels(self, weight: Float[Tensor, "out in_"], device: Device) -> tuple[Float[Tensor, "slices 2 out in_"], float]:
        """Return the levels of the cells, positive and negative, lowest slice first, and the weight of one level of the lowest slice.

        Args:
            weight: dense.
            device: has the bits of one cell.
        """
        step, base = self.step(weight), 2**device.bits
        whole = (weight.detach().double() / step).round()
        parts = torch.stack([whole.clamp(min=0), (-whole).clamp(min=0)])
        return torch.stack([torch.div(parts, base**place, rounding_mode="floor") % base for place in range(self.slices(device))]), step

    def tiles(self, weight: Float[Tensor, "out in_"]) -> int:
        """Return how many tiles a matrix takes; inputs and outputs that are zero throughout take no room.

        Args:
            weight: zero where it is pruned.
        """
        outputs, inputs = (int((weight != 0).any(axis).sum()) for axis in (1, 0))
        return -(-inputs // self.rows) * -(-outputs // self.columns)
