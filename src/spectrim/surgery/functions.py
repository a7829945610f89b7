"""What functions refer to: closures, defaults, globals, weak references. A deep copy of a function is the function itself."""

import dis
import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "lightning", "spectrim", "builtins")
"""Packages whose classes refer to no layer of a model."""

DEEPEST = 4
"""Levels of containers and functions inside functions that are looked at."""


def reached(value: Any, depth: int = 0) -> Iterator[object]:
    """Yield what the functions in a value refer to: closures, defaults, weak references.

    Args:
        value: a function, or a container that may hold some.
        depth: how far inside the first value this one is.
    """
    if depth > DEEPEST:
        return
    inner: list[Any] = []
    kind = type(value)  # a weak proxy passes itself off as an instance of what it stands for
    if kind in (weakref.ProxyType, weakref.CallableProxyType):
        yield value.__repr__.__self__
    elif issubclass(kind, dict):
        inner = list(value.values())
    elif issubclass(kind, list | tuple | set):
        inner = list(value)
    elif issubclass(kind, functools.partial):
        inner = [value.func]
    elif issubclass(kind, weakref.ref):
        yield value()
    elif issubclass(kind, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        held = [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        yield from held
        inner = [entry for entry in held if isinstance(entry, types.FunctionType | functools.partial | list | dict | tuple)]
    for entry in inner:
        yield from reached(entry, depth + 1)


def methods_of(kind: type) -> Iterator[tuple[str, types.FunctionType]]:
    """Yield the functions of a user's class of modules and of those above it, by name, but constructors, which run no more in a copy.

    Args:
        kind: any class.
    """
    for base in kind.__mro__:
        if issubclass(base, nn.Module) and base.__module__.split(".")[0] not in LIBRARIES:
            own = vars(base).items()
            yield from ((name, entry) for name, entry in own if isinstance(entry, types.FunctionType) and name != "__init__")


def reached_by_code(function: types.FunctionType) -> Iterator[object]:
    """Yield modules that a function reads from its closure or from globals, by themselves or in containers of a few of them.

    Args:
        function: of a class.
    """
    names = {step.argval for step in dis.get_instructions(function.__code__) if step.opname == "LOAD_GLOBAL"}
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    for value in [*cells, *(function.__globals__[name] for name in names if name in function.__globals__)]:
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, dict | list | tuple):
            yield from (value.values() if isinstance(value, dict) else value)
