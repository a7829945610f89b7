"""Tensors in nested inputs, outputs and targets."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


def send(value: Any, model: nn.Module) -> Any:
    """Move tensors, in whatever they are nested, to the model's device; those made in inference mode become ordinary ones."""
    first = next((tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors), None)
    value = ordinary(value)
    tensors = tensors_of(value)
    if first is None or all(tensor.device == first.device for tensor in tensors):
        return value
    from accelerate.utils import send_to_device

    if dataclasses.is_dataclass(value) and not isinstance(value, type | Mapping):
        moved = {entry.name: send(getattr(value, entry.name), model) for entry in dataclasses.fields(value) if entry.init}
        return dataclasses.replace(value, **moved)
    return send_to_device(value, first.device)


def ordinary(value: Any) -> Any:
    """Return inputs or targets in which tensors made in inference mode are ordinary ones, which training may use."""
    if torch.is_inference_mode_enabled() or not any(tensor.is_inference() for tensor in tensors_of(value)):
        return value
    return tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, value)


def tensors_of(value: Any) -> list[Tensor]:
    """Return all tensors in an output or a target: a tensor, or tuples, lists, dicts and dataclasses of them.

    Examples:
        >>> [tensor.item() for tensor in tensors_of({"a": torch.tensor(1), "b": (torch.tensor(2), "text")})]
        [1, 2]
    """
    found = []
    for leaf in tree_leaves(dict(value) if isinstance(value, Mapping) else value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += [tensor for entry in dataclasses.fields(leaf) for tensor in tensors_of(getattr(leaf, entry.name))]
        elif isinstance(leaf, Mapping):
            found += tensors_of(leaf)
    return found
