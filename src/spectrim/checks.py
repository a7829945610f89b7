"""One check of arguments, at the entry of every public verb and before any work: `check` and the table of its rules."""

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, ParamSpec, SupportsIndex, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, IterableDataset

from spectrim.errors import SettingError

READ_ONCE = "a generator can be read only once: give a list or a DataLoader"
BATCHES = "an iterable of batches (inputs, target), such as a DataLoader or a list"
INPUTS = "one batch of inputs: a tensor, a tuple of arguments or a dict of keyword arguments"
WHERE = "a layer name, a glob, a list of these, or a function (name, module) -> bool"

P = ParamSpec("P")
R = TypeVar("R")

INNER = ("factorize", "fit", "calibrate", "allocate", "prune", "correct", "recalibrate", "merge", "evaluate", "measure", "compare_latency")
"""Verbs that others call."""

Rule = Callable[[str, str, Any], None]
"""Takes the verb, the name of the argument and its value; raises a `SettingError` for a wrong value."""


def check(verb: str, /, *, optional: Sequence[str] = (), **arguments: Any) -> None:
    """Check the arguments of a verb by the rules of `RULES`, before any work.

    Args:
        verb: that was called; every message starts with it.
        optional: names of arguments for which None is a value.
        arguments: by name; a name without a rule is an error of the caller.

    Raises:
        SettingError: for the first argument that breaks its rule.

    Examples:
        >>> check("fit", model=nn.Linear(2, 2), epochs=3)
        >>> check("fit", epochs=1.5)
        Traceback (most recent call last):
        spectrim.errors.SettingError: fit: epochs must be an integer of at least 0, got 1.5
    """
    for name, value in arguments.items():
        if value is None and (name in optional or name in NONE_ALLOWED):
            continue
        RULES[name](verb, FIELDS.get(name, name), value)


def naming(verb: Callable[P, R]) -> Callable[P, R]:
    """Let the errors of the verbs that a verb calls name the verb that was called; a decorator.

    Examples:
        >>> @naming
        ... def compress(epochs):
        ...     check("fit", epochs=epochs)
        >>> compress(-1)
        Traceback (most recent call last):
        spectrim.errors.SettingError: compress: epochs must be an integer of at least 0, got -1
    """

    @functools.wraps(verb)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return verb(*args, **kwargs)
        except SettingError as error:
            inner, _, rest = str(error).partition(": ")
            if inner in INNER:
                error.args = (f"{verb.__name__}: {rest}",)
            raise

    return called


