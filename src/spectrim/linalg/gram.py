"""Second moments of rows: symmetric products, added up in float64, whole or seen from a few directions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 96
"""Columns of the blocks that are multiplied whole: of a larger product the half below the diagonal is mirrored."""


@dataclass(frozen=True, eq=False)
class ProjectedMetric:
    """The metric ``M = B^T C B`` of a space in which only the directions ``B`` were looked at: no matrix of the whole space is kept.

    Attributes:
        core: ``C``, ``(..., seen, seen)``, symmetric.
        basis: ``B``, ``(..., seen, in)``, orthonormal rows.
    """

    core: Tensor
    basis: Tensor

    def of(self, vectors: Tensor) -> Tensor:
        """Return ``V^T M V`` of columns ``V``, ``(..., in, n)``; exact where they lie in the directions that were looked at."""
        seen = self.basis.to(vectors) @ vectors
        return seen.mT @ self.core.to(vectors) @ seen

    def misses(self, vectors: Tensor) -> float:
        """Return the largest share of the length of a column of ``V`` outside the directions that were looked at."""
        basis = self.basis.to(vectors)
        outside = vectors - basis.mT @ (basis @ vectors)
        return float((outside.norm(dim=-2) / vectors.norm(dim=-2).clamp_min(torch.finfo(vectors.dtype).tiny)).max())


Metric = Tensor | ProjectedMetric
"""Of the inputs of a weight."""


def ordinary_tensor(x: Tensor) -> Tensor:
    """Return a tensor of a user's sub-class as torch's own, so that sums and factors made of it are ordinary; others as they are."""
    subclass = type(x) is not Tensor and getattr(type(x), "__torch_dispatch__", None) is getattr(Tensor, "__torch_dispatch__", None)
    return x.as_subclass(Tensor) if subclass else x


def precise(rows: Tensor) -> Tensor:
    """Return rows in the dtype in which they are multiplied: their own, float32 at least."""
    rows = ordinary_tensor(rows)
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()


def gram(rows: Tensor) -> Tensor:
    """Return ``R^T R`` of rows ``(..., n, width)``, by about half of the multiplications of the whole product.

    Examples:
        >>> rows = torch.arange(2 * 3 * 200, dtype=torch.float64).reshape(2, 3, 200)
        >>> torch.equal(gram(rows), rows.mT @ rows)
        True
    """
    width = rows.shape[-1]
    made = rows.new_empty(*rows.shape[:-2], width, width)

    def fill(start: int, end: int) -> None:
        if end - start <= SMALLEST:
            made[..., start:end, start:end] = rows[..., start:end].mT @ rows[..., start:end]
            return
        middle = (start + end) // 2
        fill(start, middle)
        fill(middle, end)
        block = rows[..., start:middle].mT @ rows[..., middle:end]
        made[..., start:middle, middle:end] = block
        made[..., middle:end, start:middle] = block.mT

    fill(0, width)
    return made


class MomentSum:
    """Adds up ``sum (x - c) (x - c)^T`` of rows, products in the rows' dtype (float32 at least), sums in float64.

    With ``c``, the mean of the first rows, large means do not cancel in single precision; `second` puts it back.

    Args:
        shifted: whether to take ``c`` out: where the mean itself is needed, or large.
        seen: what the rows are multiplied with first; nothing when omitted.
    """

    def __init__(self, *, shifted: bool = False, seen: Callable[[Tensor], Tensor] | None = None) -> None:
        self.shifted, self.seen = shifted, seen
        self.count = 0
        self.shift: Tensor | None = None
        self._gram: Tensor | None = None
        self._sum: Tensor | None = None

    def add(self, rows: Tensor) -> Tensor:
        """Add rows ``(blocks, n, width)``; return them as they were multiplied."""
        rows = precise(rows) if self.seen is None else self.seen(precise(rows))
        if self.shifted:
            if self.shift is None:
                self.shift = rows.mean(-2, keepdim=True)
            rows = rows - self.shift
        product, total = gram(rows), rows.sum(-2).double()
        self._gram = product.double() if self._gram is None else self._gram.add_(product)
        self._sum = total if self._sum is None else self._sum.add_(total)
        self.count += rows.shape[-2]
        return rows

    @property
    def mean(self) -> Tensor:
        """The mean of the rows, ``(blocks, width)``, in float64."""
        assert self._sum is not None
        mean = self._sum / self.count
        return mean if self.shift is None else mean + self.shift.double().squeeze(-2)

    def second(self, *, centered: bool = False) -> Tensor:
        """Return the sum of ``x x^T``, or of ``(x - mean) (x - mean)^T``, ``(blocks, width, width)``, in float64."""
        assert self._gram is not None
        if self.shift is None and not centered:
            return self._gram
        left, right = self._mean_products(centered)
        return torch.baddbmm(self._gram, left, right.mT)

    def diagonal(self) -> Tensor:
        """Return the sum of ``x^2``, ``(blocks, width)``, in float64: the diagonal of `second`, without the rest."""
        assert self._gram is not None
        left, right = self._mean_products(centered=False)
        return self._gram.diagonal(dim1=-2, dim2=-1) + (left * right).sum(-1)

    def _mean_products(self, centered: bool) -> tuple[Tensor, Tensor]:
        """Return ``L, R``, ``(blocks, width, 1 or 2)``: ``L R^T`` is what the sum of the shifted rows lacks."""
        assert self._sum is not None
        total = self._sum.unsqueeze(-1)
        if centered:
            return -total / self.count, total
        mean = self.mean.unsqueeze(-1)
        return torch.cat([-total / self.count, self.count * mean], -1), torch.cat([total, mean], -1)

    def together(self, add: Callable[[Tensor], Tensor]) -> None:
        """Make this the sum of those of all processes, each of which calls it.

        Args:
            add: gives the sum of a tensor over the processes.
        """
        assert self._gram is not None
        assert self._sum is not None
        count = int(add(torch.tensor(self.count, device=self._sum.device)))
        if not self.shifted:
            self._gram, self._sum, self.count = add(self._gram), add(self._sum), count
            return
        mean = add(self.count * self.mean if self.count else self._sum) / count  # of all: means of processes do not cancel around it
        away = self.mean - mean if self.count else torch.zeros_like(mean)
        deviations = self.second(centered=True) if self.count else self._gram
        self._gram = add(deviations + self.count * away.unsqueeze(-1) * away.unsqueeze(-2))
        self._sum, self.shift, self.count = torch.zeros_like(mean), mean.unsqueeze(-2), count

    @classmethod
    def empty(cls, like: Tensor, *, shifted: bool) -> "MomentSum":
        """Return a sum of no rows, of matrices ``(blocks, width, width)`` like the one given."""
        made = cls(shifted=shifted)
        made._gram, made._sum = torch.zeros_like(like), torch.zeros_like(like[..., 0])
        return made

    @property
    def shape(self) -> torch.Size:
        """The shape of `second`."""
        assert self._gram is not None
        return self._gram.shape
