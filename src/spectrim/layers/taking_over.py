"""Making one layer another in place."""

from collections.abc import Collection
from typing import Any

from torch import nn

from spectrim.layers.base import FactorizedLayer
from spectrim.layers.exchanged import Share
from spectrim.plain.exchanged import class_of

TORCHS = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def become(layer: nn.Module, plain: nn.Module, base: type | None = None) -> nn.Module:
    """Make a layer, dense or factorized, the ordinary layer `plain` in place, with its parameters; return it.

    It stays an instance of its original class where `plain` can stand for that (``stands_for``), and keeps its attributes, hooks, buffers
    and the parameters that have no part in `plain`.

    Args:
        layer: what everything else refers to.
        plain: gives its parts away.
        base: of a dense layer, the class above it whose behavior is exchanged; its own class when omitted.
    """
    held: Any = layer
    order, base = tuple(held._parameters), base or type(held)
    if isinstance(held, FactorizedLayer):
        order, base = held.parameter_order, type(held)._base  # type: ignore[attr-defined]
        held = held._stripped()
    ours: Any = type(plain)
    stands = getattr(ours, "stands_for", None)
    known = stands is not None and base.__module__.startswith(("torch.", "transformers.", "spectrim.plain."))
    for name in ours.takes_over(held) if known else order:
        held._parameters.pop(name, None)
    plain.train(held.training)
    held._parameters.update(plain._parameters)
    held._buffers.update(plain._buffers)
    held._modules.update(plain._modules)
    settings = {name: value for name, value in vars(plain).items() if name not in TORCHS}
    held.__dict__.update(settings | getattr(ours, "settings", {}))
    held.__class__ = class_of(ours, type(held), base) if stands is not None and stands(base) else ours
    return held  # type: ignore[no-any-return]


def write_(layer: nn.Module, share: Share, paying: Collection[str]) -> None:
    """Make a factorized layer ordinary in place: as two operations where a weight pays, else dense.

    Args:
        layer: factorized.
        share: makes the parameter for a tensor.
        paying: names of the weights to write as two operations.
    """
    held: Any = layer
    pair = held.split(share, paying)
    if pair is None:
        held.release(share)
    else:
        become(layer, pair)
