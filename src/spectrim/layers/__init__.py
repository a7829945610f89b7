"""The factorized layers, one file for each kind. `KINDS` is the table of what can be factorized; `register` adds one of your own."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from spectrim.errors import LayerError
from spectrim.forms.svd import Factors
from spectrim.layers.attention import FactorizedMultiheadAttention, plain_attention
from spectrim.layers.base import FactorizedLayer, Share
from spectrim.layers.conv import (
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConv3d,
    FactorizedConvTranspose1d,
    FactorizedConvTranspose2d,
    FactorizedConvTranspose3d,
)
from spectrim.layers.embedding import FactorizedEmbedding
from spectrim.layers.linear import FactorizedConv1D, FactorizedLinear
from spectrim.layers.own import check_kind
from spectrim.layers.recurrent import FactorizedGRU, FactorizedLSTM
from spectrim.layers.taking_over import renew
from spectrim.layers.weights import OneWeight

KINDS: list[type[FactorizedLayer]] = [
    FactorizedLinear,
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConv3d,
    FactorizedConvTranspose1d,
    FactorizedConvTranspose2d,
    FactorizedConvTranspose3d,
    FactorizedEmbedding,
    FactorizedLSTM,
    FactorizedGRU,
    FactorizedMultiheadAttention,
    FactorizedConv1D,
]
"""The first that accepts a layer is its kind."""

__all__ = [
    "KINDS",
    "FactorizedLayer",
    "Factors",
    "OneWeight",
    "Share",
    "kind_of",
    "named_factors",
    "named_layers",
    "plain_attention",
    "register",
    "renew",
]


def register(kind: type[FactorizedLayer], layer: nn.Module, *inputs: Any) -> None:
    """Add a kind of layer of your own to `KINDS`, for this process: `factorize` and all that follows then knows it.

    The kind is held to the laws of every factorized layer on the example given, in float64: `unfold` inverts `fold`, the forward computes
    what the dense one does, with composed weights and as two operations, `split` and `release` what the factorized layer does, `work` is
    proportional to the rank, and a `OneWeight` multiplies its folded matrix with its `input_rows`. Registering a kind again does nothing.

    Args:
        kind: the factorized class: a `FactorizedLayer`, or a `OneWeight` when its sole weight is called ``weight``.
        layer: a small dense layer of that kind, on the CPU, with different sizes along different axes; it is left untouched.
        inputs: what it is called with.

    Raises:
        LayerError: when a law does not hold, or when `layer` is of another kind already.

    Examples:
        >>> import torch
        >>> register(FactorizedLinear, nn.Linear(4, 3), torch.randn(2, 4))
    """
    present = kind_of(layer)
    if present is not None and present is not kind:
        hint = f"a {type(layer).__name__} needs a class and a forward of its own to be told apart"
        raise LayerError(kind.__name__, f"its example is of the kind {present.__name__} already", hint=hint)
    check_kind(kind, layer, inputs)
    if kind not in KINDS:
        KINDS.append(kind)


def kind_of(module: nn.Module) -> type[FactorizedLayer] | None:
    """Return the factorized class for a dense layer, or None."""
    return next((kind for kind in KINDS if kind.accepts(module)), None)


def named_layers(model: nn.Module) -> Iterator[tuple[str, FactorizedLayer]]:
    """Yield ``(name, layer)`` of every factorized layer, shared ones once."""
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLayer):
            yield name, module


def named_factors(model: nn.Module) -> Iterator[tuple[str, Factors]]:
    """Yield ``(name, factors)`` of every factorized weight, tied ones once, under the first name.

    The name is the layer's (``layer1.0.conv1``); layers with several weights add the weight's (``lstm.weight_ih_l0``).
    """
    seen: set[int] = set()
    for layer_name, layer in named_layers(model):
        for weight, factors in layer.named_factors():
            if id(factors) not in seen:
                seen.add(id(factors))
                yield factor_name(layer_name, weight), factors


def factor_name(layer: str, weight: str) -> str:
    """Join a layer's and a weight's name; a sole ``weight`` goes by the layer's."""
    return layer if weight == "weight" else f"{layer}.{weight}".removeprefix(".")
