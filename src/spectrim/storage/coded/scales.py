"""Contexts of integers: how large each is expected to be, from scales of its row, its column and its tap that are sent beside them."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

CLASSES = 32
"""Contexts: half octaves of the mean magnitude, from ``2 ** -7`` on."""

OCTAVES = 7

REACH = 8
"""Largest difference that one row, column or tap makes, in half octaves."""

FEWEST = 48
"""Tensors of fewer entries have one scale."""


@dataclass(frozen=True, eq=False)
class Scales:
    """The scales of one tensor, in half octaves.

    Attributes:
        base: of the whole tensor.
        offsets: of each row, each column and each tap; None where all are the same.
    """

    base: int
    offsets: tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None] = (None, None, None)

    def contexts(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return the context of each entry of a tensor of a shape, flat."""
        total: Any = np.full(sides(shape), self.base, np.int16)
        for axis, offsets in enumerate(self.offsets):
            if offsets is not None:
                total = total + _along(offsets, axis)
        contexts: np.ndarray = np.clip(total, 0, CLASSES - 1).astype(np.uint8).ravel()
        return contexts


def sides(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return a shape as rows, columns and taps."""
    if len(shape) < 2:
        return 1, 1, math.prod(shape)
    return shape[0], shape[1], math.prod(shape[2:])


def _along(values: np.ndarray, axis: int) -> np.ndarray:
    return np.expand_dims(values.astype(np.int16), tuple(other for other in range(3) if other != axis))


def _costs() -> np.ndarray:
    """Return, for each context, the bits of a zero, of a one with its sign, and of each further unit, under a rounded Laplace law."""
    mean = 2.0 ** (np.arange(CLASSES) / 2 - OCTAVES)
    some = (np.sqrt(1 + 4 * mean**2) - 1) / (2 * mean)  # the share that is not zero; its square is the ratio of the tail
    bits: np.ndarray = -np.log2(np.stack([1 - some, some * (1 - some**2) / 2, some**2]))
    return bits


COSTS = _costs()


def fitted(levels: np.ndarray, shape: tuple[int, ...]) -> Scales:
    """Return the scales that code integers in the fewest bits, their own included, one axis after the other.

    Args:
        levels: integers, flat.
        shape: of the tensor.
    """
    rows, columns, taps = sides(shape)
    size = np.abs(levels).reshape(rows, columns, taps).astype(np.float32)
    base = round(2 * (math.log2(max(float(size.mean()), 1e-9)) + OCTAVES)) if size.size else 0
    base = min(max(base, 0), CLASSES - 1)
    if size.size < FEWEST:
        return Scales(base)
    some = size > 0
    offsets: list[np.ndarray | None] = [None, None, None]
    for axis in range(3):
        length = size.shape[axis]
        if length > 1:
            classes = Scales(base, (offsets[0], offsets[1], offsets[2])).contexts(shape).reshape(size.shape)
            offsets[axis] = _best(size, some, classes, axis, fixed=axis == 0)
    return Scales(base, (offsets[0], offsets[1], offsets[2]))


def _best(size: np.ndarray, some: np.ndarray, classes: np.ndarray, axis: int, fixed: bool) -> np.ndarray | None:
    """Return the offsets along an axis that cost least; None where they do not pay for themselves."""
    length, others = size.shape[axis], tuple(other for other in range(3) if other != axis)
    steps = np.arange(-REACH, REACH + 1)
    bits = np.zeros((length, len(steps)))
    present = [int(classes.flat[0])] if fixed else np.flatnonzero(np.bincount(classes.ravel(), minlength=CLASSES)).tolist()
    for one in present:
        at = None if fixed else classes == one
        count = np.full(length, size.size / length) if at is None else at.sum(others)
        kept = some.sum(others) if at is None else (some & at).sum(others)
        sums = size.sum(others, dtype=np.float64) if at is None else np.where(at, size, 0).sum(others, dtype=np.float64)
        zero, first, more = COSTS[:, np.clip(one + steps, 0, CLASSES - 1)]
        bits += np.outer(count - kept, zero) + np.outer(kept, first) + np.outer(sums - kept, more)
    own = 1.0 + np.where(steps == 0, 0.0, 1.0 + np.abs(steps))
    chosen = (bits + own).argmin(1)
    spent, without = (bits + own)[np.arange(length), chosen].sum(), bits[:, REACH].sum()
    return (chosen - REACH).astype(np.int64) if spent < without else None
