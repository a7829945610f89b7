"""Copies of a network that cost almost no memory: what `merge` writes at a small rank or all dense, for counting."""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from spectrim.forms.form import Form
from spectrim.layers import named_factors, named_layers
from spectrim.protocols import Latencies
from spectrim.surgery.coverage import break_evens
from spectrim.surgery.merge import merge
from spectrim.surgery.states import exchange_factors


@dataclass(frozen=True)
class Only:
    """Stands for a latency table by which `merge` writes pairs for some weights alone, up to the ranks of another table.

    Args:
        names: of these weights, as in `coverage`.
        latency: decides up to which rank they are pairs; multiply-accumulates without one.
    """

    names: Collection[str]
    latency: Latencies | None = None

    def limits(self, model: nn.Module) -> dict[str, int]:
        """Return the largest rank of a pair for each weight: 0 for those that are not named."""
        return {name: limit if name in self.names else 0 for name, limit in break_evens(model, self.latency).items()}

    def seconds(self, name: str, rank: int | None) -> float | None:
        """Return None: nothing is timed."""
        return None

    def multiple(self, name: str) -> int:
        """Return 1."""
        return 1

    def verdict(self, name: str, rank: int) -> str:
        """Return what `merge` writes."""
        return "merges to two layers" if name in self.names else "merges to one dense layer"


@contextmanager
def thin(model: nn.Module, rank: int, *, own: bool = False) -> Iterator[nn.Module]:
    """Yield the network with at most the first `rank` columns and rows of each weight's factors.

    Args:
        model: factorized.
        rank: at least 1.
        own: whether the model may be changed inside and put back afterwards; a copy that shares its tensors is made otherwise.
    """
    held = dict(named_factors(model))
    small = {name: factors.first(rank).requires_grad_(False) for name, factors in held.items()}
    if not own:
        yield _with(model, {id(held[name]): factors for name, factors in small.items()})
        return
    exchange_factors(model, small)
    try:
        yield model
    finally:
        exchange_factors(model, held)


def dense(model: nn.Module) -> nn.Module:
    """Return the network with ordinary layers, whose weights are zeros, in place of the factorized ones.

    Zeros take no memory, but where a layer's own forward reads them.

    Args:
        model: factorized.
    """
    made = merge(_with(model, {id(f): f.first(1, device="meta").requires_grad_(False) for _, f in named_factors(model)}), latency=Only(()))
    held = dict(named_layers(model))
    devices = {name: next(iter(layer.named_factors()))[1].device for name, layer in held.items()}
    zeros: dict[int, nn.Parameter] = {}
    for name, device in devices.items():
        layer = made.get_submodule(name)
        for key, weight in list(layer.named_parameters(recurse=False)):
            if weight.is_meta and device.type != "meta":
                if id(weight) not in zeros:
                    shape = weight.shape if held[name].unobserved else ()  # grouped products, in forwards of users, need strides
                    zero = torch.zeros(shape, dtype=weight.dtype, device=device).expand(weight.shape)
                    zeros[id(weight)] = nn.Parameter(zero, requires_grad=False)
                setattr(layer, key, zeros[id(weight)])
    return made


def _with(model: nn.Module, factors: Mapping[int, Form]) -> nn.Module:
    """Return a copy of the model that shares its tensors, with other factors in place of those with these ids."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        memo |= {id(value): value for value in held if isinstance(value, Tensor)}
    return copy.deepcopy(model, memo | dict(factors))


@contextmanager
def true_values(network: nn.Module, model: nn.Module) -> Iterator[None]:
    """Inside, layers of `network` hand on what the model's layers of their names compute, so that it runs as the model does.

    Args:
        network: made of the model, at another rank or dense; its layers run all the same, and are counted.
        model: factorized.
    """
    names = [name for name, layer in named_layers(model)]
    names += [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention) and name not in names]

    def replaced(real: nn.Module) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            with _disable_current_modes():
                return real(*args, **kwargs)

        return hook

    places = dict(network.named_modules())
    found = [(places[name], model.get_submodule(name)) for name in names if name in places]
    handles = [place.register_forward_hook(replaced(real), with_kwargs=True) for place, real in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
