"""States of a network cut in several ways, without a copy for each: the changed tensors are exchanged and restored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectrim.forms import Factors, Form, Size
from spectrim.forms.derived import product_with
from spectrim.layers import named_factors, named_layers, sites
from spectrim.surgery.decompositions import Decompositions, Metric
from spectrim.surgery.observing import absorbing


@dataclass(frozen=True)
class State:
    """The tensors that a cut, a refit and new BatchNorm statistics change.

    Attributes:
        factors: by the names of `named_factors`; those that a network holds, not copies.
        tensors: values of the biases of factorized layers, and of all buffers.
    """

    factors: Mapping[str, Form]
    tensors: Mapping[str, Tensor]


class Places:
    """Where a network holds what a cut changes; found once, for a network that is cut many times.

    Args:
        model: factorized.
    """

    def __init__(self, model: nn.Module) -> None:
        names: dict[Form, str] = {}
        self.uses = [(names.setdefault(site.factors, site.name), site.layer.factors, site.key) for site in sites(model)]
        inside = {module for factors in names for module in factors.modules()}
        self.slots = {
            f"{name}:{key}": (layer._parameters, key)
            for name, layer in named_layers(model)
            for key, own in layer._parameters.items()
            if own is not None
        }
        for name, module in model.named_modules():
            if module not in inside:
                self.slots |= {f"{name}:{key}": (module._buffers, key) for key, own in module._buffers.items() if own is not None}

    def tensors(self) -> dict[str, Tensor]:
        """Return the biases of factorized layers and all buffers but those of factors, by name."""
        held: list[tuple[str, Any]] = [(name, table[key]) for name, (table, key) in self.slots.items()]
        return dict(held)

    def state(self) -> State:
        """Return the present state; its factors are those that the model holds, not copies."""
        factors = {name: cast(Form, held._modules[key]) for name, held, key in self.uses}
        return State(factors, {name: own.detach().clone() for name, own in self.tensors().items()})

    @torch.no_grad()
    def put(self, state: State) -> None:
        """Give the network the factors of a state, and the values of its tensors; in place."""
        self.exchange(state.factors)
        for name, tensor in self.tensors().items():
            if not torch.equal(tensor, state.tensors[name]):  # what did not change keeps its version
                tensor.copy_(state.tensors[name])

    def exchange(self, new: Mapping[str, Form]) -> None:
        """Replace factors wherever they are used, by the names of `named_factors`; in place."""
        for name, held, key in self.uses:
            if name in new:
                held._modules[key] = new[name]


def exchange_factors(model: nn.Module, new: Mapping[str, Form]) -> None:
    """Replace the factors of a network wherever they are used; in place.

    Args:
        model: factorized.
        new: by the names of `named_factors`.
    """
    Places(model).exchange(new)


@torch.no_grad()
def cut_(
    model: nn.Module, ranks: Mapping[str, Size], decomposed: Decompositions, metric: Metric = "none", places: Places | None = None
) -> None:
    """Cut a network to ranks in place, as `prune` cuts a copy; biases absorb the mean where the calibration removed it.

    Args:
        model: at the state that was decomposed.
        ranks: by the names of `named_factors`.
        decomposed: the decompositions of this state.
        metric: what counts.
        places: of the network, where they are at hand.
    """
    held = decomposed.factors
    cut = {name: decomposed.cut(name, ranks[name], metric) for name in held}
    means = {} if decomposed.calibration is None or metric == "none" else decomposed.calibration.means
    for name, layer in absorbing(model).items() if means else ():
        if name in means and cut[name].rank < held[name].rank:
            mean = means[name].unsqueeze(-1)
            before, now = (product_with(cast(Factors, form), mean) for form in (held[name], cut[name]))
            bias = layer.bias
            assert isinstance(bias, Tensor)
            bias.add_((before - now).reshape(bias.shape).to(bias))
    (places or Places(model)).exchange(cut)


def copied(state: State) -> State:
    """Return a state whose factors can be changed while those of the first stay."""
    return State({name: factors.copied() for name, factors in state.factors.items()}, state.tensors)


def orthonormalize_(model: nn.Module) -> None:
    """Give every weight orthonormal factors, values descending; the same function."""
    exchange_factors(model, {name: factors.in_order() for name, factors in named_factors(model)})
