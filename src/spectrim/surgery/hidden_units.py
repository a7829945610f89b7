"""Hidden units: features between layers that one layer alone reads, and nothing but operations on each of them by itself in between."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from spectrim.layers.taps import tap
from spectrim.metrics.calls import call_model
from spectrim.metrics.tensors import tensors_of
from spectrim.surgery.exchange import duplicate
from spectrim.surgery.features import Trace, Units
from spectrim.surgery.observing import isolated


@dataclass(frozen=True)
class HiddenUnits:
    """Features that can be left out one by one, by the names of the layers that have them.

    Attributes:
        reader: the only layer that reads them: linear, or a convolution without groups.
        makers: layers whose outputs they are, several where these are multiplied or added: up and gate.
        through: BatchNorms and depthwise convolutions in between.
        count: of them.
        taps: consecutive inputs of the reader that are one unit: positions of a channel behind `nn.Flatten`.
    """

    reader: str
    makers: tuple[str, ...]
    through: tuple[str, ...]
    count: int
    taps: int = 1


def hidden_units(model: nn.Module, inputs: Any) -> list[HiddenUnits]:
    """Return the hidden units of a network, in the order in which their readers are called.

    The network runs once, in eval mode. Each operation on the outputs of linear layers and convolutions is watched: elementwise ones,
    pools, BatchNorm, depthwise convolutions and moves of whole axes let features stay what they are; whatever else reads them (softmax,
    LayerNorm, an attention's heads, a second layer, the output of the network) ends the search, and they are not returned. Layers that
    run more than once, share a weight, are parametrized, or whose weight the network's own code reads are left alone.

    Args:
        model: dense; left untouched.
        inputs: one batch.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8), nn.Softmax(-1), nn.Linear(8, 4))
        >>> hidden_units(model, torch.zeros(1, 8))
        [HiddenUnits(reader='2', makers=('0',), through=(), count=32, taps=1)]
    """
    model = duplicate(model).eval().requires_grad_(False)
    trace = Trace(model)
    handles = [tap(module, trace.enter, trace.leave) for module in trace.names]
    try:
        with isolated(model), torch.no_grad(), trace:
            output = call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    trace.close(tensors_of(output))
    trace.close(entry for leaf in tree_leaves(output) for entry in getattr(leaf, "__dict__", {}).values())  # of a class of the user's
    return [found for units in trace.groups() if (found := _result(trace, units)) is not None]


def _result(trace: Trace, units: Units) -> HiddenUnits | None:
    """Return units that can be left out, else None."""
    ((reader, taps),) = units.readers
    members = [*units.makers, *units.through, reader]
    alone = len(set(members)) == len(members) and not trace.barred & set(members) and all(trace.calls[name] == 1 for name in members)
    if units.closed or not alone or units.count < 2:
        return None
    return HiddenUnits(reader, tuple(units.makers), tuple(units.through), units.count, taps)
