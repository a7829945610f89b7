"""How much work the calibration of one network is given: examples by what one costs, and the cuts that are tried."""

from typing import Any

from torch import nn

from spectrim.errors import SpectrimError
from spectrim.layers import named_factors
from spectrim.metrics.macs import count_macs

MOST, LEAST = 1024, 64
"""Examples of a calibration set, where nothing else is asked for."""

WORK = 1.3e11
"""Multiply-accumulates of the dense network on the calibration set: 1,024 examples up to 127 million each, 64 from 2 billion on."""

LARGE = 1e11
"""Operations that one cut may take, by `work_of_a_cut`, where several are made to choose the best: some ten seconds on one core."""


def examples_for(model: nn.Module, inputs: Any, batch: int) -> int:
    """Return the number of examples in the calibration set of a network, `LEAST` to `MOST`, by the cost of one.

    Args:
        model: dense.
        inputs: one batch.
        batch: examples in it.

    Examples:
        >>> import torch
        >>> examples_for(nn.Linear(4, 4), torch.zeros(1, 4), 1)
        1024
    """
    try:
        macs = count_macs(model, inputs, batch_size=batch)
    except SpectrimError:  # a kernel that cannot be counted
        return MOST
    return max(LEAST, min(MOST, round(WORK / max(macs, 1))))


def work_of_a_cut(model: nn.Module) -> float:
    """Return about how many operations the decompositions and the refit of all factorized weights take.

    Args:
        model: factorized.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> work_of_a_cut(factorize(nn.Linear(30, 30)))
        225000.0
    """
    shapes = [(factors.blocks, *factors.shape) for _, factors in named_factors(model)]
    return sum((blocks * (min(m, n) ** 3 / 3 + 8 * m * n * min(m, n)) for blocks, m, n in shapes), 0.0)
