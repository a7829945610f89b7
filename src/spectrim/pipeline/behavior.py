"""What a function, an object or a network does, as far as its code and its values say, in a short digest."""

import dis
import functools
import hashlib
import inspect
import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

LIBRARIES = ("torch", "numpy", "scipy", "transformers", "peft", "accelerate", "lightning", "spectrim", "builtins", "functools", "math")
"""Packages whose code is taken for the same under the same name."""

DEEPEST = 6
"""Levels of values inside values that are looked at."""

CHANGING = {"append", "extend", "insert", "pop", "popleft", "appendleft", "update", "add", "setdefault", "clear", "remove"}
"""Methods that change a container: code that calls them keeps state in containers, which are then left out."""

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

Attributes = dict[tuple[str, str], str]
"""By the names of a module and of its attribute, the value as text."""


def of_value(value: Any) -> str:
    """Return a digest of what a function or an object does: its code, what it closes over, its settings, tensors by their values.

    Two values with one digest behave alike, but for what their code reads from objects, modules and files. State is left out: variables and
    attributes that the code itself assigns, and containers where it changes some. The digest is the same in another process.

    Args:
        value: a loss, a schedule, a penalty, or anything else.

    Examples:
        >>> of_value(nn.CrossEntropyLoss()) == of_value(nn.CrossEntropyLoss(label_smoothing=0.1))
        False
        >>> scaled = lambda factor: (lambda x: factor * x)
        >>> of_value(scaled(2)) == of_value(scaled(2)), of_value(scaled(2)) == of_value(scaled(3))
        (True, False)
    """
    made = hashlib.sha256()
    for part in _parts(value, DEEPEST, {}):
        made.update(part + b"\0")
    return made.hexdigest()[:16]


def said(method: Any) -> str:
    """Return the name and settings of a method; of one that does not say them, what it does."""
    return repr(method) if is_dataclass(method) else f"{type(method).__qualname__} {of_value(method)}"


def attributes_of(model: nn.Module) -> Attributes:
    """Return the plain attributes of all modules: settings such as ``p`` of dropout; counters are among them.

    Args:
        model: any module.
    """
    found: Attributes = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_") and key != "training" and _is_plain(value):
                found[name, key] = repr(value)
    return found


def of_network(model: nn.Module, before: Attributes) -> str:
    """Return a digest of what a network does beside its weights: classes, code, settings, and which parameters train.

    Args:
        model: any module.
        before: its attributes before it ran: what differs from them now counts calls or keeps results, and is left out.
    """
    now = attributes_of(model)
    settings = sorted((*place, value) for place, value in now.items() if before.get(place) == value)
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    own = [module.forward for module in model.modules() if "forward" in vars(module)]
    return of_value([settings, kinds, frozen, own])


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, tuple | list) and all(isinstance(entry, PLAIN) for entry in value))


def _parts(value: Any, depth: int, seen: dict[int, tuple[int, Any]]) -> Iterator[bytes]:
    """Yield what a value is made of, in an order that does not depend on the process."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        if not value.is_meta:
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, PLAIN):
        yield repr(value).encode()
    elif id(value) in seen or not depth:
        yield f"again {seen[id(value)][0] if id(value) in seen else type(value).__qualname__}".encode()
    else:
        seen[id(value)] = len(seen), value  # held, so that no other value gets its id
        for inner in _inside(value):
            if isinstance(inner, bytes):
                yield inner
            else:
                yield from _parts(inner[0], depth - 1, seen)


def _inside(value: Any) -> Iterator[Any]:
    """Yield bytes, and values in a tuple of one, that make up a value that is no plain one."""
    if isinstance(value, Mapping):
        yield from _pairs(value)
    elif isinstance(value, list | tuple):
        yield str(len(value)).encode()
        yield from ((entry,) for entry in value)
    elif isinstance(value, set | frozenset):
        yield repr(sorted(map(repr, value))).encode()
    elif isinstance(value, functools.partial):
        yield from ((value.func,), (value.args,), (value.keywords,))
    elif isinstance(value, types.MethodType):
        yield from ((value.__func__,), (value.__self__,))
    elif isinstance(value, types.CodeType):
        yield value.co_code
        yield repr(value.co_names).encode()
        yield from ((constant,) for constant in value.co_consts)
    elif isinstance(value, type):
        yield from _of_class(value)
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value)
    elif hasattr(value, "__dict__") and not isinstance(value, types.ModuleType):
        yield from _of_object(value)
    else:
        yield f"{type(value).__module__}.{type(value).__qualname__} {getattr(value, '__qualname__', '')}".encode()


def _pairs(values: Mapping[Any, Any]) -> Iterator[Any]:
    for key in sorted(values, key=repr):
        yield repr(key).encode()
        yield (values[key],)


def _is_known(value: Any) -> bool:
    return str(getattr(value, "__module__", None)).split(".")[0] in LIBRARIES


def _of_class(kind: type) -> Iterator[Any]:
    yield f"{kind.__module__}.{kind.__qualname__}".encode()
    if not _is_known(kind):
        yield from ((base,) for base in kind.__bases__)
        own = {name: entry for name, entry in vars(kind).items() if isinstance(entry, (types.FunctionType, *PLAIN))}
        yield from _pairs(
            {name: entry for name, entry in own.items() if name not in ("__module__", "__qualname__", "__doc__", "__firstlineno__")}
        )


def _of_object(value: Any) -> Iterator[Any]:
    yield (type(value),)
    methods = [entry for name, entry in _methods(type(value)) if name != "__init__"]
    assigned = set().union(*(_assigned(method.__code__) for method in methods)) | {"training"}
    yield from _pairs(_without_state(vars(value), assigned, any(_changes_containers(method.__code__) for method in methods)))
    if isinstance(value, nn.Module):
        yield (value.extra_repr(),)


def _methods(kind: type) -> Iterator[tuple[str, types.FunctionType]]:
    for base in kind.__mro__:
        if not _is_known(base):
            yield from ((name, entry) for name, entry in vars(base).items() if isinstance(entry, types.FunctionType))


def _assigned(code: types.CodeType) -> set[str]:
    """Return the attributes and the variables of an outer function that code assigns."""
    return {str(step.argval) for step in dis.get_instructions(code) if step.opname in ("STORE_ATTR", "STORE_DEREF", "STORE_GLOBAL")}


def _changes_containers(code: types.CodeType) -> bool:
    names = {str(step.argval) for step in dis.get_instructions(code)}
    return bool(names & CHANGING) or any(step.opname == "STORE_SUBSCR" for step in dis.get_instructions(code))


def _without_state(values: Mapping[str, Any], assigned: set[str], changing: bool) -> dict[str, Any]:
    held = {name: value for name, value in values.items() if name not in assigned}
    return {name: value for name, value in held.items() if not (changing and isinstance(value, list | dict | set | deque))}


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    yield f"{function.__module__}.{function.__qualname__}".encode()
    if _is_known(function) and not function.__closure__:
        return
    code = function.__code__
    yield from ((code,), (function.__defaults__,), (function.__kwdefaults__,))
    read = inspect.getclosurevars(function)
    plain = {name: entry for name, entry in read.globals.items() if isinstance(entry, (types.FunctionType, Tensor, *PLAIN))}
    for values in (read.nonlocals, plain):
        yield from _pairs(_without_state(values, _assigned(code), _changes_containers(code)))
