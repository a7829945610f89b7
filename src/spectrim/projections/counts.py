"""How many of several things are kept, and which: exact in count, the first of equal ones."""

from fractions import Fraction
from numbers import Real

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spectrim.errors import SettingError


def check_keep(owner: str, keep: object) -> None:
    """Raise a SettingError unless `keep` is a count, an integer of at least 1, or a fraction, a float in (0, 1]."""
    if isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1:
        return
    if isinstance(keep, Real) and not isinstance(keep, bool | int) and 0 < float(keep) <= 1:
        return
    rule = "a count (an integer >= 1) or a fraction (a float in (0, 1])"
    percent = isinstance(keep, Real) and not isinstance(keep, bool | int) and 1 < float(keep) <= 100
    raise SettingError(owner, "keep", got=keep, rule=rule, hint=f"for {keep} % write {float(keep) / 100:g}" if percent else "")  # type: ignore[arg-type]


def count_of(keep: int | float, total: int) -> int:
    """Return how many of `total` things are kept: a count, or the largest number that is at most the fraction; at least one.

    Args:
        keep: a count, or a fraction as a float. A fraction is taken as it is written: 0.29 of 100 are 29.
        total: number of things.

    Examples:
        >>> count_of(0.29, 100), count_of(0.01, 50), count_of(7, 5), count_of(1.0, 5)
        (29, 1, 5, 5)
    """
    if isinstance(keep, int):
        return min(keep, total)
    return min(total, max(1, int(Fraction(repr(float(keep))) * total)))


def largest(scores: Float[Tensor, "*lead things"], count: int) -> Bool[Tensor, "*lead things"]:
    """Return True for exactly `count` things of the largest score in each row; among equal ones the first.

    Args:
        scores: ``(..., things)``.
        count: in [0, things].

    Examples:
        >>> largest(torch.tensor([1.0, 3.0, 1.0, 1.0]), 3)
        tensor([ True,  True,  True, False])
    """
    if count >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.topk(count, dim=-1).values[..., -1:]
    above, equal = scores > least, scores == least
    missing = count - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= missing))
