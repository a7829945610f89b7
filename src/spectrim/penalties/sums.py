"""Helpers of the penalties: sums over layers in few large operations, and validation of the strength."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from spectrim.errors import SettingError

STACKED = 2**22
"""Largest number of elements copied into one stack: larger matrices use the machine fully without batching."""


def check_weight(owner: object, weight: float) -> None:
    """Raise a SettingError unless `weight` is a finite number >= 0."""
    if not 0 <= weight < float("inf"):
        raise SettingError(type(owner).__name__, "weight", got=weight, rule="a finite number >= 0")


def check_positive(owner: object, **settings: float) -> None:
    """Raise a SettingError unless each setting is a finite number > 0."""
    for name, value in settings.items():
        if not 0 < value < float("inf"):
            raise SettingError(type(owner).__name__, name, got=value, rule="a finite number > 0")


def check_every(owner: object, every: int) -> None:
    """Raise a SettingError unless `every` is a whole number of steps, >= 1."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise SettingError(type(owner).__name__, "every", got=every, rule="a whole number of steps, >= 1")


def total(model: nn.Module, terms: Sequence[Tensor]) -> Tensor:
    """Sum scalars, on the device of the first; zero, on the model's device, for a model without factors."""
    if terms:
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()
    parameter = next(model.parameters(), torch.zeros(()))
    return torch.zeros((), device=parameter.device)


def batches(tensors: Iterable[Tensor], axes: int = 2) -> list[list[Tensor]]:
    """Group tensors that agree in their last `axes` axes, dtype, device and `requires_grad`; half-precision ones become float32.

    A group of several has at most `STACKED` elements.
    """
    groups: dict[tuple[object, ...], list[Tensor]] = {}
    for tensor in tensors:
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        groups.setdefault((tensor.shape[-axes:], tensor.dtype, tensor.device, tensor.requires_grad), []).append(tensor)
    chunks: list[list[Tensor]] = []
    for group in groups.values():
        count = max(1, STACKED // max(tensor.numel() for tensor in group))
        chunks.extend(group[start : start + count] for start in range(0, len(group), count))
    return chunks


def stack(group: Sequence[Tensor], axes: int = 2) -> Tensor:
    """Join a group along one leading axis; a group of one is not copied."""
    flat = [tensor.reshape(-1, *tensor.shape[-axes:]) for tensor in group]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def unstack(stacked: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """Split the result of `stack` into the shapes of its group."""
    size = stacked[0].numel()
    parts = torch.split(stacked, [shape.numel() // size for shape in shapes])
    return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
