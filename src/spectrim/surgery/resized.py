"""The original network with layers as narrow as those of a file."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from spectrim.errors import LayerError
from spectrim.surgery.batchnorm import NORMS
from spectrim.surgery.exchange import duplicate
from spectrim.surgery.features import MATRICES, is_turned, matrix_of
from spectrim.surgery.narrowed import SIZES, features_of, keep, take


def resized(model: nn.Module, sizes: Mapping[str, Any]) -> nn.Module:
    """Return a copy whose layers have so many features, the first ones: where to read a file of a narrower network into.

    Args:
        model: the original network; left untouched.
        sizes: what `sizes_of` returned.

    Raises:
        LayerError: for a layer that the network does not have, or has with fewer features.
    """
    made = duplicate(model)
    modules = dict(made.named_modules())
    for name, wanted in sizes.items():
        layer: Any = modules.get(name)
        own = features_of(layer) if isinstance(layer, (*MATRICES, *NORMS)) or is_turned(layer) else None
        if own is None or not (isinstance(wanted, list) and len(wanted) == 2 and all(isinstance(size, int) for size in wanted)):
            raise LayerError(name, "is no linear layer, convolution or BatchNorm that could be narrower")
        if not all(1 <= size <= most for size, most in zip(wanted, own, strict=True)):
            raise LayerError(name, f"has {own} features, out and in; {wanted} are not among them")
        out, into = wanted
        if own[1] != into and not isinstance(layer, NORMS) and getattr(layer, "groups", 1) == 1:
            take(layer, matrix_of(layer)[:, :into])
        if own[0] != out:
            keep(layer, torch.arange(out))
    setattr(made, SIZES, {name: list(wanted) for name, wanted in sizes.items()})
    return made
