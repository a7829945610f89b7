"""What a run is: a recipe, and stages in order of which finished ones are skipped."""

import copy
import hashlib
import importlib
import inspect
import json
import os
import platform
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from importlib.metadata import version
from operator import index
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints, runtime_checkable

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from spectrim.allocate import Budget, allocate
from spectrim.calibration import calibrate
from spectrim.checkpoint import load, save
from spectrim.compress import way_to_cut
from spectrim.correction import correct, recalibrate
from spectrim.costs import spectra
from spectrim.distillation import Distillation, Loss
from spectrim.errors import FormatError, RecipeError, SettingError
from spectrim.factorize import Scheme, factorize, merge
from spectrim.files import write_text
from spectrim.fit import Precision, fit, generators_of
from spectrim.layers import factor_name, kind_of, named_factors
from spectrim.measure import Measurement, evaluate, first_examples, measure, measure_together, one_example
from spectrim.protocols import LayerFilter
from spectrim.prune import prune
from spectrim.surgery import decide, match

STAGE = "stage.json"
RESULT = "result.json"
RECIPE = "recipe.yaml"


@runtime_checkable
class Data(Protocol):
    """What a recipe's data must return: three splits, each an iterable of batches ``(inputs, target)``."""

    train: Any
    val: Any
    test: Any


Component = dict[str, Any]
"""Anything by its import path: ``class_path`` names a class or a function, ``init_args`` its keyword arguments."""

IMPORTED = "an import path, or {class_path: IMPORT.PATH, init_args: {NAME: VALUE}}"
STEPS = ("total_steps", "T_max")
"""Arguments of schedules that are filled in with the number of steps when they are left out."""


@dataclass
class Teacher:
    """Distillation from the dense network of the first stage.

    Args:
        temperature: > 0.
        weight: the teacher's share of the loss, in [0, 1].
        dim: the axis of the classes.
        mix: >= 0; above 0 batches are mixed with themselves.
        features: >= 0; above 0 what the layers put out is learned from, too.
        until: in [0, 1]; the share of the steps in which it is.
        layers: their names; the factorized ones when omitted.
    """

    temperature: float = 4.0
    weight: float = 0.7
    dim: int = -1
    mix: float = 0.0
    features: float = 0.0
    until: float = 1.0
    layers: tuple[str, ...] | None = None


@dataclass
class Phase:
    """One training schedule.

    Args:
        epochs: passes over the training split; 0 for none.
        optimizer: gets the parameters as its first argument.
        scheduler: gets the optimizer as its first argument; ``total_steps`` and ``T_max`` are filled in when they are left out.
        scheduler_steps: whether the schedule advances each epoch or each batch.
        penalties: values that are called on the model.
        distill: learn from the dense network too.
        rank_schedule: cuts ranks in the course of this phase, for example `Ramp`; for the phases of a factorized network only.
        accumulate: batches for one optimizer step.
        clip: largest norm of the gradient.
    """

    epochs: int = 0
    optimizer: Component = field(default_factory=lambda: {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.001}})
    scheduler: Component | None = None
    scheduler_steps: Literal["epoch", "batch"] = "epoch"
    penalties: list[Component] = field(default_factory=list)
    distill: Teacher | None = None
    rank_schedule: Component | None = None
    accumulate: int = 1
    clip: float | None = None


@dataclass
class Factorization:
    """How dense layers become factorized ones.

    Args:
        scheme: how 2-D kernels are folded.
        where: globs over layer names, ``!`` excludes; all but the classifier head when omitted.
        start: from the ``dense`` stage's weights, or from the ``initial`` ones (the paper's random start).
    """

    scheme: Scheme = "auto"
    where: list[str] | None = None
    start: Literal["dense", "initial"] = "dense"

    def layers(self) -> LayerFilter | None:
        """Return the filter over layers; None for the default one."""
        return None if self.where is None else match(*self.where)


