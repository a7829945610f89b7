"""Copies of a model in which layers are exchanged in place, while tied, shared and otherwise referenced ones stay so."""

import copy
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from spectrim.errors import LayerError
from spectrim.layers import kind_of
from spectrim.plain.encoder import follow_layers
from spectrim.surgery import functions

HELD = "its weight is also held outside the layer (in a list, a tuple, a function, an attribute)"
"""Why a layer stays dense whose weight something else refers to."""


FINISHED: list[Callable[[nn.Module], None]] = []
"""Called on every model that `factorize` or `merge` returns: for libraries that save models themselves."""


def duplicate(model: nn.Module, without: Iterable[Tensor] = ()) -> nn.Module:
    """Return a deep copy; tensors that hooks compute (old weight norm, pruning), which torch refuses to copy, are detached.

    Args:
        model: left untouched.
        without: parameters that the copy does not need; it holds empty ones, on the meta device, in their place.
    """
    return copy.deepcopy(model, _memo(model) | {id(weight): _hole(weight) for weight in without})


def _memo(model: nn.Module) -> dict[int, object]:
    """Return what `copy.deepcopy` need not copy: tensors that it cannot, and the empty tables of hooks that each module has a dozen of."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for value in vars(module).values():
            if type(value) is OrderedDict and not value:
                memo[id(value)] = OrderedDict()
            elif isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return memo


def _hole(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)


@dataclass
class Copy:
    """A copy of a model whose exchanged weights are still missing.

    Attributes:
        model: the copy; where a weight is missing it holds an empty parameter on the meta device.
        layers: of the copy, by the name of the layer in the original.
        missing: the names of layers whose weights are missing.
        kept: names of layers that were to be exchanged and stay dense.
    """

    model: nn.Module
    layers: dict[str, nn.Module]
    missing: set[str]
    kept: set[str]


def copy_without(model: nn.Module, chosen: Mapping[str, Iterable[str]]) -> Copy:
    """Copy a model without the weights of chosen layers, but for those that anything else in the copy refers to.

    Every reference to a layer (lists, dicts, bound methods, hooks) follows into the copy, as `copy.deepcopy` does it. A weight itself can
    be missing only where the layers that use it are the only ones to hold it; CPython's reference count knows. All others are filled in.

    Args:
        model: left untouched.
        chosen: names of layers → names of their weights.
    """
    named = dict(model.named_modules())
    held = (named[name]._parameters[key] for name, keys in chosen.items() for key in keys)
    weights = {id(weight): weight for weight in held if weight is not None}
    _refuse_functions(model, set(chosen))
    holes = {key: _hole(weight) for key, weight in weights.items()}
    memo = _memo(model) | dict(holes)
    twin = copy.deepcopy(model, memo)
    alive = {id(module) for module in twin.modules()}
    layers = {name: layer for name in chosen if isinstance(layer := memo.get(id(named[name])), nn.Module) and id(layer) in alive}
    memo.clear()  # it holds copied states
    for layer in layers.values():
        if (kind := kind_of(layer)) is not None:
            kind.forget(layer)
    slots = Counter(id(layer._parameters[key]) for name, layer in layers.items() for key in chosen[name])
    tied = _held_beside(slots, holes)
    complete = {name for name, layer in layers.items() if all(id(layer._parameters[key]) not in tied for key in chosen[name])}
    while True:  # a layer with several weights stays dense as a whole, and so do those that are tied to it
        used = {id(layers[name]._parameters[key]) for name in layers.keys() - complete for key in chosen[name]}
        left = {name for name in complete if not any(id(layers[name]._parameters[key]) in used for key in chosen[name])}
        if left == complete:
            break
        complete = left
    needed = {id(layers[name]._parameters[key]) for name in complete for key in chosen[name]}
    for key, hole in holes.items():
        if id(hole) not in needed:
            for module in twin.modules():
                if isinstance(module, nn.RNNBase):
                    module.__dict__["_flat_weight_refs"] = []  # weak references forbid the swap
            torch.utils.swap_tensors(hole, nn.Parameter(weights[key].detach().clone(), weights[key].requires_grad))  # type: ignore[no-untyped-call]
    for name in layers.keys() - complete:
        if isinstance(module := layers[name], nn.RNNBase):
            module._init_flat_weights()
    return Copy(twin, layers, complete, set(chosen) - complete)


def held_elsewhere(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return which of the named dense layers have a weight that is held by more than layers, so that it cannot be exchanged.

    Copies the objects of the model, but none of its tensors.

    Args:
        model: left untouched.
        names: of layers that could be factorized.
    """
    modules = dict(model.named_modules())
    wanted = {name: kind.weights(modules[name]) for name in names if (kind := kind_of(modules[name])) is not None}
    if not wanted:
        return set()
    holes: dict[int, nn.Parameter] = {id(p): _hole(p) for p in model.parameters() if not isinstance(p, UninitializedParameter)}
    tensors = [value for module in modules.values() for held in (vars(module), module._buffers) for value in held.values()]
    memo: dict[int, object] = {**{id(value): value for value in tensors if isinstance(value, Tensor)}, **holes}
    try:
        twin = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, copy.Error):  # then factorize says so
        return set()
    memo.clear()
    for module in twin.modules():
        if isinstance(module, nn.RNNBase):
            module.__dict__.pop("_flat_weights", None)
    slots = Counter(id(p) for module in twin.modules() for p in module._parameters.values() if p is not None)
    held = _held_beside(slots, holes)
    return {name for name, keys in wanted.items() if any(id(holes[id(modules[name]._parameters[key])]) in held for key in keys)}


