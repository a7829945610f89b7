"""Canonical polyadic (CP) decompositions of kernels ``(out, in, taps)``: sums of products of three vectors."""

import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor, Tensor]

SWEEPS = 60
"""Largest number of alternations of `als`."""

LEAST = 1e-4
"""Share of its error that a sweep of `als` has to remove, or it is the last one."""

INERTIA = 1e-3
"""Weight of the distance to the parts before an update, relative to the mean energy of a component."""


def cp_rank(shape: tuple[int, ...]) -> int:
    """Return a rank that holds any kernel of a shape exactly: the product of the two smallest sizes.

    Examples:
        >>> cp_rank((64, 32, 9)), cp_rank((16, 3, 9))
        (288, 27)
    """
    smallest, middle, _ = sorted(shape)
    return smallest * middle


def compose(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return ``W[o, i, t] = sum_k A[o, k] B[i, k] C[t, k]``."""
    return (A @ (B.unsqueeze(1) * C.unsqueeze(0)).flatten(0, 1).mT).reshape(len(A), len(B), len(C))


def orthogonal_cp(tensor: Tensor) -> Parts:
    """Return an exact decomposition whose components are orthogonal, the largest first, in float64: singular values of slices.

    The shortest axis is turned to its principal directions; each of its slices is a matrix, and a component is a singular triplet of one of
    them. The norms are in the last part, columns of the others have length one.

    Args:
        tensor: ``(out, in, taps)``.

    Returns:
        ``A (out, r)``, ``B (in, r)``, ``C (taps, r)`` with ``r = cp_rank(tensor.shape)``.

    Examples:
        >>> kernel = torch.randn(6, 5, 4, dtype=torch.float64)
        >>> parts = orthogonal_cp(kernel)
        >>> parts[0].shape, bool((compose(*parts) - kernel).norm() < 1e-12)
        (torch.Size([6, 20]), True)
    """
    shortest = min(range(3), key=lambda axis: (tensor.shape[axis], -axis))
    slices = tensor.double().movedim(shortest, 0)
    unfolded = slices.flatten(1)
    turn: Tensor = torch.linalg.eigh(unfolded @ unfolded.mT).eigenvectors.flip(-1)
    U, S, Vh = torch.linalg.svd((turn.mT @ unfolded).reshape(slices.shape), full_matrices=False)
    order = S.flatten().argsort(descending=True, stable=True)
    found = [turn.repeat_interleave(S.shape[1], 1), U.movedim(0, 1).flatten(1), Vh.flatten(0, 1).mT]
    parts = [found.pop(0) if axis == shortest else None for axis in range(3)]
    A, B, C = (part if part is not None else found.pop(0) for part in parts)
    return A[:, order], B[:, order], C[:, order] * S.flatten()[order]


def gram(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return the products of the components with each other, ``(r, r)``."""
    return (A.mT @ A) * (B.mT @ B) * (C.mT @ C)


def normalized(A: Tensor, B: Tensor, C: Tensor) -> Parts:
    """Return the same components with columns of length one in the first two parts, the largest component first."""
    norms = [part.norm(dim=0) for part in (A, B)]
    A, B = (part / norm.clamp_min(torch.finfo(part.dtype).tiny) for part, norm in zip((A, B), norms, strict=True))
    C = C * norms[0] * norms[1]
    order = C.norm(dim=0).argsort(descending=True, stable=True)
    return A[:, order], B[:, order], C[:, order]


def squared_error(tensor: Tensor, parts: Parts) -> float:
    """Return ``||tensor - compose(parts)||_F^2``."""
    return float((tensor.double() - compose(*parts)).square().sum())


def als(tensor: Tensor, start: Parts, sweeps: int = SWEEPS) -> Parts:
    """Improve a decomposition by alternating least squares; its error never exceeds that of the start.

    Each part in turn is the solution of a least-squares problem, plus a small multiple of its distance to what it was before: so no system
    is singular, and the error falls with each update.

    Args:
        tensor: ``(out, in, taps)``.
        start: ``(out, r)``, ``(in, r)``, ``(taps, r)``.
        sweeps: alternations over the three parts, at most.

    Returns:
        The parts as `normalized` gives them, in float64.

    Examples:
        >>> kernel = torch.randn(6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> start = tuple(part[:, :6] for part in orthogonal_cp(kernel))
        >>> squared_error(kernel, als(kernel, start)) < squared_error(kernel, start)
        True

    Source: Kolda and Bader, SIAM Review 51 (2009), section 3.4; the distance to the last value: Li, Kindermann and Navasca, Linear Algebra
    Appl. 438 (2013) (regularized ALS).
    """
    W = tensor.double()
    A, B, C = (part.double() for part in start)
    energy, last = float(W.square().sum()), float("inf")
    for _ in range(sweeps):
        A, B, C = _balanced(A, B, C)
        A = _solved(_products(W, "oit,ir->rot", B, C), B, C, A)
        inner = torch.einsum("oit,or->rit", W, A)
        B = _solved((inner @ C.mT.unsqueeze(-1)).squeeze(-1).mT, A, C, B)
        seen = torch.einsum("rit,ir->tr", inner, B)
        C = _solved(seen, A, B, C)
        error = energy - 2 * float((seen * C).sum()) + float(gram(A, B, C).sum())
        if last - error <= LEAST * max(error, 0.0):
            break
        last = error
    found = normalized(A, B, C)
    return found if squared_error(W, found) <= squared_error(W, start) else normalized(*(part.double() for part in start))


def _products(W: Tensor, how: str, B: Tensor, C: Tensor) -> Tensor:
    """Return the kernel times the vectors of both other axes, ``(out, r)``."""
    return (torch.einsum(how, W, B) @ C.mT.unsqueeze(-1)).squeeze(-1).mT


def _solved(products: Tensor, first: Tensor, second: Tensor, before: Tensor) -> Tensor:
    """Return the part nearest to the kernel, given the other two, and near to what it was."""
    normal = (first.mT @ first) * (second.mT @ second)
    inertia = INERTIA * normal.diagonal().mean() + torch.finfo(normal.dtype).tiny
    normal = normal + inertia * torch.eye(len(normal), dtype=normal.dtype, device=normal.device)
    found: Tensor = torch.linalg.solve(normal, (products + inertia * before).mT).mT
    return found


def _balanced(A: Tensor, B: Tensor, C: Tensor) -> Parts:
    """Return the same components with equal norms in all three parts."""
    norms = torch.stack([part.norm(dim=0) for part in (A, B, C)])
    mean = norms.prod(0) ** (1 / 3)
    A, B, C = (part * (mean / norm.clamp_min(1e-300)) for part, norm in zip((A, B, C), norms, strict=True))
    return A, B, C


def cp(tensor: Tensor, rank: int, sweeps: int = SWEEPS) -> Parts:
    """Return a decomposition of a rank: the largest orthogonal components, improved by `als`; exact at `cp_rank`.

    Args:
        tensor: ``(out, in, taps)``.
        rank: in ``[1, cp_rank(tensor.shape)]``.
        sweeps: of `als`, at most.
    """
    A, B, C = orthogonal_cp(tensor)
    if rank == A.shape[1]:
        return A, B, C
    return als(tensor, (A[:, :rank], B[:, :rank], C[:, :rank]), sweeps)


def truncation_errors(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return the squared error of leaving out all components behind each rank, from none at all on: ``(r + 1,)``, float64."""
    products = gram(A.double(), B.double(), C.double())
    behind = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.cat([behind, behind.new_zeros(1)]).clamp(min=0)
