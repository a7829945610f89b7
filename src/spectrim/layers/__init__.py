"""The factorized layers, one file for each kind. `KINDS` is the table of what can be factorized."""

from collections.abc import Iterator

from torch import nn

from spectrim.layers.attention import FactorizedMultiheadAttention, plain_attention
from spectrim.layers.base import FactorizedLayer, Share, renew
from spectrim.layers.conv import (
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConv3d,
    FactorizedConvTranspose1d,
    FactorizedConvTranspose2d,
    FactorizedConvTranspose3d,
)
from spectrim.layers.embedding import FactorizedEmbedding
from spectrim.layers.factors import Factors
from spectrim.layers.linear import FactorizedConv1D, FactorizedLinear
from spectrim.layers.recurrent import FactorizedGRU, FactorizedLSTM

KINDS: tuple[type[FactorizedLayer], ...] = (
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
)

__all__ = ["KINDS", "FactorizedLayer", "Factors", "Share", "kind_of", "named_factors", "named_layers", "plain_attention", "renew"]


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
