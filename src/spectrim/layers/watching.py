"""What one call of any module asks of factorized layers: their own answers, and those of attention, which reads its output projection."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from spectrim.layers.base import FactorizedLayer
from spectrim.layers.uses import Call, Features, arguments_of_attention, call_on


def runs_factors(module: nn.Module) -> bool:
    """Whether a module uses factors when it runs: a factorized layer, or attention, which reads its output projection uncalled."""
    return isinstance(module, FactorizedLayer | nn.MultiheadAttention)


def calls_for(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
    """Yield the uses of factorized weights in one call of a module of which `runs_factors` is true."""
    if isinstance(module, nn.MultiheadAttention) and isinstance(module.out_proj, FactorizedLayer):
        yield call_on(module.out_proj, "weight", arguments_of_attention(args, kwargs)[0])
    if isinstance(module, FactorizedLayer):
        yield from module.calls_for(args, kwargs)


def features_read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Features]:
    """Yield the features that factorized weights of a module read as they are."""
    if isinstance(module, FactorizedLayer):
        yield from module.features_read(args, kwargs)


def features_written(module: nn.Module, output: Any) -> Iterator[Features]:
    """Yield the features that are the product of a factorized weight of a module."""
    if isinstance(module, nn.MultiheadAttention):
        if isinstance(module.out_proj, FactorizedLayer):
            yield from module.out_proj.features_written(output[0])
    elif isinstance(module, FactorizedLayer):
        yield from module.features_written(output)