@dataclass
class Cut:
    """How ranks are chosen, by exactly one of `rule`, `budget` and `ranks`, and how the weights are cut to them.

    Args:
        rule: a rank rule.
        budget: what the whole network keeps; ranks by the knapsack over the importance that belongs to the cut.
        ranks: ``{layer: rank}``.
        cut: ``plain`` keeps the largest singular values of each weight, ``whitened`` what changes its output least on training examples,
            ``sensitive`` what changes the loss least, ``mixed`` as whitened with ranks by both energies.
        correct: refit each layer to its output before the cut by least squares on training examples.
        examples: how many there are, >= 1.
        recalibrate: renew the statistics of BatchNorm on the training split after the cut.
    """

    rule: Component | None = None
    budget: Budget | None = None
    ranks: dict[str, int] | None = None
    cut: Literal["plain", "whitened", "sensitive", "mixed"] = "plain"
    correct: bool = False
    examples: int = 1024
    recalibrate: bool = False


@dataclass
class Recipe:
    """A whole experiment.

    Args:
        model: returns the dense `nn.Module`.
        data: returns an object with the splits ``train``, ``val`` and ``test``.
        loss: returns ``(output, target) -> scalar``; a plain function of two arguments is taken as it is.
        seed: seeds every generator at the start of each stage.
        precision: ``no``, ``bf16`` or ``fp16``.
        compiled: run training steps through `torch.compile`; numbers differ by rounding.
        threads: CPU threads of training; 0 for torch's default.
        latency_threads: CPU threads of the latency measurement, at batch size 1.
        dense: stage 1.
        factorize: how stage 2 begins.
        train: stage 2, phase after phase.
        prune: stage 3.
        finetune: stage 4. Stage 5 merges and measures.
        truncated: baseline: the dense network cut at once to the same MACs, then trained by this phase.
        continued: baseline: the dense network trained on by this phase.
    """

    model: Component
    data: Component
    loss: Component
    seed: int = 0
    precision: Precision = "no"
    compiled: bool = False
    threads: int = 0
    latency_threads: int = 1
    dense: Phase = field(default_factory=Phase)
    factorize: Factorization = field(default_factory=Factorization)
    train: list[Phase] = field(default_factory=list)
    prune: Cut = field(default_factory=Cut)
    finetune: Phase = field(default_factory=Phase)
    truncated: Phase | None = None
    continued: Phase | None = None


def read_recipe(path: str | Path, changes: Iterable[str] = (), *, cut: bool = True) -> Recipe:
    """Read a recipe and check everything that can be checked before any work.

    Args:
        path: a YAML file. Its folder and the working directory may hold the user's own modules.
        changes: ``key=value`` with dotted keys, values in YAML: ``train.0.epochs=3``.
        cut: whether the recipe has to say how ranks are chosen; a model, data and a loss are enough otherwise.

    Returns:
        The recipe with every default filled in, those of the named classes and functions included.

    Raises:
        RecipeError: the key, what came, and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(str(path), "no such file", allowed="a YAML recipe, such as recipes/digits.yaml")
    for folder in (str(path.resolve().parent), os.getcwd()):
        if folder not in sys.path:
            sys.path.append(folder)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(str(path), f"is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(str(path), f"is a {type(raw).__name__}", allowed="a mapping of keys")
    for change in changes:
        _change(raw, change)
    return parse_recipe(raw, cut=cut)


def parse_recipe(raw: Mapping[str, Any], *, cut: bool = True) -> Recipe:
    """Check a recipe given as plain data; see `read_recipe`."""
    recipe: Recipe = _parsed(Recipe, raw, "")
    _check(recipe, cut)
    return _complete(recipe)


def _parsed(kind: Any, value: Any, key: str) -> Any:
    """Turn plain data into a value of one of the types that a recipe's fields have."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        kind = next(arg for arg in args if arg is not NoneType)
        return None if value is None else _parsed(kind, value, key)
    if is_dataclass(kind):
        return _parsed_section(kind, value, key)
    if kind == Component and isinstance(value, str):
        return {"class_path": value}
    if origin is dict and isinstance(value, Mapping):
        return {str(name): entry if args[1] is Any else _parsed(args[1], entry, f"{key}.{name}") for name, entry in value.items()}
    if origin is list and isinstance(value, list):
        return [_parsed(args[0], entry, f"{key}.{index}") for index, entry in enumerate(value)]
    if origin is Literal:
        value = "no" if value is False else value  # YAML reads a bare no as false
        if value in args:
            return value
    if kind in (int, str) and isinstance(value, kind) and not isinstance(value, bool):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError):
            return float(value)  # YAML reads 1e-3 as a string
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false", list: "a list", dict: "a mapping"}
    allowed = ", ".join(map(str, args)) if origin is Literal else IMPORTED if kind == Component else names[origin or kind]
    raise RecipeError(key, f"got {value!r}", allowed=allowed)


