"""`Mapping`: how a weight becomes levels of cells in pairs, slices and tiles."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spectrim.errors import SettingError
from spectrim.runtimes.crossbar.device import Device

ON_LEVEL = 1e-3
"""Of a step: weights that are this near to a level lie on it."""

SEARCHED = 2**22
"""Different magnitudes times levels up to which a step is looked for that puts all weights on levels."""


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
        """Return the weight of the lowest bit: the largest magnitude has all bits, unless the weights lie on fewer levels already.

        Weights that were trained on levels stay on them, also where the highest level is free: the step is the largest magnitude over
        the largest number of levels on which all weights lie, up to `ON_LEVEL` of a step.
        """
        values: Tensor = torch.unique(weight.detach().abs().double())
        values, most = values[values > 0], int(2**self.bits) - 1
        if not len(values):
            return 1.0
        largest = float(values[-1])
        if len(values) <= most and len(values) * most <= SEARCHED:
            for levels in range(most, len(values) - 1, -1):
                places = values / largest * levels
                if float((places - places.round()).abs().max()) <= ON_LEVEL:
                    return largest / levels
        return largest / most

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
        """Return how many tiles a matrix takes, see `built`.

        Args:
            weight: zero where it is pruned.

        Examples:
            >>> mapping, weight = Mapping(rows=2, columns=2), torch.ones(4, 4)
            >>> weight[:2, :2] = 0  # the two outputs of one tile
            >>> mapping.tiles(torch.ones(4, 4)), mapping.tiles(weight)
            (4, 3)
        """
        return self._placed(weight)[0]

    def tiles_of(self, outputs: int, inputs: int) -> int:
        """Return how many tiles a matrix of these sizes takes where nothing of it is pruned.

        Examples:
            >>> Mapping(rows=32, columns=32).tiles_of(outputs=500, inputs=800)
            400
        """
        return -(-inputs // self.rows) * -(-outputs // self.columns)

    def built(self, weight: Float[Tensor, "out in_"]) -> Bool[Tensor, "out in_"]:
        """Return which entries of a matrix have cells; the others are exactly zero on any device.

        Inputs that are zero throughout take no row. The others are cut into bands of `rows`, in their order, and in each band an output
        that is zero throughout takes no column. Where this takes fewer tiles, the bands are those of the whole matrix instead, so that
        what was pruned inside tiles of it (`projections.Tiles`, or blocks) is not shifted.

        Args:
            weight: zero where it is pruned.
        """
        return self._placed(weight)[1]

    def _placed(self, weight: Tensor) -> tuple[int, Tensor]:
        live = weight.detach() != 0
        everything, used = torch.arange(live.shape[1], device=live.device), live.any(0).nonzero().flatten()
        found = [self._in_bands(live, order) for order in ([used] if len(used) == live.shape[1] else [used, everything])]
        return min(found, key=lambda one: one[0])

    def _in_bands(self, live: Tensor, order: Tensor) -> tuple[int, Tensor]:
        """Return the tiles, and the entries with cells, where these inputs are cut into bands."""
        built, tiles = torch.zeros_like(live), 0
        for band in torch.split(order, self.rows):
            outputs = live[:, band].any(1)
            built[:, band] = outputs[:, None] & live[:, band].any(0)
            tiles += -(-int(outputs.sum()) // self.columns)
        return tiles, built
