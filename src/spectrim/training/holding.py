"""Courses on dense weights: which parameters a pattern means, and which of their entries are free to move."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectrim.errors import LayerError, SettingError
from spectrim.projections.counts import count_of

T = TypeVar("T")


def is_meant(name: str, parameter: Tensor, pattern: str) -> bool:
    """Whether a pattern means a parameter: a glob over its name or the name of a module that holds it.

    Weights have two axes or more; a vector (a bias, the scale of a normalization, the singular values ``S``) is meant only by a pattern
    that ends on its own name, such as ``*.S`` or ``fc1.bias``.

    Examples:
        >>> weight, bias = nn.Linear(2, 2).parameters()
        >>> [is_meant("fc1.weight", weight, pattern) for pattern in ("*", "fc*", "fc1", "fc1.weight", "fc")]
        [True, True, True, True, False]
        >>> [is_meant("fc1.bias", bias, pattern) for pattern in ("*", "fc1", "*.bias")]
        [False, False, True]
    """
    if not (fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")):
        return False
    return parameter.dim() > 1 or pattern.rpartition(".")[2] == name.rpartition(".")[2]


def check_patterns(owner: str, given: Mapping[str, Any], contract: str, method: str) -> None:
    """Raise a SettingError unless these are values with a method, by pattern."""
    if not isinstance(given, Mapping) or not given or not all(isinstance(pattern, str) for pattern in given):
        raise SettingError(owner, "projections", got=given, rule='a dict {pattern: projection}, such as {"fc*": TopK(0.1)}')
    for pattern, value in given.items():
        if isinstance(value, type) or not callable(value) or not hasattr(value, method):
            raise SettingError(owner, f"projections[{pattern!r}]", got=value, rule=contract)


def chosen(owner: str, model: nn.Module, given: Mapping[str, T]) -> dict[str, T]:
    """Return what each parameter that learns is given, by its name: that of the first pattern that means it.

    Raises:
        SettingError: for a pattern that means no parameter, or none that an earlier pattern does not mean.
    """
    found: dict[str, T] = {}
    used = set[str]()
    for name, parameter in model.named_parameters():
        pattern = next((pattern for pattern in given if is_meant(name, parameter, pattern)), None) if parameter.requires_grad else None
        if pattern is not None:
            found[name] = given[pattern]
            used.add(pattern)
    for pattern in given:
        if pattern not in used:
            names = ", ".join(name for name, parameter in model.named_parameters() if parameter.dim() > 1)
            rule = "patterns that each mean a parameter that learns, and that no earlier pattern means"
            raise SettingError(owner, "patterns", got=pattern, rule=rule, hint=f"weights of this model: {names[:300]}")
    return found


def on_ramp(projection: Any, weight: Tensor, share: float) -> Any:
    """Return the projection at a share of the cubic ramp from all things to those that it keeps; itself where it keeps no count.

    ``keep + (all - keep) (1 - share)^3``.

    Examples:
        >>> from spectrim.projections import TopK
        >>> [on_ramp(TopK(10), torch.empty(10, 10), share).keep for share in (0.0, 0.5, 1.0)]
        [100, 21, 10]

    Source: Zhu and Gupta, arXiv 1710.01878, equation 1.
    """
    if hasattr(projection, "first"):
        return replace(projection, first=on_ramp(projection.first, weight, share))
    if not hasattr(projection, "things") or share >= 1:
        return projection
    things = projection.things(weight)
    last = count_of(projection.keep, things)
    return replace(projection, keep=last + round((things - last) * (1 - share) ** 3))


def held_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Return the parameters of a model that belong to tensors in a memory.

    Raises:
        LayerError: where one is gone or has another shape.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise LayerError(name, "was cut or exchanged while a course held its entries", hint="cut ranks before it, in another fit")
    return {name: parameters[name] for name in tensors}


def free_entries(weight: Tensor, projection: Any) -> Tensor:
    """Return the entries of a projected weight that may still be trained: what pruning kept; none where the values are those of levels."""
    return weight != 0 if hasattr(projection, "stored") else torch.zeros_like(weight, dtype=torch.bool)


@torch.no_grad()
def put_back(model: nn.Module, free: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> None:
    """Undo what a step did to entries that are not free: they become zero, or what is `fixed`."""
    for name, parameter in held_parameters(model, free).items():
        zero = parameter.new_zeros(())
        parameter.copy_(torch.where(free[name], parameter, fixed.get(name, zero)))


@torch.no_grad()
def project(model: nn.Module, projections: Mapping[str, Any], memory: dict[str, Any]) -> None:
    """Project weights in place and note in the memory which entries are ``free``, and what is ``fixed`` elsewhere."""
    parameters = dict(model.named_parameters())
    for name, projection in projections.items():
        parameter = parameters[name]
        parameter.copy_(projection(parameter.detach().clone()))
        memory["free"][name] = free_entries(parameter.detach(), projection)
        if not hasattr(projection, "stored"):
            memory["fixed"][name] = parameter.detach().clone()


@torch.no_grad()
def stop_gradients(model: nn.Module, frees: Sequence[Mapping[str, Tensor]]) -> None:
    """Set the gradients of entries that are not free to zero."""
    for free in frees:
        for name, parameter in held_parameters(model, free).items():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~free[name], 0)


@torch.no_grad()
def stop_moments(model: nn.Module, optimizer: Optimizer, frees: Sequence[Mapping[str, Tensor]]) -> None:
    """Set the optimizer's moments of entries that are not free to zero, so that nothing moves them later on."""
    for free in frees:
        for name, parameter in held_parameters(model, free).items():
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                    value.masked_fill_(~free[name], 0)
