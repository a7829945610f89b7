"""`same_function`: whether two networks compute the same, and the first layer where they do not."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from spectrim.checks import check
from spectrim.errors import LayerError
from spectrim.metrics.calls import call_model
from spectrim.metrics.tensors import send
from spectrim.surgery.exchange import duplicate

ROUNDINGS = 2.0**14
"""Tolerance in units of the precision: 0.002 of the largest output in float32. A wrong function is off by far more."""


AMPLIFIED = 256.0
"""Differences up to so many times what rounding of the inputs changes are rounding, too: BatchNorm on a batch can amplify that."""

SHRINKS = 1e-4
"""Differences of which no more than this is left in double precision are rounding."""


SETTINGS = ("training", "p", "dropout")
"""Attributes of modules that are changed while two networks are compared."""


def same_function(
    a: nn.Module, b: nn.Module, inputs: Any, *, names: tuple[str, str] = ("first", "second"), tolerance: float | None = None
) -> None:
    """Raise an error unless two networks compute the same on an example, in eval and in training mode.

    In training mode both start from the same random state, without the dropout of modules; that mode is left out where `a` itself fails in
    it (BatchNorm of a single example). BatchNorm statistics, training flags and all random generators are as before afterwards. Outputs
    are compared tensor by tensor, by the largest difference over the largest magnitude.

    Args:
        a: a network.
        b: another one, whose layers that correspond have the names of those of `a`.
        inputs: one batch: a tensor, a tuple of arguments or a dict of keyword arguments.
        names: of the two networks, in messages.
        tolerance: largest relative difference; when omitted 16,384 times the precision of the outputs, and more where rounding of the
            inputs changes the outputs of `a` by as much.

    Raises:
        SettingError: an argument is of the wrong kind.
        LayerError: for outputs that differ, with the first layer, in the order of calls, whose output does.

    Examples:
        >>> dense, x = nn.Sequential(nn.Linear(3, 2), nn.ReLU()), torch.ones(1, 3)
        >>> same_function(dense, dense, x)
        >>> same_function(dense, nn.Sequential(nn.Linear(3, 2), nn.Tanh()), x)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        spectrim.errors.LayerError: layer '0': its output in the second network differs from that in the first by ... in eval mode...
    """
    check("same_function", first=a, second=b, inputs=inputs, tolerance=tolerance)
    for training in (False, True):
        try:
            one = _run(a, inputs, training)
        except Exception:  # whatever the model's own code raises without targets, or for a single example
            if training:
                return
            raise
        difference = _difference(one, _run_second(b, inputs, training, names))
        allowed = tolerance or ROUNDINGS * max((torch.finfo(leaf.dtype).eps for leaf in one), default=0.0)
        if difference <= allowed:
            continue
        own = _difference(one, _run(a, _rounded(inputs), training))  # above zero, too, for a network with its own generator
        if tolerance is None and (difference <= AMPLIFIED * own or _vanishes(a, b, inputs, training, names, difference)):
            continue
        raise _error(a, b, inputs, training, names, allowed, difference)


def _vanishes(a: nn.Module, b: nn.Module, inputs: Any, training: bool, names: tuple[str, str], difference: float) -> bool:
    """Whether two networks agree in double precision by so much more that their difference is rounding, which they amplify."""
    if not math.isfinite(difference):  # other shapes, NaN on one side alone, or zeros beside values: no rounding
        return False
    try:
        wide = [duplicate(network).double() for network in (a, b)]
        x = tree_map_only(Tensor, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, inputs)
        return _difference(_run(wide[0], x, training), _run_second(wide[1], x, training, names)) <= SHRINKS * difference
    except Exception:  # whatever code raises that is written for another precision
        return False


def _error(a: nn.Module, b: nn.Module, inputs: Any, training: bool, names: tuple[str, str], allowed: float, whole: float) -> LayerError:
    """Return the error that names the first layer whose output differs."""
    layers: list[dict[str, list[Tensor]]] = [{}, {}]
    for network, found in zip((a, b), layers, strict=True):
        _run(network, inputs, training, found)
    mode = "training" if training else "eval"
    told = f", in {mode} mode; the output of the whole network by {whole:.3g}"
    hint = "the model reads this layer's weight or class besides calling it; leave it out with where="
    modules = dict(b.named_modules())
    for name, output in layers[0].items():
        if name in modules and name not in layers[1]:
            return LayerError(name, f"is called in the {names[0]} network and not in the {names[1]}{told}", hint=hint)
        difference = _difference(output, layers[1][name]) if name in layers[1] else 0.0
        if difference > allowed:
            problem = f"its output in the {names[1]} network differs from that in the {names[0]} by {difference:.3g} of it{told}"
            return LayerError(name, problem, hint=hint)
    problem = f"what the {names[1]} network computes differs from the {names[0]} by {whole:.3g} of it, in {mode} mode"
    return LayerError(
        type(a).__name__, problem, hint="the outputs of all layers agree: the model uses its layers in another way than calling them"
    )


def _run_second(network: nn.Module, inputs: Any, training: bool, names: tuple[str, str]) -> list[Tensor]:
    """Run the second network, which has to run where the first does."""
    try:
        return _run(network, inputs, training)
    except Exception as error:  # whatever the model's own code raises
        told = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        mode = "training" if training else "eval"
        problem = f"the {names[1]} network fails in {mode} mode where the {names[0]} computes ({told})"
        hint = "the model asks its layers for more than to be called, such as their children; leave those out with where="
        layer = getattr(error, "layer", None)
        name = next((name for name, module in network.named_modules() if module is layer), "") or _failing(network, inputs, training)
        raise LayerError(name or type(network).__name__, problem, hint=hint) from error


def _failing(network: nn.Module, inputs: Any, training: bool) -> str:
    """Return the innermost layer that is entered and not left when a network fails; empty for the network itself."""
    inside: list[str] = []
    named = [(name, module) for name, module in network.named_modules() if name]
    handles = [module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)) for name, module in named]
    handles += [module.register_forward_hook(lambda *_: inside.pop() and None) for _, module in named]
    try:
        with suppress(Exception):  # the one that is looked into
            _run(network, inputs, training)
    finally:
        for handle in handles:
            handle.remove()
    return inside[-1] if inside else ""


def _run(network: nn.Module, inputs: Any, training: bool, layers: dict[str, list[Tensor]] | None = None) -> list[Tensor]:
    """Return the output tensors; with `layers`, note there those of every module, in the order in which they finish first."""

    def keep(name: str, found: dict[str, list[Tensor]]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found.setdefault(name, [leaf.clone() for leaf in _tensors(output)])

        return hook

    named = [] if layers is None else [(name, module, layers) for name, module in network.named_modules() if name]
    handles = [module.register_forward_hook(keep(name, found)) for name, module, found in named]
    try:
        with _put_back(network), torch.no_grad():
            network.train(training)
            for module in network.modules():
                held = vars(module)
                for key in ("p", "dropout") if isinstance(module, nn.modules.dropout._DropoutNd) else ("dropout",):
                    if isinstance(held.get(key), float):
                        setattr(module, key, 0.0)
            return _tensors(call_model(network, send(inputs, network)))
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _put_back(network: nn.Module) -> Iterator[None]:
    """Training flags, dropout, buffers and torch's random generators as they were, afterwards; a fixed random state inside."""
    held = [(module, vars(module)) for module in network.modules()]
    settings = [(module, key, values[key]) for module, values in held for key in SETTINGS if _is_setting(values, key)]
    buffers = {id(own): own for _, values in held for own in values["_buffers"].values() if own is not None and own.numel()}
    before = [(buffer, buffer.detach().clone()) for buffer in buffers.values()]
    others = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = {own.device for _, values in held for own in values["_parameters"].values() if own is not None and own.is_cuda}
    try:
        with torch.random.fork_rng(sorted(devices, key=str)):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            yield
    finally:
        random.setstate(others[0])
        np.random.set_state(others[1])  # noqa: NPY002
        for module, key, value in settings:
            if vars(module)[key] != value:
                setattr(module, key, value)
        with torch.no_grad():
            for buffer, old in before:
                if not torch.equal(buffer, old):
                    buffer.copy_(old)


