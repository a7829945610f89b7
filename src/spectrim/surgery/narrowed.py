"""A network without some of its hidden units."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from spectrim.surgery.exchange import duplicate
from spectrim.surgery.hidden_units import CONVOLUTIONS, HiddenUnits


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
        reader = made.get_submodule(name)
        _read(reader, found, by_zeros)
    for found in () if by_zeros else kept.values():
        for name in (*found.units.makers, *found.units.through):
            _make(made.get_submodule(name), found.places)
    return made


def _read(reader: Any, found: Kept, by_zeros: bool) -> None:
    old, places = reader.weight, found.places.to(reader.weight.device)
    entries = found.weight.to(old).reshape(len(old), len(places), -1)
    if by_zeros:
        weight = torch.zeros_like(old)
        weight.view(len(old), found.units.count, -1)[:, places] = entries
    elif isinstance(reader, CONVOLUTIONS):
        weight, reader.in_channels = entries.reshape(len(old), len(places), *old.shape[2:]), len(places)
    else:
        weight = entries.reshape(len(old), -1)
        reader.in_features = weight.shape[1]
    reader.weight = nn.Parameter(weight.contiguous(), requires_grad=old.requires_grad)
    if found.shift is not None and reader.bias is not None:
        reader.bias.data += found.shift.to(reader.bias)


def _make(layer: Any, places: Tensor) -> None:
    """Leave out features of a layer that makes them, or that they go through."""
    count = len(places)
    for table in (layer._parameters, layer._buffers):
        for key, old in table.items():
            if old is not None and old.dim():
                entries = old.detach()[places.to(old.device)].clone()
                table[key] = nn.Parameter(entries, requires_grad=old.requires_grad) if table is layer._parameters else entries
    if isinstance(layer, nn.Linear):
        layer.out_features = count
    elif isinstance(layer, CONVOLUTIONS):
        depthwise = layer.groups > 1
        layer.out_channels = count
        if depthwise:
            layer.in_channels = layer.groups = count
    else:
        layer.num_features = count
