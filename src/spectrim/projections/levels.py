"""`Levels`, `PowersOfTwo` and `LevelTable`: every value is one of a few."""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from spectrim.checks.words import check_words
from spectrim.errors import SettingError
from spectrim.projections.affine import affine
from spectrim.projections.positions import position_bits
from spectrim.projections.scale import best_scale, nearest
from spectrim.protocols import Bits

Per = Literal["tensor", "channel"] | int
"""What has one scale: the tensor, each entry of its first axis, or each group of so many consecutive values."""

SCALE_BITS = 32
"""A scale, or an offset, is stored as a float32."""


def check_per(owner: str, per: object) -> None:
    """Raise a SettingError for anything that is no `Per`."""
    if per not in ("tensor", "channel") and (isinstance(per, bool) or not isinstance(per, int) or per < 1):
        raise SettingError(owner, "per", got=per, rule="'tensor', 'channel', or the number of values in a group (an integer >= 1)")


def check_bits(owner: str, bits: object, least: int, most: int = 8) -> None:
    """Raise a SettingError unless `bits` is an integer in [least, most]."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not least <= bits <= most:
        raise SettingError(owner, "bits", got=bits, rule=f"an integer in [{least}, {most}]")


def in_rows(tensor: Tensor, per: Per) -> Float[Tensor, "rows n"]:
    """Return the values that share a scale as one row each, in float64; the last group is filled up with zeros."""
    if per == "channel" and tensor.dim():
        return tensor.double().reshape(tensor.shape[0], -1)
    flat = tensor.double().flatten()
    size = per if isinstance(per, int) else flat.numel()
    return F.pad(flat, (0, -flat.numel() % size)).reshape(-1, size)


def rows_of(tensor: Tensor, per: Per) -> int:
    """Return how many scales a tensor has."""
    return len(in_rows(torch.empty(tensor.shape, device="meta"), per))


def from_rows(rows: Float[Tensor, "rows n"], like: Tensor) -> Tensor:
    """Undo `in_rows`, in the shape and dtype of a tensor."""
    return rows.flatten()[: like.numel()].reshape(like.shape).to(like.dtype)


def scaled(tensor: Tensor, levels: Float[Tensor, " levels"], per: Per) -> Tensor:
    """Return the nearest tensor whose values are levels times the best scale of their row."""
    rows = in_rows(tensor, per)
    levels = levels.to(rows)
    scale = best_scale(rows, levels)
    return from_rows(nearest(rows / scale, levels) * scale, tensor)


@dataclass(frozen=True)
class Levels:
    """Round to ``2^bits`` or ``2^bits - 1`` equally spaced levels, with the step of the least squared error.

    | kind | zero | levels in steps |
    |---|---|---|
    | symmetric | yes | ``-m ... 0 ... m``, ``m = 2^(bits-1) - 1`` |
    | symmetric | no | ``-m ... -1, 1 ... m``, ``m = 2^(bits-1)`` |
    | affine | yes | ``-z ... 2^bits - 1 - z``, a whole number ``z`` |
    | affine | no | ``z + (0 ... 2^bits - 1)``, any ``z`` |

    Values that are exactly zero stay, in each of them: without a zero level they are pruned ones, which are stored as positions.

    Args:
        bits: of a value, in [1, 8]; at least 2 for symmetric levels with zero.
        kind: ``symmetric`` around zero, or ``affine``.
        zero: whether zero is a level.
        per: what has its own step (and ``z``): the ``tensor``, each ``channel`` (entry of the first axis), or each group of so many
            consecutive values.

    Raises:
        SettingError: for a value outside its range.

    Examples:
        >>> Levels(2, zero=False)(torch.tensor([0.9, -1.1, 2.0, 0.0]))
        tensor([ 1., -1.,  2.,  0.])
        >>> Levels(2).stored_bits(torch.zeros(10))
        Bits(data=52, index=0)

    Source: levels without zero as in Ren et al., arXiv 1812.11677.
    Deviation: the step of symmetric levels is the exact optimum of the squared error, see `best_scale`. That of affine levels is exact for
    up to 4 bits with zero, else a local optimum: see `affine`.
    """

    bits: int
    kind: Literal["symmetric", "affine"] = "symmetric"
    zero: bool = True
    per: Per = "tensor"

    def __post_init__(self) -> None:
        check_words(self)
        check_bits("Levels", self.bits, 2 if self.zero and self.kind == "symmetric" else 1)
        check_per("Levels", self.per)

    @property
    def width(self) -> int:
        """Bits of a stored value."""
        return self.bits

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the nearest tensor of such levels."""
        if self.kind == "affine":
            return from_rows(affine(in_rows(tensor, self.per), self.bits, self.zero), tensor)
        return scaled(tensor, self._steps(), self.per)

    def _steps(self) -> Float[Tensor, " levels"]:
        """Return symmetric levels in steps."""
        most = 2 ** (self.bits - 1) - (1 if self.zero else 0)
        levels = torch.arange(-most, most + 1, dtype=torch.float64)
        return levels if self.zero else levels[levels != 0]

    def table(self, tensor: Tensor) -> "LevelTable":
        """Return the levels that a tensor is rounded to, as fixed values: symmetric ones, with one step for the tensor.

        Examples:
            >>> Levels(2).table(torch.tensor([0.5, -0.25])).values
            (-0.375, 0.0, 0.375)
        """
        levels = self._steps()
        return LevelTable(tuple((best_scale(in_rows(tensor, "tensor"), levels).to(levels) * levels).flatten().tolist()))

    def scale_bits(self, tensor: Tensor) -> int:
        """Return the bits of the steps and offsets; a whole-number offset has those of a value."""
        offset = 0 if self.kind == "symmetric" else self.bits if self.zero else SCALE_BITS
        return rows_of(tensor, self.per) * (SCALE_BITS + offset)

    def stored_bits(self, tensor: Tensor) -> Bits:
        """Return the stored bits of a member: a code for each value and the steps; positions where zeros are pruned."""
        return _stored_bits(tensor, self.width, self.scale_bits(tensor), self.zero)


