"""Kernels as matrices and back."""

from collections.abc import Sequence
from typing import Literal

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
