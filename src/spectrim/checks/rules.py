"""The rules: what an argument of each name must be, and what the message suggests for common mistakes."""

import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectrim.checks.batches import bare, inputs_rule, read_once, reread, reread_bare
from spectrim.checks.messages import fail
from spectrim.checks.scalars import Rule, integer, number

WHERE = "a layer name, a glob, a list of these, or a function (name, module) -> bool"

WITHOUT_VALUES = ("factorize", "merge", "coverage", "measure", "compare_latency", "load", "match")
"""Verbs that take a model on the meta device, too."""


def _model(verb: str, name: str, value: Any) -> None:
    if isinstance(value, torch.jit.ScriptModule):
        raise fail(verb, name, value, "a Python model", f"compress the Python model before scripting; {verb} cannot look into TorchScript")
    if isinstance(value, torch.fx.GraphModule) and "eval" in vars(value):
        raise fail(verb, name, value, "a Python model", "compress the Python model before torch.export")
    if isinstance(value, nn.Module):
        if verb not in WITHOUT_VALUES and (empty := next((key for key, p in value.named_parameters() if p.is_meta), None)) is not None:
            hint = f"'{empty}' has no values: load the weights first, or build the model outside torch.device('meta')"
            raise fail(verb, name, value, "a model with values, not on the meta device", hint)
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
    raise fail(verb, name, value, "an nn.Module", hint)


def _network(verb: str, name: str, value: Any) -> None:
    """Accept a model or the path of a file that holds one."""
    if not isinstance(value, str | os.PathLike):
        _model(verb, name, value)


def _models(verb: str, name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise fail(verb, name, value, "a dict {name: model}", 'for one model: {"model": model}' if isinstance(value, nn.Module) else "")
    for key, model in value.items():
        _model(verb, f"{name}[{key!r}]", model)


def _loss(verb: str, name: str, value: Any) -> None:
    rule = "a function (output, target) -> scalar tensor"
    if isinstance(value, type):
        raise fail(verb, name, value, rule, f"make an instance: {value.__name__}()")
    if not callable(value):
        raise fail(verb, name, value, rule, "for example nn.CrossEntropyLoss()")
    if isinstance(value, nn.modules.loss._Loss) and getattr(value, "reduction", "mean") == "none":
        raise fail(verb, name, value, rule, "its reduction is 'none': use reduction='mean'")


def _optimizer(verb: str, name: str, value: Any) -> None:
    if isinstance(getattr(value, "param_groups", None), list):
        return
    factory = isinstance(value, type) or callable(value)
    hint = f"{verb} takes the instance: torch.optim.Adam(model.parameters(), lr=1e-3)" if factory or isinstance(value, str) else ""
    raise fail(verb, name, value, "a torch optimizer over the model's parameters", hint)


def _factory(verb: str, name: str, value: Any) -> None:
    rule = "a function that makes an optimizer from parameters"
    if isinstance(value, Optimizer):
        example = f"lambda parameters: torch.optim.{type(value).__name__}(parameters, lr={value.param_groups[0].get('lr', 1e-3):g})"
        raise fail(verb, name, value, rule, f"the network that is trained is made inside, so write {example}")
    if not callable(value):
        raise fail(verb, name, value, rule, "for example torch.optim.Adam")


def _where(verb: str, name: str, value: Any) -> None:
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list | tuple | set | frozenset):
        if not names or not all(isinstance(entry, str) for entry in names):
            raise fail(verb, name, value, WHERE)
    elif isinstance(value, type | nn.Module) or not callable(value):
        raise fail(verb, name, value, WHERE, "give the layer's name" if isinstance(value, nn.Module) else "")


