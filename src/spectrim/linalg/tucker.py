"""Tucker-2 decompositions of kernels ``(out, in, taps)``: bases of both channel axes and a core."""

import torch
from torch import Tensor

from spectrim.linalg.spectral import svd

SWEEPS = 2
"""Alternations of `hooi`; on trained kernels a third one lowers the error by less than a thousandth of it."""


def basis(tensor: Tensor, axis: int, rank: int) -> Tensor:
    """Return the leading left singular vectors of a tensor unfolded along an axis: ``(size, rank)``, float64.

    Args:
        tensor: ``(out, in, taps)``.
        axis: 0 or 1.
        rank: at most the size of the axis.
    """
    unfolded = tensor.double().movedim(axis, 0).flatten(1)
    if unfolded.shape[0] > unfolded.shape[1]:  # a null space, which eigenvectors of the Gram matrix mix with the smallest values
        U = svd(unfolded)[0]
        return U[:, :rank] if rank <= U.shape[1] else torch.linalg.qr(U, mode="complete").Q[:, :rank]
    vectors: Tensor = torch.linalg.eigh(unfolded @ unfolded.mT).eigenvectors
    return vectors.flip(-1)[:, :rank]


def core_of(tensor: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return ``tensor x_1 A^T x_2 B^T``: ``(out, in, taps)``, ``(out, r)``, ``(in, s)`` → ``(r, s, taps)``."""
    return torch.einsum("oit,or,is->rst", tensor.double(), A.double(), B.double())


def hosvd(tensor: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``A (out, r)``, ``core (r, s, taps)``, ``B (in, s)`` of the higher-order SVD, in float64; exact at full size.

    Slices of the core are ordered: the norm of ``core[i]`` and of ``core[:, j]`` falls.

    Args:
        tensor: ``(out, in, taps)``.
        size: ``(r, s)``.

    Source: De Lathauwer, De Moor and Vandewalle, SIAM J. Matrix Anal. Appl. 21 (2000), section 3.
    """
    A, B = basis(tensor, 0, size[0]), basis(tensor, 1, size[1])
    return A, core_of(tensor, A, B), B


def nested_path(energy: Tensor, out: int, in_: int, taps: int) -> tuple[tuple[int, int], ...]:
    """Return sizes from ``(1, 1)`` to the whole core, each with one more of the two than the one before.

    The next one is that which holds more energy for each number that it stores.

    Args:
        energy: ``(r, s)``, squares of the core summed over taps.
        out: output channels, for what a size stores: ``out r + taps r s + in s``.
        in_: input channels.
        taps: of the kernel.
    """
    (R, S), inside = energy.shape, energy.cumsum(0).cumsum(1).tolist()
    size, path = (1, 1), [(1, 1)]
    while size != (R, S):
        (r, s), here = size, inside[size[0] - 1][size[1] - 1]
        steps = [((r + 1, s), out + taps * s)] * (r < R) + [((r, s + 1), in_ + taps * r)] * (s < S)
        size = max(steps, key=lambda step: (inside[step[0][0] - 1][step[0][1] - 1] - here) / step[1])[0]
        path.append(size)
    return tuple(path)


def hooi(tensor: Tensor, size: tuple[int, int], sweeps: int = SWEEPS) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts of `hosvd`, improved by alternating least squares: each sweep lowers the error or leaves it.

    Args:
        tensor: ``(out, in, taps)``.
        size: ``(r, s)``.
        sweeps: alternations over both bases, >= 0.

    Examples:
        >>> kernel = torch.randn(6, 5, 9, dtype=torch.float64)
        >>> def error(parts):
        ...     A, core, B = parts
        ...     return float((torch.einsum("rst,or,is->oit", core, A, B) - kernel).norm())
        >>> error(hooi(kernel, (3, 2))) <= error(hosvd(kernel, (3, 2))), error(hosvd(kernel, (6, 5))) < 1e-12
        (True, True)

    Source: De Lathauwer, De Moor and Vandewalle, SIAM J. Matrix Anal. Appl. 21 (2000), 1324 (higher-order orthogonal iteration).
    """
    A, core, B = hosvd(tensor, size)
    if size == tuple(tensor.shape[:2]):
        return A, core, B
    for _ in range(sweeps):
        A = basis(torch.einsum("oit,is->ost", tensor.double(), B), 0, size[0])
        B = basis(torch.einsum("oit,or->rit", tensor.double(), A), 1, size[1])
    turned = hosvd(core_of(tensor, A, B), size)  # in order of the norms of the core's slices
    return A @ turned[0], turned[1], B @ turned[2]
