"""Tensor trains of kernels ``(in, taps..., out)``: a core for each axis, a rank between two; their sizes are in `train_sizes`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spectrim.linalg.spectral import svd

Ranks = tuple[int, ...]

SWEEPS = 2
"""Alternations of `improved`; on trained kernels eight more lower the error by one hundredth of it."""


def full_ranks(shape: Sequence[int]) -> Ranks:
    """Return the ranks that hold any tensor of a shape: at each cut the smaller product of the sizes on either side.

    Examples:
        >>> full_ranks((16, 3, 3, 32))
        (16, 48, 32)
    """
    return tuple(min(math.prod(shape[:cut]), math.prod(shape[cut:])) for cut in range(1, len(shape)))


def tt_svd(tensor: Tensor, ranks: Ranks) -> tuple[Tensor, ...]:
    """Return the cores ``(n1, r1)``, ``(r1, n2, r2)``, ..., ``(rd, n)`` of a tensor train, in float64; exact at `full_ranks`.

    All cores but the last have orthonormal columns when unfolded, ``(r n, r')``. The squared error is at most the sum over the cuts of the
    energy behind each rank, and at most the number of cuts times the least one possible.

    Args:
        tensor: at least two axes.
        ranks: one between each two axes. Columns that no tensor can fill are zero.

    Examples:
        >>> kernel = torch.randn(6, 3, 3, 4, dtype=torch.float64)
        >>> cores = tt_svd(kernel, full_ranks(kernel.shape))
        >>> [tuple(core.shape) for core in cores], bool((contract(cores) - kernel).norm() < 1e-12)
        ([(6, 6), (6, 3, 12), (12, 3, 4), (4, 4)], True)

    Source: Oseledets, SIAM J. Sci. Comput. 33 (2011), algorithm 1 and theorem 2.2.
    """
    shape, rest, before = tensor.shape, tensor.double(), 1
    cores: list[Tensor] = []
    for size, rank in zip(shape[:-1], ranks, strict=True):
        U, S, Vh = svd(rest.reshape(before * size, -1))
        kept = min(rank, len(S))
        core = U.new_zeros(before * size, rank)
        core[:, :kept] = U[:, :kept]
        rest = U.new_zeros(rank, Vh.shape[1])
        rest[:kept] = S[:kept, None] * Vh[:kept]
        cores.append(core.reshape(before, size, rank) if cores else core)
        before = rank
    return (*cores, rest)


def improved(tensor: Tensor, cores: Sequence[Tensor], sweeps: int = SWEEPS) -> tuple[Tensor, ...]:
    """Return a train of the same ranks nearer to a tensor, by alternating least squares; each update lowers the error or leaves it.

    All other cores orthonormal, the best core is the tensor times them. All but the last come back with orthonormal columns.

    Args:
        tensor: at least two axes, float64.
        cores: of a train near to it.
        sweeps: from the first core to the last.

    Examples:
        >>> kernel = torch.randn(6, 3, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> start = tt_svd(kernel, (3, 4, 2))
        >>> bool((contract(improved(kernel, start)) - kernel).norm() < (contract(start) - kernel).norm())
        True

    Source: Holtz, Rohwedder and Schneider, SIAM J. Sci. Comput. 34 (2012), A683.
    """
    for _ in range(sweeps):
        rest, made = tensor.reshape(len(tensor), -1), list[Tensor]()
        for core, behind in zip(cores[:-1], _behind(cores), strict=True):
            seen = rest.reshape(core.shape[:-1].numel(), -1)
            columns = _basis(seen @ behind, core.shape[-1])
            made.append(columns.reshape(core.shape))
            rest = columns.mT @ seen
        cores = (*made, rest)
    return tuple(cores)


def _behind(cores: Sequence[Tensor]) -> list[Tensor]:
    """Return for each cut orthonormal columns that span the rows of all cores behind it, ``(rest, r)``."""
    rows = [cores[-1].mT]
    for core in reversed(cores[1:-1]):
        rows.append(torch.einsum("anb,xb->nxa", core, rows[-1]).flatten(0, 1))
    return [_basis(each, each.shape[1]) for each in reversed(rows)]


def _basis(columns: Tensor, count: int) -> Tensor:
    """Return orthonormal columns of the same span; zeros where there are more than rows."""
    return resized(torch.linalg.qr(columns).Q, (len(columns), count))


def contract(cores: Sequence[Tensor]) -> Tensor:
    """Return the tensor of a train, ``(n1, n2, ..., n)``, in the dtype of the cores."""
    first, *middle, last = cores
    left = first
    for core in middle:
        left = (left @ core.flatten(1)).reshape(-1, core.shape[-1])
    sizes = [first.shape[0], *(core.shape[1] for core in middle), last.shape[1]]
    return (left @ last).reshape(sizes)


def right_spectra(cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the squared norms of what is behind each column of each cut, ``(r,)``: energies of singular values where `tt_svd` is exact."""
    *middle, last = cores[1:]
    behind, found = last @ last.mT, [last.square().sum(1)]
    for core in reversed(middle):
        behind = torch.einsum("anb,bc,dnc->ad", core, behind, core)
        found.append(behind.diagonal())
    return tuple(reversed(found))


def orthonormalized(cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return cores of the same tensor whose unfoldings have orthonormal columns, all but the last: a QR decomposition of each.

    Signs are those of the given columns, so that cores that are nearly orthonormal hardly change. A core of more columns than rows stays.
    """
    held, made = cores[0], []
    for core in cores[1:]:
        if held.shape[:-1].numel() < held.shape[-1]:
            made.append(held)
            held = core
            continue
        Q, R = torch.linalg.qr(held.reshape(-1, held.shape[-1]))
        signs = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R)
        made.append((Q * signs).reshape(held.shape))
        held = torch.tensordot(signs.unsqueeze(1) * R, core, dims=1)
    return (*made, held)


def overlaps(old: Sequence[Tensor], new: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return for each cut the products of the old columns with the new ones, ``(r old, r new)``."""
    found = [old[0].mT @ new[0]]
    for mine, theirs in zip(old[1:-1], new[1:-1], strict=True):
        found.append(torch.einsum("anb,ac,cnd->bd", mine, found[-1], theirs))
    return tuple(found)


def count(shape: Sequence[int], ranks: Ranks) -> int:
    """Return the numbers that a train stores."""
    around = (1, *ranks, 1)
    return sum(around[axis] * size * around[axis + 1] for axis, size in enumerate(shape))


def shapes(shape: Sequence[int], ranks: Ranks) -> list[tuple[int, ...]]:
    """Return the shapes of the cores of a tensor of a shape."""
    middle = [(ranks[cut], size, ranks[cut + 1]) for cut, size in enumerate(shape[1:-1])]
    return [(shape[0], ranks[0]), *middle, (ranks[-1], shape[-1])]


def leading(cores: Sequence[Tensor], ranks: Ranks) -> tuple[Tensor, ...]:
    """Return views of the leading entries of cores."""
    first, *middle, last = cores
    inner = [core[:before, :, :after] for core, before, after in zip(middle, ranks[:-1], ranks[1:], strict=True)]
    return (first[:, : ranks[0]], *inner, last[: ranks[-1]])


def resized(core: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the leading entries of a core in another shape, zeros where there are fewer."""
    made = core.new_zeros(tuple(shape))
    kept = tuple(slice(min(sizes)) for sizes in zip(core.shape, shape, strict=True))
    made[kept] = core[kept]
    return made