def outside_inference_mode(verb: Callable[P, R]) -> Callable[P, R]:
    """Let a verb that makes or trains weights run outside `torch.inference_mode`, wherever it is called; a decorator.

    What is made inside could never be trained, and torch says so much later.

    Examples:
        >>> @outside_inference_mode
        ... def ones():
        ...     return torch.ones(2)
        >>> with torch.inference_mode():
        ...     made = ones()
        >>> made.is_inference()
        False
    """

    @functools.wraps(verb)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return verb(*args, **kwargs)
        with torch.inference_mode(False):
            return verb(*args, **kwargs)

    return called


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`, so that names have no prefix.

    Examples:
        >>> net = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(net)) is net
        True
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _shown(value: Any) -> Any:
    """Return what a message shows of a value: itself where that is short, else its type."""
    if isinstance(value, Tensor | np.ndarray):
        return _Text(f"a {type(value).__name__} of shape {tuple(value.shape)}")
    if isinstance(value, type):
        return _Text(f"the class {value.__name__}")
    if isinstance(value, str | int | float | bool | None) and len(repr(value)) <= 60:
        return value
    if isinstance(value, list | tuple) and not value:
        return value
    return _Text(f"a {type(value).__name__}")


class _Text(str):
    """Text that a message shows without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _fail(verb: str, name: str, value: Any, rule: str, hint: str = "") -> SettingError:
    return SettingError(verb, name, got=_shown(value), rule=rule, hint=hint)


def _model(verb: str, name: str, value: Any) -> None:
    if isinstance(value, torch.jit.ScriptModule):
        raise _fail(verb, name, value, "a Python model", f"compress the Python model before scripting; {verb} cannot look into TorchScript")
    if isinstance(value, nn.Module):
        return
    hint = ""
    if isinstance(value, type) and issubclass(value, nn.Module):
        hint = f"give an instance: {value.__name__}(...)"
    elif isinstance(value, Mapping):
        hint = "a state dict holds no layers: build the model and call load_state_dict"
    elif isinstance(value, str | os.PathLike):
        hint = "load the model first"
    elif isinstance(getattr(value, "model", None), nn.Module):
        hint = f"give the network in it: .model of the {type(value).__name__}"
    raise _fail(verb, name, value, "an nn.Module", hint)


def _network(verb: str, name: str, value: Any) -> None:
    """Accept a model or the path of a file that holds one."""
    if not isinstance(value, str | os.PathLike):
        _model(verb, name, value)


def _models(verb: str, name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise _fail(verb, name, value, "a dict {name: model}", 'for one model: {"model": model}' if isinstance(value, nn.Module) else "")
    for key, model in value.items():
        _model(verb, f"{name}[{key!r}]", model)


def _data(verb: str, name: str, value: Any, *, rule: str = BATCHES, bare: bool = False, once: bool = False) -> None:
    hint = ""
    if isinstance(value, Dataset) and not isinstance(value, IterableDataset):
        hint = "a Dataset gives single examples: DataLoader(dataset, batch_size=32) makes batches"
    elif isinstance(value, type | str | bytes | os.PathLike | Mapping | nn.Module):
        hint = "a dict of tensors is one batch: [(batch, target)]" if isinstance(value, Mapping) else " "
    elif isinstance(value, Tensor | np.ndarray):
        hint = "make batches: DataLoader(TensorDataset(x, y), batch_size=32), after torch.from_numpy for arrays"
    elif not isinstance(value, Iterable) and not hasattr(value, "__getitem__"):
        hint = " "
    elif isinstance(value, Iterator) and not once:
        hint = READ_ONCE
    if hint:
        raise _fail(verb, name, value, rule, hint.strip())
    if isinstance(value, list | tuple):
        if not value:
            raise _fail(verb, name, value, "at least one batch")
        _first(verb, name, value, rule, bare)


def _first(verb: str, name: str, value: Sequence[Any], rule: str, bare: bool) -> None:
    """Check the first batch of a list."""
    first = value[0]
    if isinstance(value, tuple) and len(value) == 2 and isinstance(first, Tensor | np.ndarray) and not bare:
        raise _fail(verb, name, value, rule, "a pair of tensors is one batch: [(x, y)], or DataLoader(TensorDataset(x, y), batch_size=32)")
    pair = isinstance(first, tuple | list) and len(first) == 2
    if pair and any(isinstance(part, np.ndarray) for part in first):
        raise SettingError(verb, name, got=_Text("batches of numpy arrays"), rule="batches of tensors", hint="torch.from_numpy(array)")
    if bare and isinstance(first, Tensor | tuple | list | Mapping):
        return
    if not pair and not isinstance(first, Mapping):  # a dict has a message of its own, see `pair_of`
        count = f"tuples of {len(first)}" if isinstance(first, tuple | list) else f"a {type(first).__name__}"
        hint = "several inputs go into a tuple: ((a, b), target)" if isinstance(first, tuple | list) else ""
        raise SettingError(verb, name, got=_Text(f"batches that are {count}"), rule="batches (inputs, target)", hint=hint)


def _inputs(verb: str, name: str, value: Any) -> None:
    if isinstance(value, np.ndarray):
        raise _fail(verb, name, value, INPUTS, "torch.from_numpy(array)")
    packed = isinstance(value, nn.utils.rnn.PackedSequence)
    if not (packed or isinstance(value, Tensor | Mapping | tuple | list)):
        hint = (
            "give one batch of it: inputs, target = next(iter(loader))"
            if isinstance(value, Iterable) and not isinstance(value, str)
            else ""
        )
        raise _fail(verb, name, value, INPUTS, hint)
    if isinstance(value, list | tuple) and not value:
        raise _fail(verb, name, value, INPUTS)
    if isinstance(value, list | tuple) and any(isinstance(part, np.ndarray) for part in value):
        raise SettingError(verb, name, got=_Text("numpy arrays"), rule=INPUTS, hint="torch.from_numpy(array)")


def _loss(verb: str, name: str, value: Any) -> None:
    rule = "a function (output, target) -> scalar tensor"
    if isinstance(value, type):
        raise _fail(verb, name, value, rule, f"make an instance: {value.__name__}()")
    if not callable(value):
        raise _fail(verb, name, value, rule, "for example nn.CrossEntropyLoss()")
    if isinstance(value, nn.modules.loss._Loss) and getattr(value, "reduction", "mean") == "none":
        raise _fail(verb, name, value, rule, "its reduction is 'none': use reduction='mean'")


def _optimizer(verb: str, name: str, value: Any) -> None:
    if isinstance(getattr(value, "param_groups", None), list):
        return
    factory = isinstance(value, type) or callable(value)
    hint = f"{verb} takes the instance: torch.optim.Adam(model.parameters(), lr=1e-3)" if factory or isinstance(value, str) else ""
    raise _fail(verb, name, value, "a torch optimizer over the model's parameters", hint)


def _factory(verb: str, name: str, value: Any) -> None:
    rule = "a function that makes an optimizer from parameters"
    if isinstance(value, Optimizer):
        example = f"lambda parameters: torch.optim.{type(value).__name__}(parameters, lr={value.param_groups[0].get('lr', 1e-3):g})"
        raise _fail(verb, name, value, rule, f"the network that is trained is made inside, so write {example}")
    if not callable(value):
        raise _fail(verb, name, value, rule, "for example torch.optim.Adam")


def _where(verb: str, name: str, value: Any) -> None:
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list | tuple | set | frozenset):
        if not names or not all(isinstance(entry, str) for entry in names):
            raise _fail(verb, name, value, WHERE)
    elif isinstance(value, type) or not callable(value):
        raise _fail(verb, name, value, WHERE)


def _budget(verb: str, name: str, value: Any) -> None:
    rule = "a Budget, a fraction of the multiply-accumulates in (0, 1], or a dict such as {'macs': 0.5}"
    if isinstance(value, type):
        raise _fail(verb, name, value, rule, "Budget(macs=0.5)")
    if hasattr(value, "limits") or (isinstance(value, Mapping) and value and all(isinstance(key, str) for key in value)):
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
        hint = f"for {value} % write {float(value) / 100:g}" if isinstance(value, Real) and 1 < float(value) <= 100 else "Budget(macs=0.5)"
        raise _fail(verb, name, value, rule, hint)


def _ranks(verb: str, name: str, value: Any) -> None:
    """Accept a whole number, a mapping or a rank rule; the numbers in it are checked with the layers' sizes."""
    if isinstance(value, Mapping):
        for key, rank in value.items():
            if isinstance(rank, bool | Tensor) or not isinstance(rank, SupportsIndex):
                raise _fail(verb, f"{name}[{key!r}]", rank, "an integer of at least 1")
        return
    if callable(value) and not isinstance(value, type):
        return
    if name == "rank" and isinstance(value, SupportsIndex) and not isinstance(value, Tensor):
        return
    number = isinstance(value, SupportsIndex)
    hint = "the same rank everywhere: Fixed(8)" if number else "a fraction of each full rank: Fraction(0.25)"
    kinds = "an integer, a rule such as Energy(0.9) or a dict {layer: rank}" if name == "rank" else "a rule or a dict {layer: rank}"
    raise _fail(verb, name, value, kinds, hint if isinstance(value, Real) else "")


def _path(verb: str, name: str, value: Any) -> None:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise _fail(verb, name, value, "a path", "the arguments may be in another order" if isinstance(value, nn.Module) else "")


def _latencies(verb: str, name: str, value: Any) -> None:
    if isinstance(value, type) or not hasattr(value, "limits") or not hasattr(value, "seconds"):
        raise _fail(verb, name, value, "a LatencyTable", "latency_table(model, inputs) makes one")


def _penalties(verb: str, name: str, value: Any) -> None:
    rule = "a list of penalties, such as [Orthogonality(0.1)]"
    if not isinstance(value, list | tuple):
        raise _fail(verb, name, value, rule, f"[{type(value).__name__}(...)]" if callable(value) else "")
    for penalty in value:
        if isinstance(penalty, type) or not callable(penalty):
            raise _fail(verb, name, penalty, rule, f"{penalty.__name__}()" if isinstance(penalty, type) else "")


def _scheduler(verb: str, name: str, value: Any) -> None:
    if isinstance(value, type) or not hasattr(value, "step"):
        raise _fail(verb, name, value, "a torch learning-rate schedule of the optimizer", "make the instance: StepLR(optimizer, 10)")


def _calibration(verb: str, name: str, value: Any) -> None:
    if not hasattr(value, "inputs") or not hasattr(value, "metrics") or isinstance(value, type):
        raise _fail(verb, name, value, "what calibrate returned", "calibration=calibrate(model, data)")


def _plan(verb: str, name: str, value: Any) -> None:
    if not isinstance(value, str | os.PathLike) and not hasattr(value, "budgets"):
        raise _fail(verb, name, value, "a Plan, or the path of a plan's file or a run's folder")


def _budgets(verb: str, name: str, value: Any) -> None:
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise _fail(verb, name, value, "a list of budgets, such as [0.5, 0.25]", f"[{value!r}]" if isinstance(value, Real) else "")
    for budget in value:
        _budget(verb, f"each of {name}", budget)


def _importances(verb: str, name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise _fail(verb, name, value, "a dict {name: importance}", "{'energy': SpectralEnergy()}")
    for key, importance in value.items():
        if isinstance(importance, type) or not callable(importance):
            raise _fail(verb, f"{name}[{key!r}]", importance, "an importance, such as SpectralEnergy()")


def _cut_ranks(verb: str, name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise _fail(verb, name, value, "a dict {layer: rank}")
    _ranks(verb, name, value)


def _measurements(verb: str, name: str, value: Any) -> None:
    if not isinstance(value, Mapping) or not all(hasattr(entry, "size_bytes") for entry in value.values()):
        raise _fail(verb, name, value, "a dict {name: Measurement}", "{'dense': measure(model, inputs)}")


def _patterns(verb: str, name: str, value: Any) -> None:
    if wrong := [pattern for pattern in value if not isinstance(pattern, str)]:
        hint = "give them one by one: match(*patterns)" if isinstance(wrong[0], list | tuple) else ""
        raise _fail(verb, name, wrong[0], "globs over layer names, as text", hint)


def _integer(least: int) -> Rule:
    def rule(verb: str, name: str, value: Any) -> None:
        if isinstance(value, bool | Tensor) or not isinstance(value, SupportsIndex) or value.__index__() < least:
            raise _fail(verb, name, value, f"an integer of at least {least}")

    return rule


def _number(rule: str, fits: Callable[[float], bool]) -> Rule:
    def check_number(verb: str, name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value) or not fits(float(value)):
            raise _fail(verb, name, value, rule)

    return check_number


def _choice(*allowed: str) -> Rule:
    def rule(verb: str, name: str, value: Any) -> None:
        if value not in allowed:
            raise _fail(verb, name, value, ", ".join(f"'{entry}'" for entry in allowed[:-1]) + f" or '{allowed[-1]}'")

    return rule


def _reread(verb: str, name: str, value: Any) -> None:
    _data(verb, name, value)


def _read_once(verb: str, name: str, value: Any) -> None:
    _data(verb, name, value, once=True)


def _bare(verb: str, name: str, value: Any) -> None:
    _data(verb, name, value, bare=True, once=True, rule="an iterable of batches, (inputs, target) or bare inputs")


def _reread_bare(verb: str, name: str, value: Any) -> None:
    _data(verb, name, value, bare=True, rule="an iterable of batches, (inputs, target) or bare inputs")


RULES: dict[str, Rule] = {
    **dict.fromkeys(("model", "cut_model", "dense", "old", "new", "first", "second"), _model),
    **dict.fromkeys(("data", "eval_data"), _reread),
    **dict.fromkeys(("inputs", "example_inputs"), _inputs),
    **dict.fromkeys(("where", "keep"), _where),
    **dict.fromkeys(("rank", "ranks"), _ranks),
    **dict.fromkeys(("path", "folder", "checkpoint"), _path),
    **dict.fromkeys(("epochs", "first_epoch", "above"), _integer(0)),
    **dict.fromkeys(("examples", "accumulate", "threads", "repeats", "multiple", "batch_size", "max_batch"), _integer(1)),
    **dict.fromkeys(("clip", "min_time", "time_box", "tolerance"), _number("above 0", lambda value: value > 0)),
    **dict.fromkeys(("squeeze", "margin"), _number("in [0, 1)", lambda value: 0 <= value < 1)),
    "models": _models,
    "network": _network,
    "data_once": _read_once,
    "batches": _bare,
    **dict.fromkeys(("batches_again", "eval_batches"), _reread_bare),
    "loss": _loss,
    "optimizer": _optimizer,
    "factory": _factory,
    "scheduler": _scheduler,
    "penalties": _penalties,
    "budget": _budget,
    "budgets": _budgets,
    "latency": _latencies,
    "calibration": _calibration,
    "source": _plan,
    "patterns": _patterns,
    "importances": _importances,
    "cut_ranks": _cut_ranks,
    "measurements": _measurements,
    "scheduler_steps": _choice("epoch", "batch"),
}
"""By the name of the argument: what it must be."""

NONE_ALLOWED = {
    *("where", "keep", "eval_data", "example_inputs", "clip", "latency", "calibration", "scheduler", "rank", "multiple", "tolerance"),
    *("batch_size", "checkpoint", "factory", "eval_batches"),
}
"""Arguments for which None is a value in every verb."""

FIELDS = {
    "cut_model": "cut",
    "first": "a",
    "second": "b",
    "data_once": "data",
    "batches": "data",
    "batches_again": "data",
    "eval_batches": "eval_data",
    "factory": "optimizer",
    "cut_ranks": "ranks",
}
"""Names in messages, where rules differ between verbs for arguments of one name."""

__all__ = ["BATCHES", "INPUTS", "READ_ONCE", "RULES", "WHERE", "check", "outside_inference_mode", "unwrapped"]