def _budget(verb: str, name: str, value: Any) -> None:
    rule = "a Budget, a fraction of the multiply-accumulates in (0, 1], or a dict such as {'macs': 0.5}"
    if isinstance(value, type):
        raise fail(verb, name, value, rule, "Budget(macs=0.5)")
    if hasattr(value, "limits") or (isinstance(value, Mapping) and value and all(isinstance(key, str) for key in value)):
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
        hint = f"for {value} % write {float(value) / 100:g}" if isinstance(value, Real) and 1 < float(value) <= 100 else "Budget(macs=0.5)"
        raise fail(verb, name, value, rule, hint)


def _ranks(verb: str, name: str, value: Any) -> None:
    """Accept a whole number, a mapping or a rank rule; the numbers in it are checked with the layers' sizes."""
    if isinstance(value, Mapping):
        for key, rank in value.items():
            if not isinstance(key, str):
                raise fail(verb, name, value, "a dict {layer name: rank}")
            several = isinstance(rank, tuple) and all(isinstance(one, int) and not isinstance(one, bool) and one >= 1 for one in rank)
            if not several and (isinstance(rank, bool | Tensor) or not isinstance(rank, SupportsIndex)):
                raise fail(verb, f"{name}[{key!r}]", rank, "an integer of at least 1")
        return
    if callable(value) and not isinstance(value, type):
        return
    if name == "rank" and isinstance(value, SupportsIndex) and not isinstance(value, Tensor):
        return
    number = isinstance(value, SupportsIndex)
    hint = "the same rank everywhere: Fixed(8)" if number else "a fraction of each full rank: Fraction(0.25)"
    kinds = "an integer, a rule such as Energy(0.9) or a dict {layer: rank}" if name == "rank" else "a rule or a dict {layer: rank}"
    raise fail(verb, name, value, kinds, hint if isinstance(value, Real) else "")


def _path(verb: str, name: str, value: Any) -> None:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise fail(verb, name, value, "a path", "the arguments may be in another order" if isinstance(value, nn.Module) else "")


def _latencies(verb: str, name: str, value: Any) -> None:
    if isinstance(value, type) or not hasattr(value, "limits") or not hasattr(value, "seconds"):
        raise fail(verb, name, value, "a LatencyTable", "latency_table(model, inputs) makes one")


def _crossbars(verb: str, name: str, value: Any) -> None:
    if isinstance(value, type) or not hasattr(value, "arrays") or not hasattr(value, "price"):
        rule = "Crossbars, from spectrim.runtimes.crossbar"
        raise fail(verb, name, value, rule, "Crossbars(Device(bits=4), Mapping(rows=128, columns=64, bits=8))")


def _penalties(verb: str, name: str, value: Any) -> None:
    rule = "a list of penalties, such as [Orthogonality(0.1)]"
    if not isinstance(value, list | tuple):
        raise fail(verb, name, value, rule, f"[{type(value).__name__}(...)]" if callable(value) else "")
    for penalty in value:
        if isinstance(penalty, type) or not callable(penalty):
            raise fail(verb, name, penalty, rule, f"{penalty.__name__}()" if isinstance(penalty, type) else "")


def _schedule(verb: str, name: str, value: Any) -> None:
    """Accept a function that makes a schedule, or a schedule."""
    if isinstance(value, type) or not (callable(value) or hasattr(value, "step")):
        rule = "a function (optimizer, steps) -> schedule, or a torch learning-rate schedule"
        raise fail(verb, name, value, rule, "lambda optimizer, steps: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)")


def _tuning(verb: str, name: str, value: Any) -> None:
    if isinstance(value, type) or not (hasattr(value, "accumulate") and hasattr(value, "schedule_of")):
        raise fail(verb, name, value, "a Tuning", "for example Tuning(clip=1.0)")


def _calibration(verb: str, name: str, value: Any) -> None:
    if not hasattr(value, "inputs") or not hasattr(value, "metrics") or isinstance(value, type):
        raise fail(verb, name, value, "what calibrate returned", "calibration=calibrate(model, data)")


def _plan(verb: str, name: str, value: Any) -> None:
    if not isinstance(value, str | os.PathLike) and not hasattr(value, "budgets"):
        raise fail(verb, name, value, "a Plan, or the path of a plan's file or a run's folder")


