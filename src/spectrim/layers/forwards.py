"""Layers of another class: which forward a class runs, `renew` for a copy of another class, and `bare` for one without values."""

import copy
import functools
import inspect
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import nn

TABLES = (dict, OrderedDict, set, list)
"""What a module keeps its tensors, children and hooks in."""

READERS = {"weight", "_parameters", "get_parameter", "in_proj_weight", "all_weights", "_flat_weights"}


def leads_to_forward_of(own: type, base: type) -> bool:
    """Whether every forward between a class and `base` calls the next one and reads no weight: then `base`'s can be exchanged."""
    for kind in own.__mro__[: own.__mro__.index(base)]:
        for name in ("forward", "__call__", "_conv_forward"):
            if name in vars(kind):
                names = _names_in(getattr(vars(kind)[name], "__code__", None))
                if name != "forward" or "forward" not in names or any(n in READERS or n.startswith("weight_") for n in names):
                    return False
    return True


@functools.cache
def codes_of(own: type) -> set[str]:
    """Return the names that the forward of a user's class refers to, and what its other methods do that it calls."""
    methods = {
        name: entry for base in reversed(own.__mro__) if not base.__module__.startswith("torch.") for name, entry in vars(base).items()
    }
    found, waiting, done = set[str](), ["forward", "_conv_forward", "__call__"], set[str]()
    while waiting:
        name = waiting.pop()
        done.add(name)
        names = _names_in(getattr(inspect.unwrap(methods[name]), "__code__", None)) if name in methods else set()
        found |= names
        waiting.extend(other for other in names if other in methods and other not in done and callable(methods[other]))
    return found


def _names_in(code: Any) -> set[str]:
    """Return the names that a function's code refers to, those of functions inside it included."""
    if code is None:
        return set()
    inner = (constant for constant in code.co_consts if hasattr(constant, "co_names"))
    return {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}.union(*map(_names_in, inner))


def runs_forward_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the class of `module` runs exactly the forward of `kind`."""
    return all(getattr(type(module), name, None) is getattr(kind, name, None) for name in ("forward", "__call__", "_conv_forward"))


def renew(module: nn.Module, kind: type[nn.Module], drop: Iterable[str] = ()) -> Any:
    """Return a `kind` with `module`'s attributes, parameters, children and hooks; the containers are copied, the tensors are not."""
    new: Any = object.__new__(kind)
    for key, value in vars(module).items():
        if key not in drop:
            new.__dict__[key] = value.copy() if type(value) in TABLES else copy.copy(value) if isinstance(value, TABLES) else value
    return new


def bare(kind: type[nn.Module], *sizes: int, **settings: Any) -> Any:
    """Return a torch layer whose parameters, on the meta device, are to be replaced; initializing them costs more than all the rest.

    Args:
        kind: its class.
        sizes: as the class takes them.
        settings: as the class takes them.
    """
    made: nn.Module = _made_once(kind, sizes, tuple(settings.items()))  # type: ignore[arg-type]
    return renew(made, kind)


@functools.lru_cache(maxsize=1024)
def _made_once(kind: type[nn.Module], sizes: tuple[int, ...], settings: tuple[tuple[str, Any], ...]) -> nn.Module:
    return kind(*sizes, **dict(settings), device="meta")
