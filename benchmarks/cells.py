"""Cells of the tables that result files are rendered to."""

import statistics
from collections.abc import Sequence


def mean_std(values: Sequence[float], digits: int = 1) -> str:
    """Return the mean and, of two values or more, the sample standard deviation; nothing of no value."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"
