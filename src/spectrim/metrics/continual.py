"""Measures of learning several tasks one after the other, from the accuracy matrix ``R``.

``R[i, j]`` is the accuracy on task ``j`` after training through task ``i``. Entries that a measure does not read may be NaN.
"""

import math

from jaxtyping import Float
from torch import Tensor

from spectrim.errors import SettingError

Matrix = Float[Tensor, "tasks tasks"]


def average_accuracy(R: Matrix) -> float:
    """Return the mean accuracy over all tasks after the last one: the mean of the last row.

    Args:
        R: the accuracy matrix, in any unit, which is that of the result.

    Raises:
        SettingError: for a matrix without tasks, or NaN in what is read.

    Examples:
        >>> import torch
        >>> round(average_accuracy(torch.tensor([[0.9, 0.1], [0.7, 0.8]])), 4)
        0.75
    """
    return _mean("average_accuracy", R[-1] if len(R) else R.flatten())


def forgetting(R: Matrix) -> float:
    """Return what was lost since a task was learned, the mean of ``R[j, j] - R[-1, j]`` over all tasks but the last.

    Args:
        R: as for `average_accuracy`, of two tasks at least.

    Raises:
        SettingError: for fewer tasks, or NaN in what is read.

    Examples:
        >>> import torch
        >>> round(forgetting(torch.tensor([[0.9, 0.1], [0.7, 0.8]])), 4)
        0.2

    Source: as Avalanche defines it, arXiv 2104.00405.
    Deviation: Chaudhry et al., arXiv 1801.10112, take the best earlier accuracy instead of ``R[j, j]``.
    """
    return _mean("forgetting", (R.diagonal() - R[-1])[:-1] if len(R) else R.flatten())


def backward_transfer(R: Matrix) -> float:
    """Return the mean of ``R[-1, j] - R[j, j]`` over all tasks but the last (BWT): `forgetting` with the other sign.

    Args:
        R: as for `forgetting`.

    Raises:
        SettingError: as for `forgetting`.

    Source: Lopez-Paz and Ranzato, "Gradient episodic memory", arXiv 1706.08840, section 2.
    """
    return _mean("backward_transfer", (R[-1] - R.diagonal())[:-1] if len(R) else R.flatten())


def forward_transfer(R: Matrix, untrained: Float[Tensor, " tasks"]) -> float:
    """Return what earlier tasks bring to one before it is learned, the mean of ``R[j - 1, j] - untrained[j]`` over all but the first (FWT).

    A network that has parts of its own for each task, such as a head, has no output for a task that it has not learned: then this is not
    defined, and entries above the diagonal are NaN.

    Args:
        R: as for `forgetting`.
        untrained: accuracy of the network on each task before any training.

    Raises:
        SettingError: as for `forgetting`.

    Examples:
        >>> import torch
        >>> round(forward_transfer(torch.tensor([[0.9, 0.3], [0.7, 0.8]]), torch.tensor([0.1, 0.1])), 4)
        0.2

    Source: Lopez-Paz and Ranzato, arXiv 1706.08840, section 2.
    """
    return _mean("forward_transfer", R.diagonal(1) - untrained[1:].to(R) if len(R) else R.flatten())


def _mean(name: str, entries: Tensor) -> float:
    """Return the mean of what a measure reads."""
    if not entries.numel():
        least = "one task" if name == "average_accuracy" else "two tasks"
        raise SettingError(name, "R", got="too few", rule=f"an accuracy matrix of at least {least}")
    value = float(entries.double().mean())
    if math.isnan(value):
        raise SettingError(name, "R", got="NaN", rule="known wherever the measure reads it", hint="evaluate these tasks, too")
    return value
