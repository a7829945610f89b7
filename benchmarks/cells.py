"""Cells of the tables that result files are rendered to, and where the tables are put."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from spectrim.files import write_text


def mean_std(values: Sequence[float], digits: int = 1) -> str:
    """Return the mean and, of two values or more, the sample standard deviation; nothing of no value."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def put(page: Path, start: str, end: str, text: str) -> None:
    """Write a text between two marks of a page, each on a line of its own; whatever else the page has stays."""
    head, _, rest = page.read_text(encoding="utf-8").partition(start)
    write_text(page, f"{head}{start}\n{text}\n{end}{rest.partition(end)[2]}")
