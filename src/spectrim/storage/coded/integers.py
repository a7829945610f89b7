"""Integers of a tensor as symbols in contexts: each entry, or the gaps between those that are not zero and their values."""

from dataclasses import dataclass

import numpy as np

from spectrim.storage.coded import tokens
from spectrim.storage.coded.bits import Reader
from spectrim.storage.coded.collected import Group, Part
from spectrim.storage.coded.scales import CLASSES, REACH, Scales, fitted, sides

GAPS, VALUES, PLANES, CONTEXTS = CLASSES, CLASSES + 24, CLASSES + 40, CLASSES + 48
"""First contexts of gaps (by the octave of their mean), of values behind gaps (by half octaves), of planes of bytes; and all."""

SYMBOLS = 256

SPARSE = 0.85
"""Share of zeros from which gaps are tried."""

GAIN = 1.02
"""Gaps are taken where they need at most this many times the bits: there are fewer symbols, which are coded faster."""


def is_index(part: Part) -> bool:
    """Whether all of a part tells positions: gaps, or a mask."""
    return part.whole and not part.signed


def counted(counts: np.ndarray) -> float:
    """Return the bits of symbols that occur so often, by their entropy."""
    some = counts[counts > 0].astype(np.float64)
    return float(-(some * np.log2(some / some.sum())).sum()) if len(some) else 0.0


def write_integers(numbers: np.ndarray, shape: tuple[int, ...], group: Group, signed: bool) -> None:
    """Collect the integers of a tensor, in the way that takes fewer bits.

    Args:
        numbers: flat, int64.
        shape: of the tensor.
        group: collects.
        signed: False for a mask of zeros and ones.
    """
    size = np.abs(numbers)
    scales = fitted(numbers, shape)
    contexts = scales.contexts(shape)
    dense = Part(size, contexts, signed=signed, zeros=True, signs=(numbers[size > 0] < 0).astype(np.int64) if signed else None)
    some = np.flatnonzero(numbers)
    if len(some) and len(some) <= (1 - SPARSE) * len(numbers):
        gaps = _gaps(numbers, some, signed)
        if sum(map(_bits, gaps)) < GAIN * _bits(dense):
            group.side.fixed(1, 1)
            group.side.golomb(len(some), 8)
            for part in gaps:
                group.side.golomb(int(part.contexts[0]) - (GAPS if part.contexts[0] < VALUES else VALUES), 2)
            group.parts += gaps
            return
    group.side.fixed(0, 1)
    group.side.fixed(scales.base, 5)
    for offsets in scales.offsets:
        group.side.fixed(int(offsets is not None), 1)
        if offsets is not None:
            group.small.append(np.where(offsets >= 0, 2 * offsets, -2 * offsets - 1))
    group.parts.append(dense)


def _gaps(numbers: np.ndarray, some: np.ndarray, signed: bool) -> list[Part]:
    gaps, values = np.diff(some, prepend=-1) - 1, numbers[some]
    octave = min(23, int(np.log2(max(1.0, float(gaps.mean())))))
    made = [Part(gaps, np.full(len(gaps), GAPS + octave, np.uint8))]
    if signed:
        size = np.abs(values) - 1
        half = min(15, max(0, round(2 * np.log2(max(0.125, float(size.mean())))) + 6))
        made.append(Part(size, np.full(len(size), VALUES + half, np.uint8), signed=True, signs=(values < 0).astype(np.int64)))
    return made


def _bits(part: Part) -> float:
    symbols, _ = tokens.split(part.numbers)
    counts = np.bincount(part.contexts.astype(np.int32) * tokens.TOKENS + symbols).astype(np.int64)
    counts = np.concatenate([counts, np.zeros(-len(counts) % tokens.TOKENS, np.int64)]).reshape(-1, tokens.TOKENS)
    return sum(map(counted, counts)) + float((counts * tokens.EXTRA).sum()) + (0 if part.signs is None else len(part.signs))


@dataclass(frozen=True)
class Integers:
    """How the integers of a tensor were coded, as its description says.

    Attributes:
        shape: of the tensor.
        signed: not a mask.
        base: scale of the tensor, where each entry is coded.
        axes: which of rows, columns and taps have scales.
        count: of entries that are not zero, where gaps are coded; else None.
        contexts: of gaps and of values.
    """

    shape: tuple[int, ...]
    signed: bool
    base: int = 0
    axes: tuple[bool, bool, bool] = (False, False, False)
    count: int | None = None
    contexts: tuple[int, ...] = ()

    @property
    def small(self) -> int:
        """How many scales belong to it."""
        return sum(side for side, on in zip(sides(self.shape), self.axes, strict=True) if on)

    @property
    def entries(self) -> int:
        """How many integers there are."""
        return int(np.prod(sides(self.shape), dtype=np.int64))

    @property
    def symbols(self) -> int:
        """How many symbols there are."""
        return self.entries if self.count is None else self.count * len(self.contexts)

    def parts(self, offsets: np.ndarray) -> list[Part]:
        """Return what is coded, to be filled; `offsets` are its scales."""
        blank = np.zeros(0, np.int64)
        if self.count is not None:
            return [Part(blank, np.full(self.count, context, np.uint8), signed=context >= VALUES) for context in self.contexts]
        if (offsets > 2 * REACH).any():
            raise ValueError("a scale is out of range")
        values, place = np.where(offsets % 2 == 0, offsets // 2, -(offsets + 1) // 2), 0
        listed: list[np.ndarray | None] = []
        for side, on in zip(sides(self.shape), self.axes, strict=True):
            listed.append(values[place : place + side] if on else None)
            place += side if on else 0
        scales = Scales(self.base, (listed[0], listed[1], listed[2]))
        return [Part(blank, scales.contexts(self.shape), signed=self.signed)]

    def numbers(self, parts: list[Part]) -> np.ndarray:
        """Return the integers, flat."""
        if self.count is None:
            part = parts[0]
            return np.where(part.negative, -part.numbers, part.numbers) if part.signed else part.numbers
        numbers = np.zeros(self.entries, np.int64)
        places = np.cumsum(parts[0].numbers + 1) - 1
        if (parts[0].numbers >= self.entries).any() or (len(places) and not 0 <= places[-1] < self.entries):
            raise ValueError("a position is outside of its tensor")
        if self.signed:
            values = parts[1].numbers + 1
            numbers[places] = np.where(parts[1].negative, -values, values)
        else:
            numbers[places] = 1
        return numbers


def read_integers(source: Reader, shape: tuple[int, ...], signed: bool) -> Integers:
    """Read how the integers of a tensor were coded."""
    if not source.fixed(1):
        base = source.fixed(5)
        return Integers(shape, signed, base, (bool(source.fixed(1)), bool(source.fixed(1)), bool(source.fixed(1))))
    count = source.golomb(8)
    contexts = [GAPS + source.golomb(2), *([VALUES + source.golomb(2)] if signed else [])]
    if contexts[0] >= VALUES or contexts[-1] >= PLANES or count > int(np.prod(sides(shape), dtype=np.int64)):
        raise ValueError("positions are described wrongly")
    return Integers(shape, signed, count=count, contexts=tuple(contexts))
