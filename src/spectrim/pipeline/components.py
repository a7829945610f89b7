"""Components that a recipe names by import path."""

import importlib
import inspect
import json
import random
import re
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace

from spectrim.errors import RecipeError, SettingError
from spectrim.pipeline.reading import shown
from spectrim.training.distillation import Loss

Component = dict[str, Any]
"""Anything by its import path: ``class_path`` names a class or a function, ``init_args`` its keyword arguments."""


IMPORTED = "an import path, or {class_path: IMPORT.PATH, init_args: {NAME: VALUE}}"


STEPS = ("total_steps", "T_max")
"""Arguments of schedules that are filled in with the number of steps when they are left out."""


def _explain(error: Exception) -> tuple[str, str, str]:
    """Split the message of a signature's parser into the argument, the problem and what is allowed; what is not found stays empty."""
    text = re.sub(r"<class '([^']*)'>", r"\1", " ".join(str(error).split()))
    if missing := re.search(r"arguments? (?:is|are) required: (\w+)", text):
        return missing[1], "is missing", ""
    if wrong := re.fullmatch(r'Parser key "([^"]*)": Expected an? (.*?)\. Got value: (.*)', text):
        return wrong[1], f"got {shown(wrong[3])}", wrong[2]
    other = re.fullmatch(r'Parser key "([^"]*)": (.*)', text)
    return (other[1], other[2], "") if other else ("", text, "")


def _filled(component: Component, key: str, skip: int = 0, open_keys: tuple[str, ...] = ()) -> Component:
    """Return a component with its defaults written out."""
    extra = sorted(set(component) - {"class_path", "init_args"})
    if extra or not isinstance(component.get("class_path"), str) or not isinstance(component.get("init_args") or {}, dict):
        raise RecipeError(key, f"got {shown(component)}", allowed=IMPORTED)
    target = _imported(component["class_path"], key)
    given = dict(component.get("init_args") or {})
    if key == "loss" and not given and _is_loss(target):
        return {"class_path": component["class_path"], "init_args": {}}
    left_open = [name for name in open_keys if given.get(name) is None]
    parser = _signature_parser(target, skip)
    names = {action.dest for action in parser._actions if not action.dest.endswith("help")}
    given |= {name: 1 for name in left_open if name in names}  # placeholder until the number of steps is known
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
    """Return the parser of a signature, which is read once for a class or a function: that takes longer than to parse with it."""
    return (_kept_parser if isinstance(target, type | FunctionType) else _new_parser)(target, skip)


def _new_parser(target: Any, skip: int) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    skipped: Any = {skip} if skip else None
    if isinstance(target, type):
        parser.add_class_arguments(target, skip=skipped, fail_untyped=False)
    else:
        parser.add_function_arguments(target, skip=skipped, fail_untyped=False)
    return parser


_kept_parser = lru_cache(maxsize=64)(_new_parser)


def _imported(path: str, key: str) -> Any:
    """Import a class or function by its dotted path."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise RecipeError(f"{key}.class_path", f"got '{path}'", allowed="a dotted import path, such as torch.nn.CrossEntropyLoss")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (Exception, SystemExit) as error:  # the user's own module may raise anything
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


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 the global generator is what users draw from
    random.seed(seed)
