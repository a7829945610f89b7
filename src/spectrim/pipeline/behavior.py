"""What a function, an object or a network does, as far as its code and its values say, in a short digest.

Nothing that can be reached is left out, state between calls included: where two values may behave differently, their digests differ.
"""

import copyreg
import dis
import functools
import hashlib
import inspect
import os
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LIBRARIES = ("torch", "numpy", "scipy", "transformers", "peft", "accelerate", "lightning", "spectrim", "builtins", "functools", "math")
"""Packages whose code is taken for the same under the same name."""

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, np.generic)

UNSEEN = ("training", *vars(nn.Module()), "__module__", "__qualname__", "__doc__", "__firstlineno__", "__static_attributes__")
"""Attributes of modules and classes that do not change what they compute, or that are looked at by another way."""

Attributes = dict[tuple[str, str], str]
"""By the names of a module and of its attribute, the digest of the value."""


def of_value(value: Any) -> str:
    """Return a digest of what a function or an object does: its code, what it closes over and reads of its module, all of its values.

    The digest is the same in another process. State between calls counts: an object that was called is another one, if it counts its
    calls. Only what code reads from other modules of libraries, from files and from the machine is not seen.

    Args:
        value: a loss, a schedule, a penalty, or anything else.

    Examples:
        >>> of_value(nn.CrossEntropyLoss()) == of_value(nn.CrossEntropyLoss(label_smoothing=0.1))
        False
        >>> scaled = lambda factor: (lambda x: factor * x)
        >>> of_value(scaled(2)) == of_value(scaled(2)), of_value(scaled(2)) == of_value(scaled(3))
        (True, False)
    """
    made, seen = hashlib.sha256(), dict[int, tuple[int, Any]]()
    waiting: list[Any] = [(value,)]
    while waiting:  # no recursion: values may lie in each other a thousand levels deep
        part = waiting.pop()
        if isinstance(part, bytes):
            made.update(part + b"\0")
        elif isinstance(part[0], PLAIN):
            made.update(f"{type(part[0]).__name__} {part[0]!r}\0".encode(errors="surrogatepass"))
        elif id(part[0]) in seen:
            made.update(f"again {seen[id(part[0])][0]}\0".encode())
        else:
            seen[id(part[0])] = len(seen), part[0]  # held, so that no other value gets its id
            waiting += [b"end", *reversed(list(_inside(part[0])))]
    return made.hexdigest()[:16]


def said(method: Any) -> str:
    """Return the name and settings of a method; of one that does not say them, what it does."""
    return repr(method) if is_dataclass(method) else f"{type(method).__qualname__} {of_value(method)}"


def attributes_of(model: nn.Module) -> Attributes:
    """Return the attributes of all modules beside their parameters, buffers and children: settings such as ``p`` of dropout; counters too.

    Args:
        model: any module.
    """
    held = {id(value) for module in model.modules() for value in (module, *module._parameters.values(), *module._buffers.values())}
    found: Attributes = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in UNSEEN and id(value) not in held and not _is_kept_by_forward(module, key, value):
                found[name, key] = of_value(value)
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
    hooks = [list(getattr(module, key).values()) for module in model.modules() for key in ("_forward_hooks", "_forward_pre_hooks")]
    return of_value([settings, kinds, frozen, hooks])


def _is_kept_by_forward(module: nn.Module, key: str, value: Any) -> bool:
    """Whether an attribute is a tensor that the module's forward assigns: features of the last call."""
    code = getattr(type(module).forward, "__code__", None)
    return isinstance(value, Tensor) and code is not None and key in _assigned(code)


@functools.cache
def _assigned(code: types.CodeType) -> set[str]:
    return {str(step.argval) for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}


# What values are made of: bytes, and values in a tuple of one, in an order that does not depend on the process


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor | np.ndarray):
        yield from _of_array(value)
    elif isinstance(value, Mapping) and value is not os.environ:
        yield from _pairs(value)
    elif isinstance(value, list | tuple):
        yield f"{type(value).__qualname__} {len(value)}".encode()
        yield from ((entry,) for entry in value)
    elif isinstance(value, set | frozenset):
        yield from (digest.encode() for digest in sorted(map(of_value, value)))
    elif isinstance(value, types.MethodType):
        yield from ((value.__func__,), (value.__self__,))
    elif isinstance(value, types.CodeType):
        yield value.co_code
        yield from ((part,) for part in (value.co_names, value.co_varnames, value.co_consts))
    elif isinstance(value, type):
        yield from _of_class(value)
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value)
    elif value is os.environ:
        yield b"the environment"
    elif isinstance(value, types.ModuleType):
        yield f"module {value.__name__}".encode()
    else:
        yield from _of_object(value)


def _of_array(value: Any) -> Iterator[Any]:
    yield f"{value.dtype} {tuple(value.shape)}".encode()
    if isinstance(value, Tensor):
        if not value.is_meta:
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif value.dtype.hasobject:
        yield (value.tolist(),)
    else:
        yield value.tobytes()


def _pairs(values: Mapping[Any, Any]) -> Iterator[Any]:
    named = {of_value(key): (key, entry) for key, entry in values.items()}
    for digest in sorted(named):
        yield digest.encode()
        yield (named[digest][1],)


def _is_known(value: Any) -> bool:
    return str(getattr(value, "__module__", None)).split(".")[0] in LIBRARIES


def _of_class(kind: type) -> Iterator[Any]:
    yield f"{kind.__module__}.{kind.__qualname__}".encode()
    if not _is_known(kind):
        yield from ((base,) for base in kind.__bases__)
        yield from _pairs({name: entry for name, entry in vars(kind).items() if name not in UNSEEN and _is_code_or_value(entry)})


def _is_code_or_value(entry: Any) -> bool:
    return not isinstance(entry, types.GetSetDescriptorType | types.MemberDescriptorType)


def _of_object(value: Any) -> Iterator[Any]:
    """Yield what an object would be pickled as: its class, its arguments and its state."""
    yield (type(value),)
    if isinstance(value, nn.Module):
        yield value.extra_repr().encode()
        yield ({name: entry for name, entry in vars(value).items() if name not in UNSEEN},)
        yield from ((part,) for part in (value._parameters, value._buffers, value._modules, list(value._forward_hooks.values())))
        return
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:  # locks, files and the like: whatever their own code raises
        reduced = (vars(value),) if hasattr(value, "__dict__") else (getattr(value, "__qualname__", ""),)
    if isinstance(reduced, str):
        yield reduced.encode()
        return
    for part in reduced:
        if part is not copyreg.__newobj__:  # type: ignore[attr-defined]
            yield (list(part) if isinstance(part, Iterator) else part,)


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    yield f"{function.__module__}.{function.__qualname__}".encode()
    if _is_known(function) and not function.__closure__:
        return
    yield from ((part,) for part in (function.__code__, function.__defaults__, function.__kwdefaults__, vars(function)))
    read = inspect.getclosurevars(function)
    yield from _pairs(read.nonlocals)
    yield from _pairs({name: entry for name, entry in read.globals.items() if not isinstance(entry, types.ModuleType)})
    for module in (entry for entry in read.globals.values() if isinstance(entry, types.ModuleType)):
        if module.__name__.split(".")[0] not in (*LIBRARIES, *sys.stdlib_module_names):
            yield from _pairs(_read_of(module, function.__code__.co_names))


def _read_of(module: types.ModuleType, names: Iterable[str]) -> dict[str, Any]:
    """Return what code reads of a module of the user's."""
    return {name: vars(module)[name] for name in names if name in vars(module) and not isinstance(vars(module)[name], types.ModuleType)}
