"""Arguments and outputs as flat tensors, and the difference of two outputs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def compare_outputs(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference over all outputs, each as a fraction of the largest finite magnitude expected.

    Infinite where shapes differ, or where one is NaN or infinite and the other is not the same.

    Examples:
        >>> compare_outputs([torch.tensor([1.0, 3.0])], [torch.tensor([1.0, 4.0])])
        0.25
    """
    if [part.shape for part in found] != [part.shape for part in expected]:
        return math.inf
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        a, b = a.double(), b.double()
        finite = b.isfinite()
        same = (a == b) | (a.isnan() & b.isnan())
        if not (same | (finite & a.isfinite())).all():
            return math.inf
        a, b = a[finite], b[finite]
        if b.numel():
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(torch.float32).tiny)))
    return worst


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a value with their names: keys of dicts, else numbers."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, str(key))
    elif isinstance(value, tuple | list):
        for index, part in enumerate(value):
            yield from _tensors(part, f"{name}_{index}")
    elif value is not None and not isinstance(value, bool | int | float | str):
        leaves = tree_leaves(value)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise TypeError(f"holds a {type(value).__name__}, which is not made of tensors")
        for index, part in enumerate(leaves):
            yield f"{name}_{index}", part
