"""States of a network cut in several ways, without a copy for each: the changed tensors are exchanged and restored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

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
        factors: by the names of `named_factors`.
        tensors: values of the biases of factorized layers, and of all buffers.
    """

    factors: Mapping[str, Form]
    tensors: Mapping[str, Tensor]


def state_of(model: nn.Module) -> State:
    """Return the present state; its factors are those that the model holds, not copies.

    Args:
        model: factorized.
    """
    return State(dict(named_factors(model)), {name: tensor.detach().clone() for name, tensor in _tensors(model).items()})


@torch.no_grad()
def put(model: nn.Module, state: State) -> None:
    """Give a network the factors of a state, and the values of its tensors; in place.

    Args:
        model: that the state was taken of.
        state: from `state_of`.
    """
    exchange_factors(model, state.factors)
    for name, tensor in _tensors(model).items():
        if not torch.equal(tensor, state.tensors[name]):  # what did not change keeps its version
            tensor.copy_(state.tensors[name])


def exchange_factors(model: nn.Module, new: Mapping[str, Form]) -> None:
    """Replace the factors of a network wherever they are used; in place.

    Args:
        model: factorized.
        new: by the names of `named_factors`.
    """
    replaced: dict[Form, Form | None] = {}
    for site in list(sites(model)):
        own = replaced.setdefault(site.factors, new.get(site.name))
        if own is not None:
            site.layer.factors[site.key] = own


@torch.no_grad()
def cut_(model: nn.Module, ranks: Mapping[str, Size], decomposed: Decompositions, metric: Metric = "none") -> None:
    """Cut a network to ranks in place, as `prune` cuts a copy; biases absorb the mean where the calibration removed it.

    Args:
        model: at the state that was decomposed.
        ranks: by the names of `named_factors`.
        decomposed: the decompositions of this state.
        metric: what counts.
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
    exchange_factors(model, cut)


def copied(state: State) -> State:
    """Return a state whose factors can be changed while those of the first stay."""
    return State({name: factors.copied() for name, factors in state.factors.items()}, state.tensors)


def orthonormalize_(model: nn.Module) -> None:
    """Give every weight orthonormal factors, values descending; the same function."""
    exchange_factors(model, {name: factors.in_order() for name, factors in named_factors(model)})


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the biases of factorized layers and all buffers but those of factors, by name."""
    found: dict[str, Tensor] = {
        f"{name}:{key}": own for name, layer in named_layers(model) for key, own in layer._parameters.items() if own is not None
    }
    inside = {module for _, factors in named_factors(model) for module in factors.modules()}
    for name, module in model.named_modules():
        if module not in inside:
            found |= {f"{name}:{key}": buffer for key, buffer in module._buffers.items() if buffer is not None}
    return found
