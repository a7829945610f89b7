"""Kernels as matrices and back: which axes of a kernel have their taps on the input side, and which on the output side."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from spectrim.errors import SettingError

Fold = Literal["channel", "spatial", "input", "tucker", "cp", "tt", "quaternion", "dense"]
"""``channel``: all taps on the input side; ``spatial``: those of the first axis that has some; ``input``: none; ``tucker``, ``cp`` and
``tt``: on no side; ``quaternion``: all on the input side of a matrix of quaternions; ``dense``: as ``channel``, and not decomposed."""


MATRICES: tuple[Fold, ...] = ("channel", "spatial", "input")
"""Folds that give a matrix."""


KERNELS: tuple[Fold, ...] = ("tucker", "cp", "tt")
"""Folds that leave the kernel a tensor, of one group."""


FOLDS: tuple[Fold, ...] = get_args(Fold)


def leading(fold: Fold, kernel: Sequence[int]) -> int:
    """Return how many axes of a kernel, from the first, have their taps on the input side of the matrix; the others on the output side.

    The input side is applied first: in a pair of convolutions these are the axes of the first one. An axis of size one has no taps, so
    that ``spatial`` divides the axes that have more: ``(3, 5)`` into 3 and 5, ``(1, 3, 3)`` into 3 and 3, ``(64, 1)`` not at all.

    Args:
        fold: which fold.
        kernel: sizes of the kernel's axes.

    Raises:
        SettingError: for an unknown fold.

    Examples:
        >>> [leading(fold, (1, 3, 3)) for fold in ("channel", "spatial", "input")]
        [3, 2, 0]
    """
    if fold == "dense":
        return len(kernel)
    if fold not in MATRICES:
        raise SettingError("fold", "scheme", got=fold, rule="'channel', 'spatial' or 'input'")
    if fold == "spatial":
        return next((axis + 1 for axis, size in enumerate(kernel) if size > 1), len(kernel))
    return len(kernel) if fold == "channel" else 0


def folds(kernel: Sequence[int]) -> tuple[Fold, ...]:
    """Return the folds of a kernel whose matrices differ, ``channel`` first.

    Examples:
        >>> folds((3, 3)), folds((64, 1)), folds((1, 1))
        (('channel', 'spatial', 'input'), ('channel', 'input'), ('channel',))
    """
    sizes = {fold: math.prod(kernel[: leading(fold, kernel)]) for fold in MATRICES}
    first = list(sizes.values())
    return tuple(fold for index, (fold, size) in enumerate(sizes.items()) if size not in first[:index])


def to_matrix(weight: Tensor, fold: Fold = "channel", groups: int = 1, transposed: bool = False) -> Tensor:
    """Fold a weight into a matrix ``(out * taps, in * taps)``: each axis of the kernel is on one of the two sides, see `leading`.

    ``channel``: ``(out, in*k...)``; ``spatial``: ``(out*kw, in*kh)`` of a 2-D kernel, ``(out*kh*kw, in*kt)`` of a 3-D one; ``input``:
    ``(out*k..., in)``. With groups, one matrix per block. ``tucker`` and ``cp`` are no matrices: ``(out, in, taps)``, of one group; nor is
    ``tt``: ``(out, in, k...)`` without the axes of a single tap.

    Args:
        weight: ``(out, in/groups, k...)``, or ``(in, out/groups, k...)`` when `transposed`; any number of kernel axes.
        fold: how kernel axes are folded.
        groups: number of blocks of the convolution.
        transposed: whether the weight is that of a transposed convolution.

    Returns:
        ``(rows, columns)``, or ``(groups, rows, columns)`` when ``groups > 1``. A copy or a view.

    Raises:
        SettingError: for an unknown fold.

    Examples:
        >>> import torch
        >>> kernel = torch.zeros(16, 128, 64)
        >>> to_matrix(kernel, "channel").shape, to_matrix(kernel, "input").shape
        (torch.Size([16, 8192]), torch.Size([1024, 128]))

    Source: Yang et al., arXiv 2004.09031, section 3.1 (``channel`` and ``spatial``); ``input`` is the mirror image of ``channel``.
    """
    if fold in KERNELS:
        kernel = weight.transpose(0, 1) if transposed else weight
        return kernel.reshape(*kernel.shape[:2], *(size for size in kernel.shape[2:] if size > 1)) if fold == "tt" else kernel.flatten(2)
    first, second = _taps(fold, weight.shape[2:])
    blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    if transposed:
        blocks = blocks.transpose(1, 2)
    out, in_ = blocks.shape[1:3]
    matrix = blocks.reshape(groups, out, in_, first, second).permute(0, 1, 4, 2, 3).reshape(groups, out * second, in_ * first)
    return matrix if groups > 1 else matrix[0]


def from_matrix(matrix: Tensor, shape: Sequence[int], fold: Fold = "channel", groups: int = 1, transposed: bool = False) -> Tensor:
    """Unfold a matrix into a weight of `shape`: the inverse of `to_matrix`.

    Args:
        matrix: ``(rows, columns)`` or ``(groups, rows, columns)``.
        shape: the weight's shape, as torch stores it.
        fold: how kernel axes were folded.
        groups: number of blocks of the convolution.
        transposed: whether the weight is that of a transposed convolution.

    Raises:
        SettingError: for an unknown fold.
    """
    if fold in KERNELS:
        kernels = matrix.reshape(*matrix.shape[:2], *shape[2:])
        return kernels.transpose(0, 1) if transposed else kernels
    lead, inner, *kernel = shape
    out, in_ = (inner, lead // groups) if transposed else (lead // groups, inner)
    first, second = _taps(fold, kernel)
    if second > 1:
        matrix = matrix.reshape(groups, out, second, in_, first).permute(0, 1, 3, 4, 2)
    blocks = matrix.reshape(groups, out, in_, *kernel)
    if transposed:
        blocks = blocks.transpose(1, 2)
    return blocks.reshape(tuple(shape))


def _taps(fold: Fold, kernel: Sequence[int]) -> tuple[int, int]:
    """Return the number of taps on the input side and on the output side."""
    count = leading(fold, kernel)
    return math.prod(kernel[:count]), math.prod(kernel[count:])
