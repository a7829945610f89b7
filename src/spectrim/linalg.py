"""Pure tensor maths: kernels as matrices, exact singular value decompositions of matrices and of factor products."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Fold = Literal["channel", "spatial"]


def to_matrix(weight: Tensor, fold: Fold = "channel", groups: int = 1, transposed: bool = False) -> Tensor:
    """Fold a weight into a matrix with the output side first.

    ``channel``: ``(out, in*k...)``; ``spatial`` (2-D kernels): ``(out*kw, in*kh)``. With groups, one matrix per block.

    Args:
        weight: ``(out, in/groups, k...)``, or ``(in, out/groups, k...)`` when `transposed`; any number of kernel axes.
        fold: how kernel axes are folded.
        groups: number of blocks of the convolution.
        transposed: whether the weight is that of a transposed convolution.

    Returns:
        ``(rows, columns)``, or ``(groups, rows, columns)`` when ``groups > 1``. A copy or a view.

    Source: Yang et al., arXiv 2004.09031, section 3.1.
    """
    blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    if transposed:
        blocks = blocks.transpose(1, 2)
    if fold == "spatial":
        groups_, out, in_, height, width = blocks.shape
        matrix = blocks.permute(0, 1, 4, 2, 3).reshape(groups_, out * width, in_ * height)
    else:
        matrix = blocks.reshape(groups, blocks.shape[1], -1)
    return matrix if groups > 1 else matrix[0]


def from_matrix(matrix: Tensor, shape: Sequence[int], fold: Fold = "channel", groups: int = 1, transposed: bool = False) -> Tensor:
    """Unfold a matrix into a weight of `shape`: the inverse of `to_matrix`.

    Args:
        matrix: ``(rows, columns)`` or ``(groups, rows, columns)``.
        shape: the weight's shape, as torch stores it.
        fold: how kernel axes were folded.
        groups: number of blocks of the convolution.
        transposed: whether the weight is that of a transposed convolution.
    """
    first, second, *kernel = shape
    out, in_ = (second, first // groups) if transposed else (first // groups, second)
    if fold == "spatial":
        height, width = kernel
        blocks = matrix.reshape(groups, out, width, in_, height).permute(0, 1, 3, 4, 2)
    else:
        blocks = matrix.reshape(groups, out, in_, *kernel)
    if transposed:
        blocks = blocks.transpose(1, 2)
    return blocks.reshape(tuple(shape))


def svd(matrix: Float[Tensor, "*blocks out in_"]) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition in double precision, values descending.

    Returns:
        ``U (..., out, full)``, ``S (..., full)``, ``Vh (..., full, in)`` in float64, ``full = min(out, in)``.
    """
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U, S, Vh


def svd_of_product(
    U: Float[Tensor, "*blocks out rank"], S: Float[Tensor, "*blocks rank"], Vh: Float[Tensor, "*blocks rank in_"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact singular value decomposition of ``U diag(|S|) Vh``, without forming the product.

    QR of both factors, then the SVD of the small core: ``O((out + in) rank^2 + rank^3)``.

    Args:
        U: left factor; its columns need not be orthonormal.
        S: its absolute values enter the product.
        Vh: right factor; its rows need not be orthonormal.

    Returns:
        ``U (..., out, r)``, ``S (..., r)`` descending, ``Vh (..., r, in)`` in float64 with orthonormal columns and rows,
        ``r = min(out, rank, in)``.
    """
    left, left_core = torch.linalg.qr(U.double())
    right, right_core = torch.linalg.qr(Vh.double().mT)
    core_U, core_S, core_Vh = torch.linalg.svd((left_core * S.double().abs().unsqueeze(-2)) @ right_core.mT, full_matrices=False)
    return left @ core_U, core_S, core_Vh @ right.mT


def tail_energy(singular_values: Float[Tensor, " full"]) -> Float[Tensor, " full_plus_one"]:
    """Energy discarded at every rank: entry ``r`` is the sum of all but the ``r`` largest squared values; float64.

    The squared Frobenius error of the best rank-r approximation (Eckart and Young, 1936).

    Examples:
        >>> tail_energy(torch.tensor([3.0, 1.0, 2.0])).tolist()
        [14.0, 5.0, 1.0, 0.0]
    """
    squares = singular_values.detach().double().square().sort().values
    return torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)


def rank_at_energy(singular_values: Float[Tensor, " full"], keep: float) -> int:
    """Return the smallest rank, at least 1, whose largest values hold the fraction `keep` of the sum of squares; 1 for zeros alone.

    Examples:
        >>> rank_at_energy(torch.tensor([3.0, 1.0, 2.0]), 0.9)
        2
    """
    tail = tail_energy(singular_values)
    allowed = (1 - keep) * (1 + 1e-12) * tail[0]  # the slack is for the rounding of 1 - keep: 9 of 10 equal values do hold 0.9
    return max(1, int((tail > allowed).sum()))


def pooled_spectrum(S: Float[Tensor, "*blocks rank"]) -> Float[Tensor, " rank"]:
    """Collapse the blocks of a grouped layer to one spectrum whose tail energies are the sums over blocks."""
    ordered = S.detach().double().abs().sort(dim=-1, descending=True).values
    return ordered if S.dim() == 1 else ordered.square().flatten(0, -2).sum(0).sqrt()


def orthogonality_defect(U: Float[Tensor, "*blocks out rank"]) -> float:
    """Return ``||U^T U - I||_F / sqrt(rank)``, the largest over blocks: 0 for orthonormal columns."""
    U = U.detach().double()
    gram = U.mT @ U - torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
    return float(torch.linalg.matrix_norm(gram).max()) / math.sqrt(U.shape[-1])
