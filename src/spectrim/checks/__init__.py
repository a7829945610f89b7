"""One check of arguments, at the entry of every public verb and before any work: `check` and the table of its rules."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from spectrim.checks.batches import BATCHES, INPUTS, READ_ONCE
from spectrim.checks.rules import FIELDS, NONE_ALLOWED, RULES, WHERE
from spectrim.errors import SettingError

__all__ = ["BATCHES", "INPUTS", "READ_ONCE", "RULES", "WHERE", "check", "naming", "outside_inference_mode", "unwrapped"]

P = ParamSpec("P")
R = TypeVar("R")

INNER = (
    "factorize", "fit", "calibrate", "allocate", "prune", "correct", "recalibrate", "merge", "evaluate", "measure", "compare_latency",
    "round_to",
)  # fmt: skip
"""Verbs that others call."""


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
