"""Figures and data frames for notebooks, by matplotlib and pandas (extra ``plot``)."""

from collections.abc import Mapping, Sequence
from typing import Any

from spectrim.errors import SpectrimError

COLOR = "#0072b2"


def figure(columns: int) -> tuple[Any, Any]:
    """Return a figure that belongs to no window, and its axes side by side.

    Args:
        columns: number of axes.

    Raises:
        SpectrimError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SpectrimError("plot: needs matplotlib; pip install matplotlib, or install the extra 'plot'") from error
    made = Figure(figsize=(4.2 * columns, 3.2), layout="constrained")
    return made, made.subplots(1, columns, squeeze=False)[0]


def curve(axes: Any, points: Sequence[tuple[float | int, float]], *, title: str, x: str, y: str) -> None:
    """Draw points, joined in the order of x.

    Args:
        axes: of `figure`.
        points: ``(x, y)``.
        title: of the axes.
        x: label with the unit.
        y: label with the unit.
    """
    ordered = sorted(points)
    axes.plot([point[0] for point in ordered], [point[1] for point in ordered], marker="o", color=COLOR)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)


def ratios(axes: Any, kept: Mapping[str, float], *, title: str) -> None:
    """Draw what is kept of each cost as bars.

    Args:
        axes: of `figure`.
        kept: fraction of the dense network by name.
        title: of the axes.
    """
    names = list(kept)
    bars = axes.barh(names, [kept[name] for name in names], color=COLOR)
    axes.bar_label(bars, [f"{100 * kept[name]:.0f} %" for name in names], padding=3)
    axes.axvline(1.0, color="gray", linestyle="--", linewidth=1)
    axes.set(title=title, xlabel="fraction of the dense network")
    axes.set_xlim(0, 1.2 * max(1.0, *kept.values()))
    axes.invert_yaxis()


def frame(rows: Sequence[Mapping[str, Any]], index: str | None = None) -> Any:
    """Return rows as a pandas data frame.

    Args:
        rows: of plain values, by column.
        index: the column that names the rows.

    Raises:
        SpectrimError: pandas is missing.
    """
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise SpectrimError("to_pandas: needs pandas; pip install pandas, or install the extra 'plot'") from error
    made = DataFrame(list(rows))
    return made if index is None or made.empty else made.set_index(index)
