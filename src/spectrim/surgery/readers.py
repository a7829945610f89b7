"""Layers whose own forward reads their weight, and computes something else where that is a product: these stay dense."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import nn

from spectrim.errors import LayerError
from spectrim.layers import named_layers
from spectrim.protocols import LayerFilter
from spectrim.surgery.coverage import Coverage

T = TypeVar("T")

REASON = "its own forward computes something else where its weight is a product of factors"


def leaving_readers(
    low: nn.Module, build: Callable[[LayerFilter], nn.Module], work: Callable[[nn.Module], T], before: Mapping[str, str] | None = None
) -> tuple[nn.Module, T, dict[str, str]]:
    """Return what some work gives on a factorized network; where it finds that a layer's own forward does not run on factors, without that.

    Whether code that reads a weight gives the same with a product in its place is found by comparing outputs, see `same_function`. Errors
    about other layers are raised.

    Args:
        low: the factorized network.
        build: makes it again, from layers that a predicate selects.
        work: compares outputs, and raises a LayerError that names the layer.
        before: what was left dense already.

    Returns:
        The network, what the work gave, and by name the layers that were left dense, with the reason.
    """
    left = dict(before or {})
    try:
        return low, work(low), left
    except LayerError as error:
        layers = dict(named_layers(low))
        own = (name for name, layer in layers.items() if layer.own_forward)
        found = next((name for name in own if error.layer == name or error.layer.startswith(f"{name}.")), None)
        if found is None or len(layers) == 1:
            raise
    return leaving_readers(build(_only(layers.keys() - {found})), build, work, {**left, found: REASON})


def _only(names: set[str]) -> LayerFilter:
    return lambda name, module: name in names


def with_reasons(lines: Coverage, reasons: Mapping[str, str]) -> Coverage:
    """Return the lines of `coverage` with other reasons for some layers.

    Args:
        lines: as they are.
        reasons: by the names of the layers.
    """
    return Coverage(replace(line, reason=reasons[line.name]) if line.name in reasons else line for line in lines)