def _parsed_section(kind: Any, value: Any, key: str) -> Any:
    known = {entry.name: entry for entry in fields(kind)}
    allowed = ", ".join(known)
    if not isinstance(value, Mapping):
        raise RecipeError(key or "(recipe)", f"got {value!r}", allowed=f"a mapping with {allowed}")
    dotted = {name: f"{key}.{name}".removeprefix(".") for name in (*value, *known)}
    for name in value:
        if name not in known:
            raise RecipeError(dotted[name], "unknown key", allowed=allowed)
    for name, entry in known.items():
        if name not in value and entry.default is MISSING and entry.default_factory is MISSING:
            raise RecipeError(dotted[name], "is missing", allowed=IMPORTED)
    hints = get_type_hints(kind)
    arguments = {name: _parsed(hints[name], entry, dotted[name]) for name, entry in value.items()}
    return _guard(key, partial(kind, **arguments))


def _explain(error: Exception) -> tuple[str, str, str]:
    """Split the message of a signature's parser into the argument, the problem and what is allowed; what is not found stays empty."""
    text = re.sub(r"<class '([^']*)'>", r"\1", " ".join(str(error).split()))
    if missing := re.search(r"arguments? (?:is|are) required: (\w+)", text):
        return missing[1], "is missing", ""
    if wrong := re.fullmatch(r'Parser key "([^"]*)": Expected an? (.*?)\. Got value: (.*)', text):
        return wrong[1], f"got {wrong[3]!r}", wrong[2]
    other = re.fullmatch(r'Parser key "([^"]*)": (.*)', text)
    return (other[1], other[2], "") if other else ("", text, "")


