"""Pretrained weights from the data folder, strictly by key."""

from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from spectrim.errors import FormatError
from spectrim.zoo.data import data_file

Model = TypeVar("Model", bound=nn.Module)


def load_weights(model: Model, path: str) -> Model:
    """Fill a model from a safetensors file; every key must be in both (tied tensors are stored once).

    Args:
        model: receives the weights in place; discard it if this raises.
        path: relative to `data_folder`.

    Returns:
        The same model.

    Raises:
        FormatError: the file is missing, truncated, not safetensors, or holds other keys or shapes.
    """
    file = data_file(path, "safetensors file with the pretrained weights")
    try:
        load_model(model, file)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise FormatError(file, f"does not hold the weights of {type(model).__name__}: {error}") from error
    return model