@dataclass(frozen=True)
class PowersOfTwo:
    """Round to ``s`` times a signed power of two, ``±s, ±2s, ±4s, ...``, with the scale ``s`` of the least squared error.

    Values that are exactly zero stay.

    Args:
        bits: of a value, in [1, 5]; at least 2 with zero. There are ``2^(bits-1)`` powers, one less with zero.
        zero: whether zero is a level.
        per: what has its own scale, see `Levels`.

    Raises:
        SettingError: for a value outside its range.

    Examples:
        >>> PowersOfTwo(3)(torch.tensor([1.0, 2.0, -3.8, 0.1])).div(0.9619).round(decimals=3)
        tensor([ 1.,  2., -4.,  0.])

    Source: levels as in Leng et al., arXiv 1707.09870; there and in other code the scale alternates with rounding, here it is exact.
    """

    bits: int
    zero: bool = True
    per: Per = "tensor"

    def __post_init__(self) -> None:
        check_words(self)
        check_bits("PowersOfTwo", self.bits, 2 if self.zero else 1, 5)
        check_per("PowersOfTwo", self.per)

    @property
    def width(self) -> int:
        """Bits of a stored value."""
        return self.bits

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the nearest tensor of such levels."""
        powers = 2.0 ** torch.arange(2 ** (self.bits - 1) - (1 if self.zero else 0), dtype=torch.float64)
        return scaled(tensor, torch.cat([-powers.flip(0), *([torch.zeros(1)] if self.zero else []), powers]).double(), self.per)

    def scale_bits(self, tensor: Tensor) -> int:
        """Return the bits of the scales."""
        return rows_of(tensor, self.per) * SCALE_BITS

    def stored_bits(self, tensor: Tensor) -> Bits:
        """Return the stored bits of a member: a code for each value and the scales; positions where zeros are pruned."""
        return _stored_bits(tensor, self.width, self.scale_bits(tensor), self.zero)


@dataclass(frozen=True)
class LevelTable:
    """Round to the nearest of given values, such as the measured states of a device; values that are exactly zero stay.

    Args:
        values: at least two, ascending, finite.
        scaled: whether they are multiplied by the scale of the least squared error; then of both signs, or one of them zero.
        per: what has its own scale, see `Levels`.

    Raises:
        SettingError: for a value outside its range.

    Examples:
        >>> LevelTable((-1.0, -0.4, 0.3, 1.0))(torch.tensor([0.7, -0.6, 5.0, 0.0]))
        tensor([ 1.0000, -0.4000,  1.0000,  0.0000])
    """

    values: tuple[float, ...]
    scaled: bool = False
    per: Per = "tensor"

    def __post_init__(self) -> None:
        check_words(self)
        numbers = tuple(self.values)
        if len(numbers) < 2 or any(not math.isfinite(a) for a in numbers) or any(a >= b for a, b in itertools.pairwise(numbers)):
            raise SettingError("LevelTable", "values", got=self.values, rule="at least two finite numbers, ascending")
        if self.scaled and not (numbers[0] <= 0 <= numbers[-1]):
            raise SettingError("LevelTable", "values", got=self.values, rule="of both signs, or one of them zero, where scaled")
        check_per("LevelTable", self.per)

    @property
    def zero(self) -> bool:
        """Whether zero is a level."""
        return 0.0 in self.values

    @property
    def width(self) -> int:
        """Bits of a stored value."""
        return max(1, math.ceil(math.log2(len(self.values))))

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the nearest tensor of such levels."""
        levels = torch.tensor(self.values, dtype=torch.float64)
        if self.scaled:
            return scaled(tensor, levels, self.per)
        rows = in_rows(tensor, "tensor")
        return from_rows(nearest(rows, levels.to(rows)), tensor)

    def scale_bits(self, tensor: Tensor) -> int:
        """Return the bits of the scales; the table itself is not counted."""
        return rows_of(tensor, self.per) * SCALE_BITS if self.scaled else 0

    def stored_bits(self, tensor: Tensor) -> Bits:
        """Return the stored bits of a member: a code for each value and the scales; positions where zeros are pruned."""
        return _stored_bits(tensor, self.width, self.scale_bits(tensor), self.zero)


def _stored_bits(tensor: Tensor, width: int, scale_bits: int, zero: bool) -> Bits:
    kept = tensor != 0
    values = tensor.numel() if zero else int(kept.sum())
    return Bits(values * width + scale_bits, 0 if zero else position_bits(kept))
