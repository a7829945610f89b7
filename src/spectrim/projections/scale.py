"""The scale of a set of levels with the least squared error, and rounding to the nearest level."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SWEPT = 2**22
"""Largest number of breakpoints that are sorted at once; a longer row is first averaged in bins."""

REFINEMENTS = 20
"""Most rounds of rounding and least squares after the sweep of an averaged row."""


def nearest(values: Float[Tensor, "rows n"], levels: Float[Tensor, " levels"]) -> Float[Tensor, "rows n"]:
    """Return the nearest of the levels, ascending, for each value; halfway between two the one that is nearer to zero.

    Where zero is not a level, values that are exactly zero are pruned ones, and stay.

    Examples:
        >>> nearest(torch.tensor([[0.4, -0.5, 9.0, 0.0]]), torch.tensor([-1.0, 1.0, 2.0]))
        tensor([[ 1., -1.,  2.,  0.]])
    """
    halves = (levels[1:] + levels[:-1]) / 2
    above = torch.bucketize(values, halves)  # on a boundary: the lower one, which is nearer to zero for positive values
    below = torch.bucketize(values, halves, right=True)
    found = levels[torch.where(values < 0, below, above)]
    return found if bool((levels == 0).any()) else torch.where(values == 0, 0, found)


def best_scale(values: Float[Tensor, "rows n"], levels: Float[Tensor, " levels"]) -> Float[Tensor, "rows 1"]:
    """Return for each row the scale ``s > 0`` with the least ``sum (v - s * nearest level)^2``, in float64.

    For a given assignment ``c`` of levels to values the best scale is ``<v, c> / <c, c>``, and it leaves ``<v, v> - <v, c>^2 / <c, c>``.
    As the scale falls from infinity, each value moves from one level of its sign to the next, at known scales: these breakpoints are
    sorted, and all assignments on the way are compared. The least error is thus exact, for any levels; a long row of many levels is
    averaged in bins first, and the scale refined on all its values.

    Args:
        values: zeros add nothing.
        levels: ascending, different; of both signs, or one of them zero.

    Returns:
        Positive scales; 1 for a row of zeros.

    Examples:
        >>> best_scale(torch.tensor([[1.0, 2.1, -3.0]]), torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).round(decimals=3)
        tensor([[1.2440]], dtype=torch.float64)
    """
    values, levels = values.double(), levels.double()
    rows, n = values.shape
    size = n * len(levels)
    if size <= SWEPT:
        step = max(1, SWEPT // max(1, size))
        return torch.cat([_swept(part, torch.ones_like(part), levels) for part in torch.split(values, step)]) if rows else values[:, :1]
    return torch.cat([_refined(row[None], levels) for row in values])


def _refined(row: Float[Tensor, "1 n"], levels: Float[Tensor, " levels"]) -> Float[Tensor, "1 1"]:
    """Sweep the means of equal parts of the sorted row, then alternate rounding and least squares on all of it."""
    parts = torch.tensor_split(row.sort().values.flatten(), max(1, SWEPT // len(levels)))
    means = torch.stack([part.mean() for part in parts])[None]
    scale = _swept(means, torch.tensor([[float(len(part)) for part in parts]], device=row.device, dtype=row.dtype), levels)
    for _ in range(REFINEMENTS):
        codes = nearest(row / scale, levels)
        better = (row * codes).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True)
        if not bool((better > 0).all()) or torch.equal(better, scale):
            break
        scale = better
    return scale


def _swept(values: Float[Tensor, "rows n"], weights: Float[Tensor, "#rows n"], levels: Float[Tensor, " levels"]) -> Float[Tensor, "rows 1"]:
    """Compare all assignments; each value counts as often as its weight says."""
    (up, up_jumps), (down, down_jumps) = _ladder(levels), _ladder(-levels.flip(0))
    steps = max(len(up), len(down)) - 1
    positive, size = values[..., None] >= 0, values.abs()[..., None]
    counted = weights[..., None] * (size > 0)

    def by_sign(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(positive, F.pad(one, (0, steps - len(one))), F.pad(other, (0, steps - len(other))))

    first = torch.where(positive[..., 0], up[0], down[0])
    rise = by_sign(up_jumps, down_jumps)
    breakpoints = torch.where(rise > 0, size / by_sign((up[1:] + up[:-1]) / 2, (down[1:] + down[:-1]) / 2).clamp(min=1e-300), 0)
    squares = by_sign(up[1:].square() - up[:-1].square(), down[1:].square() - down[:-1].square())
    order = breakpoints.flatten(1).argsort(dim=1, descending=True, stable=True)

    def running(start: Tensor, gains: Tensor) -> Tensor:
        steps_taken = gains.flatten(1).gather(1, order).cumsum(1)
        return F.pad(steps_taken, (1, 0)) + start.sum(1, keepdim=True)

    product = running(first * size[..., 0] * counted[..., 0], rise * size * counted)
    square = running(first.square() * counted[..., 0], squares * counted)
    best = (product.square() / square.clamp(min=1e-300)).argmax(1, keepdim=True)
    scale = product.gather(1, best) / square.gather(1, best).clamp(min=1e-300)
    return torch.where(scale > 0, scale, 1.0)


def _ladder(levels: Float[Tensor, " levels"]) -> tuple[Tensor, Tensor]:
    """Return the levels that a positive value passes as the scale falls, ascending, and the steps between them."""
    up = levels[levels >= 0]
    if not len(up):
        up = levels[-1:]
    return up, up[1:] - up[:-1]