def _held_beside(slots: Mapping[int, int], holes: Mapping[int, nn.Parameter]) -> set[int]:
    """Return the ``id`` of each empty parameter that more than those slots hold, by CPython's count of references."""
    probe = nn.Parameter(torch.empty(0))
    held = [probe, *holes.values()]
    del probe
    counts = [sys.getrefcount(hole) for hole in held]  # that of the probe is what the list and the loop account for; `holes` adds one
    return {id(hole) for hole, count in zip(held, counts, strict=True) if count - counts[0] - 1 > slots[id(hole)]}


def _refuse_functions(model: nn.Module, chosen: set[str]) -> None:
    """Raise a LayerError where a function held by a module refers to a layer or to what contains it: a copy would run the original's.

    Forward hooks and the methods of the modules' classes are such functions, too; of those, only the layers themselves are looked for.
    """
    above = {".".join(name.split(".")[:end]) for name in chosen for end in range(name.count(".") + 1)} | {""}
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items() if name in chosen or name in above}
    layers = {place: name for place, name in names.items() if name in chosen}
    for owner, module in modules.items():
        if type(module).__name__ == "OptimizedModule":
            hint = "compress first and compile the result, or use module.compile(), which wraps nothing"
            raise LayerError(owner, "is wrapped by torch.compile, which holds functions of its layers", hint=hint)
        for key, value in vars(module).items():
            hooks = key in ("_forward_hooks", "_forward_pre_hooks")
            if key.startswith("_") and not hooks:  # torch's own tables
                continue
            what = "a forward hook is" if hooks else f"its attribute '{key}' is"
            _refuse(owner, module, what, functions.reached(value), layers if hooks else names)
    for kind, (owner, module) in {type(module): (owner, module) for owner, module in modules.items()}.items():
        for key, method in functions.methods_of(kind):
            _refuse(owner, module, f"its method '{key}' is", functions.reached_by_code(method), layers)


def _refuse(owner: str, module: nn.Module, what: str, reached: Iterable[object], names: Mapping[int, str]) -> None:
    for value in reached:
        if id(value) in names:
            which = f"layer '{names[id(value)]}'" if names[id(value)] else "the model"
            problem = f"{what} a function of {which}: in a copy it still calls the original"
            raise LayerError(owner or type(module).__name__, problem, hint="make it a method, or a functools.partial of the layer")


def replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    """Replace modules in every parent that holds them; in place, but for the root.

    Args:
        model: the root.
        replacements: ``id`` of the old module → the new one.

    Returns:
        The root, which is a new module when it was itself replaced.
    """
    parents = [*model.modules(), *(module for new in replacements.values() for module in new.modules())]
    for parent in parents:
        for key, child in parent._modules.items():
            if child is not None and id(child) in replacements:
                parent._modules[key] = replacements[id(child)]
    follow_layers(model)
    return replacements.get(id(model), model)
