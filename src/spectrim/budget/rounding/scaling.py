"""By what factor all steps are made larger or smaller, so that a file of a number of bytes comes out."""

import math
from collections.abc import Mapping

NEAR = 0.985
"""Share of the budget with which a file is content."""

STEEPNESS = 1.2, 12.0
"""Power of the factor by which a file is too large that the next attempt makes steps larger by: at first, and at most, where steps that are
larger make a file that is hardly smaller."""

LARGEST = 8.0
"""Largest such factor; its inverse is the smallest."""


def next_scale(sizes: Mapping[float, int], scale: float, limit: int) -> float:
    """Return the factor of all steps to try next.

    Args:
        sizes: bytes of the file at each factor that was tried.
        scale: the last one.
        limit: bytes.
    """
    power, most = STEEPNESS
    if len(sizes) > 1:
        (one, large), (other, small) = list(sizes.items())[-2:]
        falls = math.log(large / small) * math.copysign(1.0, other - one)
        power = most if falls <= 0 else min(most, max(power, abs(math.log(other / one)) / falls))
    factor = min(max(math.log(sizes[scale] / limit / (NEAR * 1.005)) * power, -math.log(LARGEST)), math.log(LARGEST))
    wanted = scale * math.exp(factor)
    least = max((tried for tried, size in sizes.items() if size > limit), default=0.0)
    enough = min((tried for tried, size in sizes.items() if size <= limit), default=math.inf)
    bracketed = 0 < least < enough < math.inf
    return math.sqrt(least * enough) if bracketed and not least < wanted < enough else wanted
