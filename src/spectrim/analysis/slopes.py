"""Lipschitz constants of modules without weights, means and indices."""

import math
from typing import Any

import torch
from torch import fx, nn

from spectrim.errors import LayerError, SettingError

ONE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Tanh, nn.Hardtanh, nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d)
SLOPES: dict[type[nn.Module], float] = {nn.Sigmoid: 0.25, nn.GELU: 1.129, nn.SiLU: 1.1, nn.Softmax: 1.0}
"""Modules, by the largest slope of each; those of GELU and SiLU are rounded up."""

KNOWN = "additions, concatenations, means, activations of slope one, pooling and layers with a known operator are supported"
"""What a bound can be made for."""


def constant_of(name: str, module: Any, shape: torch.Size) -> float:
    """Return the Lipschitz constant of a module that has no weights."""
    if isinstance(module, nn.LeakyReLU) and abs(module.negative_slope) > 1:
        return float(abs(module.negative_slope))
    if isinstance(module, ONE):
        return 1.0
    for kind, slope in SLOPES.items():
        if isinstance(module, kind):
            return slope
    if isinstance(module, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d):
        return math.sqrt(overlap(module, len(shape) - 2)[0])
    if isinstance(module, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d) and not module.ceil_mode:
        read, count = overlap(module, len(shape) - 2)
        if getattr(module, "divisor_override", None) is None and (module.count_include_pad or not any(tuples(module.padding, 1))):
            return math.sqrt(read / count)
    if isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d):
        axes = len(shape) - 2
        asked = (module.output_size,) * axes if isinstance(module.output_size, int | None) else tuple(module.output_size)
        out = [size if wanted is None else wanted for size, wanted in zip(shape[2:], asked, strict=True)]
        if all(size % wanted == 0 for size, wanted in zip(shape[2:], out, strict=True)):
            return 1 / math.sqrt(math.prod(size // wanted for size, wanted in zip(shape[2:], out, strict=True)))
    raise LayerError(name, f"is a {type(module).__name__}, whose Lipschitz constant is not known", hint=KNOWN)


def tuples(value: Any, axes: int) -> tuple[int, ...]:
    """Return one integer for each axis."""
    return (value,) * axes if isinstance(value, int) else tuple(value)


def overlap(pool: Any, axes: int) -> tuple[int, int]:
    """Return how many windows of a pooling layer read one input, at most, and how many inputs one window has."""
    if any(step != 1 for step in tuples(getattr(pool, "dilation", 1), axes)):
        raise SettingError(type(pool).__name__, "dilation", got=pool.dilation, rule="1")
    sizes, strides = tuples(pool.kernel_size, axes), tuples(pool.stride, axes)
    return math.prod(-(-size // step) for size, step in zip(sizes, strides, strict=True)), math.prod(sizes)


def averaged(node: fx.Node, shape: torch.Size) -> float:
    """Return ``1 / sqrt(count)`` for a mean over some dimensions, none of them the batch."""
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    chosen = {int(dim) % len(shape) for dim in (dims if isinstance(dims, tuple | list) else [dims])} if dims is not None else {0}
    if 0 in chosen:
        raise LayerError(node.name, "averages over the batch", hint="give the dimensions of the mean")
    return 1 / math.sqrt(math.prod(shape[dim] for dim in chosen))


def sliced(index: Any) -> bool:
    """Whether an index takes each entry once at most."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in parts)
