"""What a forward pass asks of factorized layers: which weight met which input, and which features it read and wrote."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from spectrim.forms.form import Form
from spectrim.layers.geometry import memory_format_of

if TYPE_CHECKING:
    from spectrim.layers.base import FactorizedLayer

Work = Callable[[int | None], float]
"""Multiply-accumulates of one use of a weight at a rank, or dense for None."""

Side = Literal["rows", "columns"]
"""Of a weight: its outputs or its inputs."""


@dataclass(frozen=True)
class Call:
    """One use of a factorized weight as a model runs.

    Attributes:
        layer: that runs.
        weight: name of its weight.
        shape: of the input: ``(time, batch, features)`` for a recurrent layer, however it came; None for a packed projection of a query and
            a key that differ, which is no single product.
        dtype: of the input.
        memory_format: of the input.
        macs: what it costs.
    """

    layer: "FactorizedLayer"
    weight: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype
    memory_format: torch.memory_format
    macs: Work


@dataclass(frozen=True)
class Features:
    """Features that a weight reads as they are, or writes.

    Attributes:
        factors: the weight.
        side: of the weight, on which the features are.
        tensor: the input, or the output.
        axis: of the tensor along which the features lie.
    """

    factors: Form
    side: Side
    tensor: Tensor
    axis: int


def call_on(layer: "FactorizedLayer", weight: str, x: Tensor, shape: tuple[int, ...] | None = None) -> Call:
    """Return the use of one weight on an input; `shape` as in `Call` where it is not that of the input."""
    work = partial(_work, layer, weight, tuple(x.shape))
    return Call(layer, weight, shape or tuple(x.shape), x.dtype, memory_format_of(x), work)


def _work(layer: "FactorizedLayer", weight: str, shape: tuple[int, ...], rank: int | None) -> float:
    return layer.written_work(weight, rank, shape)


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a layer's input, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


def arguments_of_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value, however they were passed."""
    query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
    return query, key, value
