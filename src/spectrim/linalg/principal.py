"""Principal directions of a few long rows, by their small Gram matrix; the rows are read a range of columns at a time."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

Columns = Callable[[int, int], Tensor]
"""Gives the columns from ``start`` to ``end`` of a matrix that is never whole in memory, ``(rows, end - start)``."""

NUMBERS = 1 << 22
"""Numbers of a range of columns, at most: 32 MiB in float64."""

NEGLIGIBLE = 1e-12
"""Share of the largest variance below which a direction is rounding: 1e-6 of the largest deviation."""


def ranges(width: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of columns that together are all of them, each of at most `NUMBERS` numbers.

    Examples:
        >>> list(ranges(5, NUMBERS // 2))
        [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, NUMBERS // max(1, rows))
    for start in range(0, width, step):
        yield start, min(width, start + step)


def centered_gram(columns: Columns, rows: int, width: int) -> Float[Tensor, "rows rows"]:
    """Return ``(X - mean) (X - mean)^T`` of a matrix ``X``, ``(rows, width)``, in float64.

    The mean of each column is taken out before anything is multiplied: deviations that are small beside the mean do not cancel.

    Args:
        columns: of ``X``.
        rows: how many.
        width: number of columns.
    """
    total = torch.zeros(rows, rows, dtype=torch.float64)
    for start, end in ranges(width, rows):
        part = _centered(columns, start, end)
        total += part @ part.mT
    return total


def principal_axes(gram: Float[Tensor, "rows rows"]) -> tuple[Tensor, Tensor]:
    """Return variances, descending, and the orthonormal combinations of rows that have them, ``(rows, spanned)``, signs fixed.

    Directions below `NEGLIGIBLE` are left out, so that ``spanned`` is at most one less than the number of rows.

    Args:
        gram: of centered rows, float64.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    spanned = int((values > NEGLIGIBLE * values[0]).sum()) if float(values[0]) > 0 else 0
    vectors = vectors[:, :spanned]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values[:spanned], vectors * torch.where(largest < 0, -1.0, 1.0)


def principal_directions(
    columns: Columns, axes: Float[Tensor, "rows size"], variances: Float[Tensor, " size"], width: int, dtype: torch.dtype
) -> Float[Tensor, "size width"]:
    """Return ``P = V^T (X - mean) / sqrt(variance)``, made orthonormal once more: small variances amplify the rounding of ``V``.

    Args:
        columns: of ``X``.
        axes: ``V``, see `principal_axes`.
        variances: of these.
        width: number of columns.
        dtype: of the result; products and sums are in float64.
    """
    mix = (axes / variances.sqrt()).mT
    made = torch.empty(len(mix), width, dtype=dtype)
    for start, end in ranges(width, len(axes)):
        made[:, start:end] = (mix @ _centered(columns, start, end)).to(dtype)
    return orthonormal_(made)


DEPENDENT = 1e-6  # share of a row outside the span of those before it, below which it counts as dependent


def orthonormal_(rows: Float[Tensor, "size width"]) -> Float[Tensor, "size width"]:
    """Make linearly independent rows orthonormal in place, by the Cholesky factor of their Gram matrix, twice; return them.

    The first row keeps its direction. Rows must not be nearly dependent, as their condition number is squared: a LinAlgError.

    Examples:
        >>> orthonormal_(torch.tensor([[3.0, 0.0], [1.0, 2.0]]))
        tensor([[1., 0.],
                [0., 1.]])

    Source: Yamamoto et al., "Roundoff error analysis of the CholeskyQR2 algorithm", ETNA 44, 2015.
    """
    for again in range(2):
        gram = overlaps(rows)
        root = torch.linalg.cholesky(gram)
        if not again and bool((root.diagonal() < DEPENDENT * gram.diagonal().sqrt()).any()):  # rounding may let a singular one pass
            raise torch.linalg.LinAlgError("the rows are dependent")  # type: ignore[attr-defined]
        for start, end in ranges(rows.shape[1], len(rows)):
            part = torch.linalg.solve_triangular(root, rows[:, start:end].to(root), upper=False)
            rows[:, start:end] = part.to(rows)
    return rows


def overlaps(rows: Float[Tensor, "size width"]) -> Float[Tensor, "size size"]:
    """Return ``R R^T``, multiplied and added up in float64."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for start, end in ranges(rows.shape[1], len(rows)):
        part = rows[:, start:end].cpu().double()
        total += part @ part.mT
    return total


def _centered(columns: Columns, start: int, end: int) -> Tensor:
    part = columns(start, end).double()
    return part - part.mean(0, keepdim=True)
