"""Affine levels: the step and the offset with a small squared error."""

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.projections.scale import best_scale, nearest

EXACT = 16
"""Most levels for which every whole-number offset is tried."""

AROUND = 4
"""Offsets that are tried on each side of the one between the ends, where there are more levels."""

BINS = 512
"""Means of equal parts of the sorted values, on which starts are compared."""

ROUNDS, LAST = 4, 20
"""Rounds of rounding and least squares for each start, and for the best one."""


def affine(rows: Float[Tensor, "rows n"], bits: int, zero: bool) -> Float[Tensor, "rows n"]:
    """Return near rows of ``2^bits`` equally spaced values; values that are exactly zero stay.

    Args:
        rows: in float64.
        bits: of a value.
        zero: whether zero has to be one of the levels.

    Returns:
        With zero and at most `EXACT` levels the nearest ones, else a local optimum.
    """
    count = 2**bits
    if zero:
        return _whole_offsets(rows, count)
    return torch.cat([_free_offset(row, count)[None] for row in rows]) if len(rows) else rows


def _whole_offsets(rows: Float[Tensor, "rows n"], count: int) -> Float[Tensor, "rows n"]:
    """Try whole-number offsets, each with its best step."""
    found, least = torch.zeros_like(rows), rows.square().sum(1, keepdim=True)
    for offset in _offsets(rows, count):
        levels = torch.arange(count, dtype=rows.dtype, device=rows.device) - offset
        scale = best_scale(rows, levels)
        rounded = nearest(rows / scale, levels) * scale
        error = (rows - rounded).square().sum(1, keepdim=True)
        found, least = torch.where(error < least, rounded, found), torch.minimum(error, least)
    return found


def _offsets(rows: Float[Tensor, "rows n"], count: int) -> list[int]:
    """Return all offsets, or those around the ones that fit the ends of the rows."""
    if count <= EXACT:
        return list(range(count))
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    between = (-low / (high - low).clamp(min=1e-300) * (count - 1)).round()
    near = range(max(0, int(between.min()) - AROUND), min(count - 1, int(between.max()) + AROUND) + 1)
    return list(near)


def _free_offset(row: Float[Tensor, " n"], count: int) -> Float[Tensor, " n"]:
    """Start with each number of steps between the ends, refine each on bins, and the best one on all values."""
    values = row[row != 0]
    if not len(values):
        return row
    low, high = values.min(), values.max()
    if low == high:
        return row
    parts = torch.tensor_split(values.sort().values, min(BINS, len(values)))
    means, weights = torch.stack([part.mean() for part in parts])[None], torch.tensor([[float(len(part)) for part in parts]]).to(row)
    step = (high - low) / torch.arange(1, count, dtype=row.dtype, device=row.device)[:, None]
    steps, lows = _alternate(means, weights, step, low.expand_as(step), count, ROUNDS)
    errors = (weights * (means - _rounded(means, steps, lows, count)).square()).sum(1)
    best = int(errors.argmin())
    one = torch.ones_like(values)[None]
    starts = torch.stack([steps[best], step[-1]]), torch.stack([lows[best], low[None]])  # the ends are the usual choice
    steps, lows = _alternate(values[None], one, *starts, count, LAST)
    rounded = _rounded(values[None], steps, lows, count)
    nearer = rounded[(values - rounded).square().sum(1).argmin()]
    return torch.where(row != 0, torch.zeros_like(row).masked_scatter(row != 0, nearer), 0)


def _codes(values: Tensor, step: Tensor, low: Tensor, count: int) -> Tensor:
    return ((values - low) / step).round().clamp(0, count - 1)


def _rounded(values: Tensor, step: Tensor, low: Tensor, count: int) -> Tensor:
    return low + step * _codes(values, step, low, count)


def _alternate(
    values: Float[Tensor, "1 n"],
    weights: Float[Tensor, "1 n"],
    step: Float[Tensor, "starts 1"],
    low: Float[Tensor, "starts 1"],
    count: int,
    rounds: int,
) -> tuple[Tensor, Tensor]:
    """Alternate rounding and the regression of the values on their codes."""
    total = weights.sum()
    for _ in range(rounds):
        codes = _codes(values, step, low, count)
        mean_code, mean = ((weights * part).sum(1, keepdim=True) / total for part in (codes, values))
        spread = (weights * (codes - mean_code).square()).sum(1, keepdim=True)
        slope = (weights * (codes - mean_code) * (values - mean)).sum(1, keepdim=True) / spread.clamp(min=1e-300)
        step = torch.where((spread > 0) & (slope > 0), slope, step)
        low = mean - step * mean_code
    return step, low