def _is_setting(held: Mapping[str, Any], key: str) -> bool:
    return key == "training" or isinstance(held.get(key), float)


def _rounded(inputs: Any) -> Any:
    """Return inputs that differ by about one rounding, in floating tensors."""

    def change(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            return x * (1 + torch.finfo(x.dtype).eps * (2 * torch.rand(x.shape).to(x) - 1))

    return tree_map_only(Tensor, change, inputs)


def _tensors(output: Any) -> list[Tensor]:
    """Return the real tensors in whatever a model returns."""
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    if len(leaves) == 1 and not isinstance(leaves[0], Tensor) and hasattr(leaves[0], "__dict__"):
        leaves = tree_leaves(vars(leaves[0]))
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.is_nested]


def _difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the largest difference of two outputs as a share of the largest magnitude; infinite for other shapes."""
    if len(one) != len(other) or any(x.shape != y.shape for x, y in zip(one, other, strict=True)):
        return float("inf")
    worst = 0.0
    for x, y in zip(one, other, strict=True):
        if not torch.equal(torch.isfinite(x), torch.isfinite(y)):
            return float("inf")
        first, second = (torch.nan_to_num(part.double(), 0.0, 0.0, 0.0) for part in (x, y))
        if first.numel() and (gap := float((first - second).abs().max())):
            scale = float(first.abs().max())
            worst = max(worst, gap / scale if scale > 0 else float("inf"))
    return worst
