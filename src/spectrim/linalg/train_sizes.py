"""Sizes of a tensor train: what its leading entries lose at any ranks, and a nested path of sizes by it."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from spectrim.linalg.tensor_train import Ranks, count

WORK = 1e10
"""Multiply-accumulates that a path may take; of larger kernels a part of the ranks of the outer cuts is compared."""


class Losses:
    """Squared errors of the leading entries of a train, ``||W - W_r||^2``, for ranks of all cuts.

    The middle cut divides the train into two halves. The products of the columns of each half, whole with leading and leading with leading,
    give the errors of all ranks of the middle cut at once: ``||W||^2 - 2 <W, W_r> + ||W_r||^2`` are sums over entries of their products.

    Args:
        cores: of a train, in float64.
    """

    def __init__(self, cores: Sequence[Tensor]) -> None:
        self.cores, self.middle = cores, len(cores) // 2
        self.full = tuple(core.shape[-1] for core in cores[:-1])
        self.left, self.right, self.errors = lru_cache(8)(self._left), lru_cache(8)(self._right), lru_cache(8)(self._errors)
        self.energy = float((self._left(self.full[: self.middle - 1])[0] * self._right(self.full[self.middle :])[0]).sum())

    def at(self, ranks: Ranks) -> float:
        """Return the error at a size."""
        if ranks == self.full:
            return 0.0
        before, rank, after = ranks[: self.middle - 1], ranks[self.middle - 1], ranks[self.middle :]
        return self.errors(before, after)[rank - 1]

    def _errors(self, before: Ranks, after: Ranks) -> list[float]:
        """Return the error at each rank of the middle cut, the ranks before and behind it given."""
        (left, left_leading), (right, right_leading) = self.left(before), self.right(after)
        shared = (left * right).sum(0).cumsum(0)
        square = (left_leading * right_leading).cumsum(0).cumsum(1).diagonal()
        return (self.energy - 2 * shared + square).clamp(min=0).tolist()

    def _left(self, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """Return the products of the columns of the left half with those of its leading entries, and of these with each other."""
        mixed = own = self.cores[0].mT @ self.cores[0]
        for core, rank in zip(self.cores[1 : self.middle], ranks, strict=True):
            part = core[:rank]
            mixed = torch.einsum("anb,ac,cnd->bd", core, mixed[:, :rank], part)
            own = torch.einsum("anb,ac,cnd->bd", part, own[:rank, :rank], part)
        return mixed, own

    def _right(self, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """Return the same of the rows of the right half."""
        mixed = own = self.cores[-1] @ self.cores[-1].mT
        for core, rank in zip(reversed(self.cores[self.middle : -1]), reversed(ranks), strict=True):
            part = core[..., :rank]
            mixed = torch.einsum("anb,bc,dnc->ad", core, mixed[:, :rank], part)
            own = torch.einsum("anb,bc,dnc->ad", part, own[:rank, :rank], part)
        return mixed, own


def grid(shape: Sequence[int], full: Ranks) -> list[list[int]]:
    """Return the ranks of each cut that are compared, ascending: all, or evenly spaced ones of the outer cuts of a large kernel.

    Args:
        shape: of the tensor.
        full: ranks that it is held with.
    """
    step = 1 + int(max(full) ** 2 * max(shape) * sum(full) / WORK)
    middle = (len(full) + 1) // 2 - 1  # as in `Losses`
    return [_spaced(rank, 1 if cut == middle else step) for cut, rank in enumerate(full)]


def _spaced(rank: int, step: int) -> list[int]:
    """Return ranks from 1 on, at most a step apart, and at most a third, so that what is next to them can be filled."""
    ranks = [rank]
    while ranks[-1] > 1:
        ranks.append(ranks[-1] - max(1, min(step, ranks[-1] // 3)))
    return ranks[::-1]


def nested_path(cores: Sequence[Tensor], shape: Sequence[int]) -> tuple[Ranks, ...]:
    """Return sizes from ones to the ranks of a train, each with one more at one cut than the one before.

    They are found from the last one down: the next smaller one is that which loses least for each number that it saves, of those that a
    tensor can fill.

    Args:
        cores: of an exact train, in float64, or on the meta device, where no values decide.
        shape: of the tensor.
    """
    full = tuple(core.shape[-1] for core in cores[:-1])
    ranks, losses = grid(shape, full), None if cores[0].is_meta else Losses(cores)
    size, path = full, [full]
    while any(rank > 1 for rank in size):
        found = []
        for cut, rank in enumerate(size):
            if rank == 1:
                continue
            lower = max(each for each in ranks[cut] if each < rank)
            smaller = (*size[:cut], lower, *size[cut + 1 :])
            if _filled(shape, smaller) or not _filled(shape, size):
                lost = 0.0 if losses is None else losses.at(smaller) - losses.at(size)
                found.append((lost / (count(shape, size) - count(shape, smaller)), smaller))
        chosen = min(found)[1]
        cut = next(cut for cut, rank in enumerate(chosen) if rank != size[cut])
        path += [(*size[:cut], rank, *size[cut + 1 :]) for rank in range(size[cut] - 1, chosen[cut] - 1, -1)]
        size = chosen
    return tuple(reversed(path))


def path_losses(cores: Sequence[Tensor], path: Sequence[Ranks], shape: Sequence[int]) -> Tensor:
    """Return the squared error of the leading entries at each size of a nested path, from none at all on: ``(sizes + 1,)``, float64.

    A size whose ranks are not compared (`grid`), or that loses more than a smaller one, has the error of the smaller one.

    Args:
        cores: of a train, in float64.
        path: sizes, ascending.
        shape: of the tensor.
    """
    losses = Losses(cores)
    known = {*_compared(path, shape, losses.full)}
    errors = [losses.energy, *(losses.at(size) if size in known else losses.energy for size in path)]
    return torch.tensor(errors, dtype=torch.float64, device=cores[0].device).cummin(0).values


def nearest_within(cores: Sequence[Tensor], path: Sequence[Ranks], size: Ranks, shape: Sequence[int]) -> Ranks:
    """Return a size, or a smaller one of the path whose leading entries lose less: that of the error of `path_losses`."""
    losses = Losses(cores)
    within = [each for each in path if all(less <= rank for less, rank in zip(each, size, strict=True))]
    return min([*_compared(within, shape, losses.full), size], key=losses.at)


def _compared(path: Sequence[Ranks], shape: Sequence[int], full: Ranks) -> list[Ranks]:
    ranks = [set(each) for each in grid(shape, full)]
    return [size for size in path if all(rank in each for rank, each in zip(size, ranks, strict=True))]


def _filled(shape: Sequence[int], size: Ranks) -> bool:
    """Return whether a tensor can fill the ranks: none exceeds what its neighbors and an axis between them allow."""
    around = (1, *size, 1)
    return all(rank <= min(around[cut] * shape[cut], shape[cut + 1] * around[cut + 2]) for cut, rank in enumerate(size))