def _change(raw: dict[str, Any], change: str) -> None:
    """Apply one ``key=value``."""
    key, equals, text = change.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(change, "is not a change", allowed="KEY=VALUE, for example train.0.epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(key, f"got {text!r}, which is not YAML: {error}") from error
    node: Any = raw
    parts = key.split(".")
    for depth, part in enumerate(parts):
        path, last = ".".join(parts[: depth + 1]), depth + 1 == len(parts)
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise RecipeError(path, "no such entry", allowed=f"0 to {len(node) - 1}" if node else "nothing, the list is empty")
            place: Any = int(part)
        elif isinstance(node, dict):
            place = next((name for name in node if str(name) == part), part)
            node.setdefault(place, None)
        else:
            raise RecipeError(path, f"cannot be set inside {node!r}", allowed="a key of a mapping or a list")
        if last:
            node[place] = value
        elif isinstance(node[place], str):
            node[place] = {"class_path": node[place]}
        elif node[place] is None:
            node[place] = {}
        node = node[place]


def _check(recipe: Recipe, cut: bool) -> None:
    """Check what the types cannot say."""
    given = [name for name in ("rule", "budget", "ranks") if getattr(recipe.prune, name) is not None]
    if len(given) > 1 or (cut and not given):
        raise RecipeError("prune", f"has {' and '.join(given) or 'none'} of rule, budget, ranks", allowed="exactly one")
    for name in ("latency", "latency_s"):
        if recipe.prune.budget is not None and name in recipe.prune.budget.limits:
            problem = "needs a latency table, which a recipe does not make"
            raise RecipeError(
                f"prune.budget.{name}", problem, allowed="macs, params, size, size_bytes; or latency_table and allocate in Python"
            )
    least_values = (
        ("threads", recipe.threads, 0),
        ("latency_threads", recipe.latency_threads, 1),
        ("prune.examples", recipe.prune.examples, 1),
    )
    for key, value, least in least_values:
        if value < least:
            raise RecipeError(key, f"got {value}", allowed=f">= {least}")
    for name, rank in (recipe.prune.ranks or {}).items():
        if rank < 1:
            raise RecipeError(f"prune.ranks.{name}", f"got {rank}", allowed=">= 1")
    for key, phase in phases(recipe):
        if phase.epochs < 0:
            raise RecipeError(f"{key}.epochs", f"got {phase.epochs}", allowed=">= 0")
        if phase.accumulate < 1:
            raise RecipeError(f"{key}.accumulate", f"got {phase.accumulate}", allowed=">= 1")
        if phase.clip is not None and not phase.clip > 0:
            raise RecipeError(f"{key}.clip", f"got {phase.clip}", allowed="> 0, or null for no clipping")
        if phase.distill is not None:
            _guard(f"{key}.distill", partial(Distillation, nn.Identity(), **asdict(phase.distill)))


def phases(recipe: Recipe) -> list[tuple[str, Phase]]:
    """Return every phase of a recipe with its key."""
    listed = [("dense", recipe.dense), *((f"train.{i}", phase) for i, phase in enumerate(recipe.train)), ("finetune", recipe.finetune)]
    baselines = [("truncated", recipe.truncated), ("continued", recipe.continued)]
    return listed + [(key, phase) for key, phase in baselines if phase is not None]


def _complete(recipe: Recipe) -> Recipe:
    """Check every component against the signature it names and write its defaults out; build those that are cheap."""
    for key in ("model", "data", "loss"):
        setattr(recipe, key, _filled(getattr(recipe, key), key))
    _guard("loss", partial(make_loss, recipe.loss))
    if recipe.prune.rule is not None:
        recipe.prune.rule = _filled(recipe.prune.rule, "prune.rule")
        rule = _guard("prune.rule", partial(make, recipe.prune.rule, "prune.rule"))
        try:
            index(rule(torch.tensor([2.0, 1.0])))
        except (TypeError, ValueError) as error:
            problem = f"{recipe.prune.rule['class_path']} chooses no rank ({error})"
            raise RecipeError("prune.rule", problem, allowed="a rank rule: singular values -> integer") from error
    for key, phase in phases(recipe):
        phase.optimizer = _filled({"class_path": Phase().optimizer["class_path"], **phase.optimizer}, f"{key}.optimizer", skip=1)
        optimizer = _guard(f"{key}.optimizer", partial(make, phase.optimizer, f"{key}.optimizer", [nn.Parameter(torch.zeros(2, 2))]))
        if phase.scheduler is not None:
            phase.scheduler = _filled(phase.scheduler, f"{key}.scheduler", skip=1, open_keys=STEPS)
            scheduler = _guard(f"{key}.scheduler", partial(_scheduler, phase.scheduler, optimizer, 100))
            if isinstance(scheduler, ReduceLROnPlateau):
                raise RecipeError(f"{key}.scheduler", "waits for a metric", allowed="a schedule whose step() takes nothing")
        phase.penalties = [_filled(p, f"{key}.penalties.{i}") for i, p in enumerate(phase.penalties)]
        for i, penalty in enumerate(phase.penalties):
            value = _guard(f"{key}.penalties.{i}", partial(make, penalty, f"{key}.penalties.{i}"))
            if not callable(value):
                problem = f"{penalty['class_path']} gives a {type(value).__name__}"
                raise RecipeError(f"{key}.penalties.{i}", problem, allowed="a penalty: model -> scalar tensor")
        if phase.rank_schedule is not None:
            if not key.startswith(("train", "finetune")):
                raise RecipeError(f"{key}.rank_schedule", "given where nothing is left to cut", allowed="train and finetune phases")
            phase.rank_schedule = _filled(phase.rank_schedule, f"{key}.rank_schedule")
            schedule = _guard(f"{key}.rank_schedule", partial(make, phase.rank_schedule, f"{key}.rank_schedule"))
            if not callable(schedule):
                problem = f"{phase.rank_schedule['class_path']} gives a {type(schedule).__name__}"
                raise RecipeError(f"{key}.rank_schedule", problem, allowed="a schedule: (model, inputs, step, steps) -> ranks or None")
    return recipe


def _filled(component: Component, key: str, skip: int = 0, open_keys: tuple[str, ...] = ()) -> Component:
    """Return a component with its defaults written out."""
    extra = sorted(set(component) - {"class_path", "init_args"})
    if extra or not isinstance(component.get("class_path"), str) or not isinstance(component.get("init_args") or {}, dict):
        raise RecipeError(key, f"got {component!r}", allowed=IMPORTED)
    target = _imported(component["class_path"], key)
    given = dict(component.get("init_args") or {})
    if key == "loss" and not given and _is_loss(target):
        return {"class_path": component["class_path"], "init_args": {}}
    left_open = [name for name in open_keys if given.get(name) is None]
    parser = _signature_parser(target, skip)
    names = {action.dest for action in parser._actions if not action.dest.endswith("help")}
    given |= {name: 1 for name in left_open if name in names}  # stands in until the number of steps is known
    unknown = sorted(set(given) - names)
    if unknown:
        raise RecipeError(f"{key}.init_args.{unknown[0]}", "unknown argument", allowed=", ".join(sorted(names)) or "none")
    try:
        parsed = parser.parse_object(given)
        arguments: dict[str, Any] = json.loads(json.dumps(parsed.as_dict(), default=str))
    except Exception as error:  # jsonargparse raises ArgumentError and several others
        name, problem, allowed = _explain(error)
        raise RecipeError(f"{key}.init_args.{name}".removesuffix("."), problem, allowed=allowed) from error
    for name in left_open:
        arguments.pop(name, None)
    return {"class_path": component["class_path"], "init_args": arguments}


def _is_loss(target: Any) -> bool:
    """Whether a function is the loss itself: it takes output and target; one that takes nothing makes the loss."""
    if isinstance(target, type):
        return False
    try:
        inspect.signature(target).bind("output", "target")
    except TypeError:
        return False
    except ValueError:  # some functions written in C have no signature
        return True
    return True


def _scheduler(component: Component, optimizer: Any, steps: int) -> Any:
    return make(component, "scheduler", optimizer, **dict.fromkeys(STEPS, steps))


def _signature_parser(target: Any, skip: int) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    skipped: Any = {skip} if skip else None
    if isinstance(target, type):
        parser.add_class_arguments(target, skip=skipped, fail_untyped=False)
    else:
        parser.add_function_arguments(target, skip=skipped, fail_untyped=False)
    return parser


def _imported(path: str, key: str) -> Any:
    """Import a class or function by its dotted path."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise RecipeError(f"{key}.class_path", f"got '{path}'", allowed="a dotted import path, such as torch.nn.CrossEntropyLoss")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # the user's own module may raise anything
        problem = f"'{path}' cannot be imported ({type(error).__name__}: {error})"
        raise RecipeError(f"{key}.class_path", problem, allowed="a class or function on the Python path") from error
    if not callable(found):
        raise RecipeError(f"{key}.class_path", f"'{path}' is a {type(found).__name__}", allowed="a class or function")
    return found


def _guard(key: str, action: Callable[[], Any]) -> Any:
    """Run an action and name the recipe's key in its error."""
    try:
        return action()
    except RecipeError:
        raise
    except (ValueError, TypeError) as error:
        raise RecipeError(key, str(error)) from error


def make(component: Component, key: str, *args: Any, **extra: Any) -> Any:
    """Build what a component names, with `args` first and `extra` for arguments that it leaves out."""
    target = _imported(component["class_path"], key)
    parser = _signature_parser(target, len(args))
    names = {action.dest for action in parser._actions}
    arguments = {**{name: value for name, value in extra.items() if name in names}, **component["init_args"]}
    parsed = parser.instantiate(parser.parse_object(arguments))
    return target(*args, **vars(parsed) if isinstance(parsed, Namespace) else parsed)


def make_loss(component: Component) -> Loss:
    """Build the loss: an instance of a class, what a function with arguments makes, or the function itself."""
    target = _imported(component["class_path"], "loss")
    if component["init_args"] or not _is_loss(target):
        target = make(component, "loss")
    if not callable(target):
        problem = f"{component['class_path']} gives a {type(target).__name__}"
        raise RecipeError("loss", problem, allowed="(output, target) -> scalar, or a class or function that makes one")
    return target  # type: ignore[no-any-return]


def _made(component: Component, key: str) -> Any:
    """Build the model or the data; arguments that they refuse are the recipe's fault, a missing file is not."""
    try:
        return make(component, key)
    except SettingError as error:
        raise RecipeError(f"{key}.init_args", str(error)) from error


def make_model(recipe: Recipe) -> nn.Module:
    """Build the dense network, seeded."""
    seed_everything(recipe.seed)
    model = _made(recipe.model, "model")
    if not isinstance(model, nn.Module):
        raise RecipeError("model", f"{recipe.model['class_path']} gives a {type(model).__name__}", allowed="a torch.nn.Module")
    return model


def make_data(recipe: Recipe) -> Data:
    """Build the data, and check that it has the three splits."""
    data = _made(recipe.data, "data")
    for split in ("train", "val", "test"):
        if not hasattr(data, split):
            problem = f"{recipe.data['class_path']} gives a {type(data).__name__} without '{split}'"
            raise RecipeError("data", problem, allowed="an object with train, val, test")
    return data  # type: ignore[no-any-return]


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 the global generator is what users draw from
    random.seed(seed)


class Run:
    """One recipe in one folder: stage after stage, each in a folder of its own, finished ones skipped.

    A stage's folder holds its model (``model.safetensors``, ``spectrim.json``), its numbers (``stage.json``) and, while it trains, its
    checkpoints. The digest in ``stage.json`` covers the settings of the stage and of everything before it; when it differs, the stage is
    run anew. The folder of the run holds ``recipe.yaml`` with every default written out, and ``result.json``.
    """

    def __init__(self, recipe: Recipe, out: str | Path, *, progress: bool = True) -> None:
        """Prepare; nothing is written before `run`.

        Args:
            recipe: from `read_recipe`.
            out: the run's folder; made if missing.
            progress: whether to show progress, on stderr.
        """
        self.recipe, self.out, self.progress = recipe, Path(out), progress
        self.console = Console(stderr=True, quiet=not progress)
        self.data = make_data(recipe)
        self.loss = make_loss(recipe.loss)
        self.initial = make_model(recipe)
        self.example = one_example(self.data.val)
        self._check_layers()
        self.digest = ""
        self.numbers: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        """Run every stage that is not finished and return the result, which is in ``result.json`` too."""
        recipe, dense = self.recipe, self.dense()
        after_dense = self.digest
        low = self._stage("2-train", [plain(recipe.factorize), plain(recipe.train)], lambda folder: self._train(dense, folder))
        cut = self._stage("3-prune", [plain(recipe.prune)], lambda folder: self._cut(low))
        tuned = self._stage("4-finetune", [plain(recipe.finetune)], lambda folder: self._finetune(cut, dense, recipe.finetune, folder))
        final = self._stage("5-merge", [], lambda folder: (merge(tuned), {}))
        models = {"dense": dense, "final": final}
        after_merge = self.digest
        if recipe.truncated is not None:
            phase = recipe.truncated
            models["truncated"] = self._stage("b1-truncated", [plain(phase)], lambda folder: self._truncated(dense, final, phase, folder))
        if recipe.continued is not None:
            self.digest, more = after_dense, recipe.continued
            models["continued"] = self._stage("b2-continued", [plain(more)], lambda folder: self._continued(dense, more, folder))
        self.digest = _digest([after_merge, [plain(recipe.truncated), plain(recipe.continued)], recipe.latency_threads])
        measured = self._measured(models, tuned)
        result: dict[str, Any] = {name: entry.to_dict() for name, entry in measured.items()}
        result |= {
            "stages": self.numbers,
            "recipe": plain(recipe),
            "environment": environment(),
        }
        write_text(self.out / RESULT, json.dumps(result, indent=1) + "\n")
        return result

    def dense(self) -> nn.Module:
        """Return the dense network of the first stage, trained where the recipe says so; the recipe is written to the folder."""
        recipe = self.recipe
        self.out.mkdir(parents=True, exist_ok=True)
        write_text(self.out / RECIPE, yaml.safe_dump(plain(recipe), sort_keys=False))
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        common = {name: plain(getattr(recipe, name)) for name in ("model", "data", "loss", "seed", "precision")}
        return self._stage("1-dense", [common, plain(recipe.dense)], self._dense)

    def _check_layers(self) -> None:
        """Check what the recipe says about layers before any work."""
        modules = dict(self.initial.named_modules())
        chosen = [name for name, reason in decide(self.initial, self.recipe.factorize.layers()).items() if reason is None]
        weights = [
            factor_name(name, weight) for name in chosen if (kind := kind_of(modules[name])) for weight in kind.weights(modules[name])
        ]
        if not weights:
            raise RecipeError("factorize.where", "selects no layer that can be factorized", allowed="see spectrim coverage RECIPE")
        for name in self.recipe.prune.ranks or {}:
            if name not in weights:
                raise RecipeError(f"prune.ranks.{name}", "is no weight that will be factorized", allowed=", ".join(weights))

    def _stage(self, name: str, settings: Any, work: Callable[[Path], tuple[nn.Module, dict[str, Any]]]) -> nn.Module:
        """Run one stage, or load what it made when it is finished with the same settings."""
        self.digest = _digest([self.digest, name, settings])
        folder = self.out / name
        state = _read_stage(folder)
        if state.get("digest") == self.digest and state.get("finished"):
            self.numbers[name] = state["numbers"]
            self.console.print(f"{name}: finished before, skipped")
            try:
                return load(folder, self.initial)
            except FormatError as error:
                raise FormatError(
                    folder, f"the stage is finished but cannot be read ({error})", hint="delete the folder to run it anew"
                ) from error
        if state.get("digest") != self.digest:
            if folder.exists():
                self.console.print(f"{name}: settings changed, run anew")
                (folder / STAGE).unlink(missing_ok=True)  # first, so that what is left of a folder never looks finished
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            write_text(folder / STAGE, json.dumps({"digest": self.digest, "finished": False}))
        self.console.rule(name, align="left")
        seed = self.recipe.seed + int(_digest(name)[:6], 16)
        seed_everything(seed)
        for generator in generators_of(self.data.train):
            generator.manual_seed(seed)
        start = time.perf_counter()
        model, numbers = work(folder)
        numbers = {**numbers, "seconds": round(time.perf_counter() - start, 1)}
        save(model, folder)
        write_text(folder / STAGE, json.dumps({"digest": self.digest, "finished": True, "numbers": numbers}, indent=1))
        self.numbers[name] = numbers
        for key, title in (("val_cut", "right after the cut"), ("val_recalibrated", "BatchNorm recalibrated"), ("val", "at the end")):
            if key in numbers:
                values = ", ".join(f"{metric} {value:.4g}" for metric, value in numbers[key].items())
                self.console.print(f"validation split, {title}: {values}", highlight=False)
        return model

    def _fit(self, model: nn.Module, phase: Phase, folder: Path, teacher: nn.Module | None) -> dict[str, list[dict[str, Any]]]:
        """Run one phase and return its history as plain data."""
        optimizer = make(phase.optimizer, "optimizer", [p for p in model.parameters() if p.requires_grad])
        scheduler = None
        if phase.scheduler is not None and phase.epochs:
            steps = phase.epochs * (-(-len(self.data.train) // phase.accumulate) if phase.scheduler_steps == "batch" else 1)
            scheduler = _scheduler(phase.scheduler, optimizer, steps)
        penalties = [make(penalty, "penalties") for penalty in phase.penalties]
        distill = Distillation(copy.deepcopy(teacher), **asdict(phase.distill)) if phase.distill and teacher is not None else None
        schedule = make(phase.rank_schedule, "rank_schedule") if phase.rank_schedule is not None else None
        history = fit(
            model, self.data.train, self.loss, optimizer, phase.epochs, rank_schedule=schedule,
            penalties=penalties, eval_data=self.data.val, scheduler=scheduler, scheduler_steps=phase.scheduler_steps, distill=distill,
            precision=self.recipe.precision, accumulate=phase.accumulate, clip=phase.clip, compiled=self.recipe.compiled, checkpoint=folder,
            progress=self.progress,
        )  # fmt: skip
        return history.to_dict()

    def _dense(self, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
        model = copy.deepcopy(self.initial)
        log = self._fit(model, self.recipe.dense, folder / "phase-0", None)
        return model, {**log, "val": self._validate(model)}

    def _train(self, dense: nn.Module, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
        settings = self.recipe.factorize
        source = dense if settings.start == "dense" else self.initial
        low = factorize(source, settings.scheme, self.recipe.factorize.layers())
        logs = [self._fit(low, phase, folder / f"phase-{index}", dense) for index, phase in enumerate(self.recipe.train)]
        numbers = {place: [log[key] for log in logs] for place, key in (("phases", "epochs"), ("cuts", "cuts"), ("layers", "layers"))}
        return low, {**numbers, "val": self._validate(low), "spectra": {k: v.tolist() for k, v in spectra(low).items()}}

    def _cut(self, low: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        settings = self.recipe.prune
        known = first_examples(self.data.train, settings.examples) if settings.correct or settings.cut != "plain" else []
        moments = calibrate(low, known, self.loss, examples=None) if settings.cut != "plain" else None
        importance, metric = way_to_cut(settings.cut, moments)
        rule: Any = settings.ranks
        if settings.rule is not None:
            rule = make(settings.rule, "prune.rule")
        elif settings.budget is not None:
            rule = allocate(low, settings.budget, self.example, importance=importance)
        cut = prune(low, rule, calibration=metric)
        if settings.correct:
            cut = correct(cut, low, known, examples=None)
        numbers: dict[str, Any] = {"ranks": ranks(cut), "val_cut": self._validate(cut)}
        if settings.recalibrate:
            recalibrate(cut, self.data.train)
            numbers["val"] = self._validate(cut)
        return cut, numbers

    def _finetune(self, cut: nn.Module, dense: nn.Module, phase: Phase, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
        tuned = copy.deepcopy(cut)
        log = self._fit(tuned, phase, folder / "phase-0", dense)
        return tuned, {**log, "val": self._validate(tuned)}

    def _truncated(self, dense: nn.Module, final: nn.Module, phase: Phase, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
        """Cut the dense network at once to the MACs of the final one, by the same knapsack, then train."""
        kept = measure(final, self.example, latency=False).macs / measure(dense, self.example, latency=False).macs  # type: ignore[operator]
        low = factorize(dense, self.recipe.factorize.scheme, self.recipe.factorize.layers())
        cut = prune(low, allocate(low, Budget(macs=min(1.0, kept)), self.example))
        numbers: dict[str, Any] = {"ranks": ranks(cut), "val_cut": self._validate(cut)}
        if self.recipe.prune.recalibrate:
            recalibrate(cut, self.data.train)
            numbers["val_recalibrated"] = self._validate(cut)
        tuned, more = self._finetune(cut, dense, phase, folder)
        return merge(tuned), numbers | more

    def _continued(self, dense: nn.Module, phase: Phase, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
        return self._finetune(dense, dense, phase, folder)

    def _measured(self, models: dict[str, nn.Module], tuned: nn.Module) -> dict[str, Measurement]:
        """Measure every model side by side; the one place where the test split is read. Skipped when nothing changed."""
        folder = self.out / "measure"
        state = _read_stage(folder)
        if state.get("digest") == self.digest and state.get("finished"):
            return {name: Measurement.from_dict(entry) for name, entry in state["numbers"].items()}
        self.console.rule("measure", align="left")
        measured = measure_together(models, self.example, self.data.test, self.loss, self.recipe.latency_threads)
        measured["final"] = replace(measured["final"], ranks=ranks(tuned))
        folder.mkdir(exist_ok=True)
        numbers = {name: entry.to_dict() for name, entry in measured.items()}
        write_text(folder / STAGE, json.dumps({"digest": self.digest, "finished": True, "numbers": numbers}, indent=1))
        return measured

    def _validate(self, model: nn.Module) -> dict[str, float]:
        return evaluate(model, self.data.val, self.loss)


def ranks(model: nn.Module) -> dict[str, int]:
    """Return the rank of each factorized weight."""
    return {name: factors.rank for name, factors in named_factors(model)}


def environment() -> dict[str, Any]:
    """Return what a result depends on beside its settings."""
    names = ("spectrim", "torch", "numpy", "accelerate")
    return {
        "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def plain(value: Any) -> Any:
    """Return dataclasses as plain data for JSON and YAML."""
    return json.loads(json.dumps(asdict(value) if hasattr(value, "__dataclass_fields__") else value, default=lambda node: asdict(node)))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_stage(folder: Path) -> dict[str, Any]:
    """Return a stage's file, or nothing when it is missing or was cut off."""
    try:
        state = json.loads((folder / STAGE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}
