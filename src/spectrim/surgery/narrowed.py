"""A network without some of its hidden units."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from spectrim.surgery.exchange import FINISHED, duplicate
from spectrim.surgery.features import CONVOLUTIONS, is_turned, matrix_of
from spectrim.surgery.hidden_units import HiddenUnits

SIZES = "_narrowed_sizes"
"""Attribute of a network with narrower layers: their features ``[out, in]`` by name, without which a file does not fit the original."""


@dataclass(frozen=True, eq=False)
class Kept:
    """The hidden units that stay, and what reads them then.

    Attributes:
        units: of which some stay.
        places: of those, ascending; ``(kept,)``.
        weight: of the reader, refitted: ``(out, kept * taps)``, a convolution's kernels flattened.
        shift: added to the reader's bias, ``(out,)``; None without one.
    """

    units: HiddenUnits
    places: Int64[Tensor, " kept"]
    weight: Tensor
    shift: Tensor | None = None


@torch.no_grad()
def narrowed(model: nn.Module, kept: Mapping[str, Kept], *, by_zeros: bool = False) -> nn.Module:
    """Return a copy without the hidden units that do not stay: narrower layers of the same classes.

    Args:
        model: dense; left untouched.
        kept: by the name of the reader.
        by_zeros: leave all layers as wide as they are, and only let the readers take nothing from what would go: the same function.
    """
    made = duplicate(model)
    for name, found in kept.items():
        _read(made.get_submodule(name), found, by_zeros)
    touched = dict.fromkeys(kept)
    for found in () if by_zeros else kept.values():
        for name in (*found.units.makers, *found.units.through):
            touched[name] = None
            keep(made.get_submodule(name), found.places)
    if kept and not by_zeros:
        setattr(made, SIZES, sizes_of(made) | {name: features_of(made.get_submodule(name)) for name in touched})
        for mark in FINISHED:
            mark(made)
    return made


def sizes_of(model: nn.Module) -> dict[str, list[int]]:
    """Return the features ``[out, in]`` of the layers that are narrower than those of the original network, by name."""
    return dict(getattr(model, SIZES, {}))


def features_of(layer: Any) -> list[int]:
    """Return the features of a layer, out and in."""
    if isinstance(layer, nn.Linear):
        return [layer.out_features, layer.in_features]
    if is_turned(layer):
        return [layer.nf, layer.nx]
    return [layer.out_channels, layer.in_channels] if isinstance(layer, CONVOLUTIONS) else [layer.num_features] * 2


def _read(reader: Any, found: Kept, by_zeros: bool) -> None:
    """Let a layer read some features only, with the weight refitted to them."""
    old, places = matrix_of(reader), found.places.to(reader.weight.device)
    entries = found.weight.to(old).reshape(len(old), len(places), -1)
    if by_zeros:
        weight = torch.zeros(old.shape, dtype=old.dtype, device=old.device)
        weight.view(len(old), found.units.count, -1)[:, places] = entries
    else:
        weight = entries.reshape(len(old), -1) if old.dim() == 2 else entries.reshape(len(old), len(places), *old.shape[2:])
    take(reader, weight)
    if found.shift is not None and reader.bias is not None:
        reader.bias.data += found.shift.to(reader.bias)


def take(layer: Any, weight: Tensor) -> None:
    """Give a layer another weight ``(out, in, ...)``, which reads as many features as it has columns."""
    turned = is_turned(layer)
    name = "nx" if turned else "in_features" if isinstance(layer, nn.Linear) else "in_channels"
    setattr(layer, name, weight.shape[1])
    layer.weight = nn.Parameter((weight.mT if turned else weight).contiguous(), requires_grad=layer.weight.requires_grad)


def keep(layer: Any, places: Tensor) -> None:
    """Leave out features of a layer that makes them, or that they go through."""
    count, turned = len(places), is_turned(layer)
    for table in (layer._parameters, layer._buffers):
        for key, old in table.items():
            if old is not None and old.dim():
                entries = old.detach().index_select(old.dim() - 1 if turned else 0, places.to(old.device))
                table[key] = nn.Parameter(entries, requires_grad=old.requires_grad) if table is layer._parameters else entries
    if isinstance(layer, CONVOLUTIONS):
        depthwise = layer.groups > 1
        layer.out_channels = count
        if depthwise:
            layer.in_channels = layer.groups = count
    else:
        setattr(layer, "nf" if turned else "out_features" if isinstance(layer, nn.Linear) else "num_features", count)
