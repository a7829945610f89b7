"""Which tensors lie on levels: finding the step, or the table of values."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LARGEST = 1 << 20
"""Largest multiple of a step."""

VALUES = 4096
"""Largest table of values."""

SPARE = 16
"""Levels that need not occur between those that do: the step may be this fraction of the smallest difference."""

SAMPLE = 4096
"""Values that are looked at before all are."""


@dataclass(frozen=True, eq=False)
class Levels:
    """A tensor as integers.

    Attributes:
        numbers: flat, int64; what they stand for is ``numbers * step``, or ``table[numbers + zero]``.
        steps: ``(1,)`` or one for each row, float32; float64 for a tensor of float64.
        table: the values, in the tensor's dtype; None where there are steps.
        zero: place of the commonest value in the table.
    """

    numbers: np.ndarray
    steps: np.ndarray | None
    table: Tensor | None = None
    zero: int = 0


def restored(numbers: np.ndarray, steps: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the tensor of multiples of steps: one multiplication in the precision of the steps, then rounded to `dtype`."""
    spread = numbers.reshape(len(steps), -1) if len(steps) > 1 else numbers.reshape(1, -1)
    values = spread.astype(steps.dtype) * steps[:, None]
    return torch.from_numpy(values.reshape(shape)).to(dtype)


def found(tensor: Tensor) -> Levels | None:
    """Return a tensor as integers: multiples of one step, of a step for each row, or numbers of values; None where nothing is saved so.

    Args:
        tensor: on the CPU, contiguous, of floating-point numbers, without negative zeros.

    Examples:
        >>> found(torch.tensor([0.5, -1.0, 0.0, 1.5])).numbers.tolist()
        [1, -2, 0, 3]
    """
    if not tensor.is_floating_point() or tensor.numel() < 2 or not bool(torch.isfinite(tensor).all()):
        return None
    wide = (tensor if tensor.dtype is torch.float64 else tensor.float()).numpy()
    flat, few = wide.ravel(), _distinct(wide.ravel())
    if few is not None:
        step = _step(np.unique(np.abs(few)), tensor.dtype)
        if step is not None:
            numbers = _multiples(flat, step)
            if flat.size > SAMPLE or _pays(numbers, tensor.element_size()):
                return Levels(numbers, np.array([step]))
    if tensor.dim() > 1 and (steps := _row_steps(wide.reshape(len(wide), -1), tensor.dtype)) is not None:
        return Levels(_multiples(wide.reshape(len(wide), -1), steps[:, None]).ravel(), steps)
    if few is None or len(few) > min(VALUES, flat.size // 4):
        return None
    places = np.searchsorted(few, flat)
    zero = int(np.bincount(places).argmax())
    return Levels(places - zero, None, torch.from_numpy(few).to(tensor.dtype), zero)


def _multiples(values: np.ndarray, steps: np.ndarray | np.floating) -> np.ndarray:
    return np.rint(values.astype(np.float64) / steps).astype(np.int64)


def _pays(numbers: np.ndarray, width: int) -> bool:
    """Whether a few integers and a step take less room than the numbers themselves."""
    return float(np.log2(2 * np.abs(numbers) + 1).sum()) + 40 < 8 * width * numbers.size


def _distinct(values: np.ndarray) -> np.ndarray | None:
    """Return the distinct values in order; None where there are too many for levels."""
    most = values.size if values.size <= 4 * SAMPLE else min(LARGEST // 8, values.size // 2)
    if values.size > 4 * SAMPLE and len(np.unique(values[:: values.size // SAMPLE])) > 0.9 * SAMPLE:
        return None
    few = np.unique(values)
    return few if len(few) <= most else None


def _step(sizes: np.ndarray, dtype: torch.dtype) -> np.floating | None:
    """Return the step whose multiples are exactly these magnitudes, in rounded arithmetic, too; None where there is none."""
    sizes = sizes[sizes > 0]
    if len(sizes) == 0:
        return None
    exact = sizes.astype(np.float64)
    gap = float(np.diff(exact, prepend=0.0).min())
    for part in range(1, SPARE + 1):
        top = round(exact[-1] / gap * part)
        if top > LARGEST:
            return None
        near = np.rint(exact / (exact[-1] / top))
        if np.abs(exact * top / exact[-1] - near).max() > 1e-3 + top * torch.finfo(dtype).eps:
            continue
        for guess in _guesses(exact, near, sizes.dtype):
            if torch.equal(restored(near, np.array([guess]), sizes.shape, dtype), torch.from_numpy(sizes).to(dtype)):
                return guess
    return None


def _guesses(exact: np.ndarray, near: np.ndarray, dtype: np.dtype) -> list[np.floating]:
    """Return steps that may be the one: the smallest multiple's, the largest multiple's, and their neighbors."""
    made: list[np.floating] = []
    for value, count in ((exact[0], near[0]), (exact[-1], near[-1])):
        middle = dtype.type(value / count)
        below, above = np.nextafter(middle, dtype.type(0)), np.nextafter(middle, dtype.type(np.inf))
        made += [middle, below, above]
    return made


def _row_steps(rows: np.ndarray, dtype: torch.dtype) -> np.ndarray | None:
    """Return a step for each row, or None; a row of zeros has the step 1."""
    if rows.shape[1] < 8:
        return None
    steps = np.ones(len(rows), rows.dtype)
    for place, row in enumerate(rows):
        if row.any():
            step = _step(np.unique(np.abs(row)), dtype)
            if step is None:
                return None
            steps[place] = step
    return steps