def _budgets(verb: str, name: str, value: Any) -> None:
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise fail(verb, name, value, "a list of budgets, such as [0.5, 0.25]", f"[{value!r}]" if isinstance(value, Real) else "")
    for budget in value:
        _budget(verb, f"each of {name}", budget)


def _importances(verb: str, name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise fail(verb, name, value, "a dict {name: importance}", "{'energy': SpectralEnergy()}")
    for key, importance in value.items():
        if isinstance(importance, type) or not callable(importance):
            raise fail(verb, f"{name}[{key!r}]", importance, "an importance, such as SpectralEnergy()")


def _cut_ranks(verb: str, name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise fail(verb, name, value, "a dict {layer: rank}")
    _ranks(verb, name, value)


def _measurements(verb: str, name: str, value: Any) -> None:
    if not isinstance(value, Mapping) or not all(hasattr(entry, "size_bytes") for entry in value.values()):
        raise fail(verb, name, value, "a dict {name: Measurement}", "{'dense': measure(model, inputs)}")


def _patterns(verb: str, name: str, value: Any) -> None:
    if wrong := [pattern for pattern in value if not isinstance(pattern, str)]:
        hint = "give them one by one: match(*patterns)" if isinstance(wrong[0], list | tuple) else ""
        raise fail(verb, name, wrong[0], "globs over layer names, as text", hint)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("model", "cut_model", "dense", "old", "new", "first", "second"), _model),
    **dict.fromkeys(("data", "eval_data"), reread),
    **dict.fromkeys(("inputs", "example_inputs"), inputs_rule),
    **dict.fromkeys(("where", "keep"), _where),
    **dict.fromkeys(("rank", "ranks"), _ranks),
    **dict.fromkeys(("path", "folder", "checkpoint"), _path),
    **dict.fromkeys(("epochs", "first_epoch", "above", "recovery"), integer(0)),
    **dict.fromkeys(("examples", "accumulate", "steps_per_epoch", "threads", "repeats", "multiple", "batch_size", "max_batch"), integer(1)),
    **dict.fromkeys(("clip", "min_time", "time_box", "tolerance", "calibration_seconds"), number("above 0", lambda value: value > 0)),
    **dict.fromkeys(("squeeze", "margin"), number("in [0, 1)", lambda value: 0 <= value < 1)),
    "models": _models,
    "network": _network,
    "data_once": read_once,
    "batches": bare,
    **dict.fromkeys(("batches_again", "eval_batches"), reread_bare),
    "loss": _loss,
    "optimizer": _optimizer,
    "factory": _factory,
    "schedule": _schedule,
    "tuning": _tuning,
    "penalties": _penalties,
    "budget": _budget,
    "budgets": _budgets,
    "latency": _latencies,
    "crossbars": _crossbars,
    "calibration": _calibration,
    "source": _plan,
    "patterns": _patterns,
    "importances": _importances,
    "cut_ranks": _cut_ranks,
    "measurements": _measurements,
}
"""By the name of the argument: what it must be."""

NONE_ALLOWED = {
    *(
        "where",
        "keep",
        "eval_data",
        "example_inputs",
        "clip",
        "latency",
        "crossbars",
        "calibration",
        "schedule",
        "rank",
        "multiple",
        "tolerance",
    ),
    *("batch_size", "checkpoint", "factory", "eval_batches", "steps_per_epoch"),
}
"""Arguments for which None is a value in every verb."""

FIELDS = {
    "cut_model": "cut",
    "first": "a",
    "second": "b",
    "cut_ranks": "ranks",
    "data_once": "data",
    "batches": "data",
    "batches_again": "data",
    "eval_batches": "eval_data",
    "factory": "optimizer",
    "schedule": "scheduler",
}
"""Names in messages, where rules differ between verbs for arguments of one name."""
