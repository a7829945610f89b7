"""The factorized layers, one file for each kind. `KINDS` is the table of what can be factorized; `register` adds a kind."""

from typing import Any, TypeGuard

from torch import nn

from spectrim.errors import LayerError
from spectrim.forms import Factors, Form
from spectrim.layers.attention import FactorizedMultiheadAttention, plain_attention
from spectrim.layers.base import FactorizedLayer
from spectrim.layers.conv import (
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConv3d,
    FactorizedConvTranspose1d,
    FactorizedConvTranspose2d,
    FactorizedConvTranspose3d,
)
from spectrim.layers.embedding import FactorizedEmbedding
from spectrim.layers.exchanged import Share
from spectrim.layers.forwards import renew
from spectrim.layers.linear import FactorizedConv1D, FactorizedLinear
from spectrim.layers.own import check_kind
from spectrim.layers.quaternion import FactorizedQConv1d, FactorizedQConv2d, FactorizedQConv3d, FactorizedQLinear
from spectrim.layers.reader import FactorizedReader
from spectrim.layers.recurrent import FactorizedGRU, FactorizedLSTM
from spectrim.layers.sharded import gathered
from spectrim.layers.site import Site, factor_name, factors_in, named_factors, named_layers, sites
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
    FactorizedQLinear,
    FactorizedQConv1d,
    FactorizedQConv2d,
    FactorizedQConv3d,
    FactorizedReader,
]
"""The first that accepts a layer is its kind."""

__all__ = [
    "KINDS",
    "FactorizedLayer",
    "Factors",
    "Form",
    "OneWeight",
    "Share",
    "Site",
    "factor_name",
    "factors_in",
    "gathered",
    "has_matrix",
    "is_factorized",
    "kind_of",
    "named_factors",
    "named_layers",
    "plain_attention",
    "register",
    "renew",
    "sites",
]


def register(kind: type[FactorizedLayer], layer: nn.Module, *inputs: Any) -> None:
    """Add a kind of layer to `KINDS`, for this process, so that `factorize` and the other verbs support it.

    The kind is checked against the laws of factorized layers on the example, in float64: `unfold` inverts `fold`, the forward computes
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
    if present is not None and present is not kind and present is not FactorizedReader:
        hint = f"a {type(layer).__name__} needs a separate class with a separate forward, so that the kinds can be told apart"
        raise LayerError(kind.__name__, f"its example is of the kind {present.__name__} already", hint=hint)
    check_kind(kind, layer, inputs)
    if kind not in KINDS:
        KINDS.insert(KINDS.index(FactorizedReader), kind)  # which takes what no other kind does


def kind_of(module: nn.Module) -> type[FactorizedLayer] | None:
    """Return the factorized class for a dense layer, or None."""
    return next((kind for kind in KINDS if kind.accepts(module)), None)


def is_factorized(module: nn.Module) -> TypeGuard[FactorizedLayer]:
    """Whether a module is a factorized layer at present."""
    return isinstance(module, FactorizedLayer)


def has_matrix(module: nn.Module) -> bool:
    """Whether a module is a layer that is factorized, or whose class can be."""
    return isinstance(module, FactorizedLayer) or kind_of(module) is not None
