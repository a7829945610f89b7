"""Biases and other vectors on levels of their own, which are many: they are few numbers."""

import numpy as np
import torch
from torch import Tensor, nn

from spectrim.checks import check, outside_inference_mode, unwrapped
from spectrim.errors import SettingError
from spectrim.layers import named_layers
from spectrim.surgery.exchange import duplicate

__all__ = ["round_vectors"]

BIASES, VECTORS = 127, 2047
"""Levels on each side of zero: of biases, and of other vectors."""


@outside_inference_mode
def round_vectors(model: nn.Module, *, biases: int = BIASES, others: int = VECTORS) -> nn.Module:
    """Return a copy whose biases and other vectors lie on levels, as `round_to` leaves them; matrices and buffers stay as they are.

    Training moves biases off their levels, and `pack` then writes them in float32: in a small network a tenth of the file.

    Args:
        model: dense or merged. It is left untouched.
        biases: levels on each side of zero of parameters named ``bias``, at least 1; the largest value is one of them.
        others: those of other vectors, such as the scales of normalization.

    Raises:
        SettingError: for a number of levels below 1, or a factorized network.

    Examples:
        >>> net = nn.Linear(4, 64)
        >>> len(round_vectors(net, biases=3).bias.unique()) <= 7, torch.equal(round_vectors(net).weight, net.weight)
        (True, True)
    """
    check("round_vectors", model=model)
    for name, most in {"biases": biases, "others": others}.items():
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise SettingError("round_vectors", name, got=most, rule="an integer of at least 1")
    model = unwrapped(model)
    if next(named_layers(model), None) is not None:
        raise SettingError("round_vectors", "model", got="a factorized network", rule="of ordinary layers", hint="call merge(model) first")
    made = duplicate(model)
    for name, vector in made.named_parameters():
        if vector.dim() == 1:
            to_levels_(vector, biases if name.rpartition(".")[2].startswith("bias") else others)
    return made


def to_levels_(vector: Tensor, most: int) -> None:
    """Round a vector, in place, to that many levels on each side of zero."""
    if vector.numel() and (largest := float(vector.detach().abs().max())) > 0:
        step = float(np.float32(largest / most))
        put_(vector, np.rint(vector.detach().double().cpu().numpy() / step), step)


def put_(tensor: Tensor, levels: np.ndarray, step: float) -> None:
    """Set a tensor, in place, to levels times a step."""
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(levels.astype(np.float32) * np.float32(step)))
