"""Settings that take a few words or are yes or no, checked by their annotations: `check_words`, and `worded` for functions."""

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from torch import Tensor

from spectrim.checks.messages import fail

P = ParamSpec("P")
R = TypeVar("R")


def check_words(value: Any) -> None:
    """Check the fields of a dataclass that are annotated with words alone (`Literal`), with `bool`, or with these or None.

    Args:
        value: of a dataclass; its name is the first word of the message.

    Raises:
        SettingError: for a field with another word.

    Examples:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Brush:
        ...     side: Literal["left", "right"] = "left"
        ...     wet: bool = False
        ...     def __post_init__(self):
        ...         check_words(self)
        >>> Brush("middle")
        Traceback (most recent call last):
        spectrim.errors.SettingError: Brush: side must be 'left' or 'right', got 'middle'
        >>> Brush(wet="yes")
        Traceback (most recent call last):
        spectrim.errors.SettingError: Brush: wet must be True or False, got 'yes'
    """
    kind: Any = type(value)
    _check(kind.__name__, _annotated(kind), {entry.name: getattr(value, entry.name) for entry in fields(value) if entry.init})


def worded(function: Callable[P, R]) -> Callable[P, R]:
    """Check the arguments of a function that are annotated with words alone or `bool`, before it runs; a decorator.

    Examples:
        >>> @worded
        ... def turned(side: Literal["left", "right"], *, fast: bool = False):
        ...     return side
        >>> turned("up")
        Traceback (most recent call last):
        spectrim.errors.SettingError: turned: side must be 'left' or 'right', got 'up'
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # which the call itself says better
            return function(*args, **kwargs)
        _check(function.__name__, _annotated(function), given)
        return function(*args, **kwargs)

    return called


@functools.cache
def _annotated(owner: Any) -> dict[str, tuple[Any, ...]]:
    """Return, by name, the words that an annotation allows."""
    found = {name: _allowed(hint) for name, hint in get_type_hints(inspect.unwrap(owner)).items()}
    return {name: values for name, values in found.items() if values is not None}


def _allowed(hint: Any) -> tuple[Any, ...] | None:
    """Return the words of an annotation; None where it allows other objects."""
    if hint is bool:
        return True, False
    if get_origin(hint) is Literal:
        return get_args(hint)
    parts = [(None,) if part is type(None) else _allowed(part) for part in get_args(hint)]
    if None in parts or not parts or get_origin(hint) not in (Union, types.UnionType):
        return None
    return tuple(word for part in parts for word in part or ())


def _check(verb: str, annotated: Mapping[str, tuple[Any, ...]], given: Mapping[str, Any]) -> None:
    for name, allowed in annotated.items():
        if name in given and not _fits(given[name], allowed):
            words = [repr(one) for one in allowed]
            raise fail(verb, name, given[name], " or ".join(filter(None, (", ".join(words[:-1]), words[-1]))))


def _fits(value: Any, allowed: tuple[Any, ...]) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return False
    flag = isinstance(value, bool | np.bool_)
    return any(isinstance(one, bool) == flag and bool(value == one) for one in allowed)
