"""Classes made on the fly, so that a layer that is held or written in another way stays an instance of its own class."""

import functools
from typing import Any

from torch import nn


class Exchanged:
    """First base of every class that `class_of` makes: registries do not see it, pickles name what it was made of."""

    _kind: type
    _own: type
    _base: type

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return an ordinary layer of the own class for ``type(layer)(...)``: one that was never exchanged."""
        return cls._own(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the own class's ``__init_subclass__`` from running."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        kind = type(self)
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return revive, (kind._kind, kind._own, kind._base), state


def class_of(kind: type, own: type, base: type) -> type[nn.Module]:
    """Return the class of a layer of class `own` that behaves as `kind` says.

    Methods of `own` come first, those of `kind` take the place of those of `base`: a sub-class that calls ``super().forward`` reaches the
    forward of `kind`.

    Args:
        kind: the behavior, a class of modules.
        own: the layer's class.
        base: `own` itself, or the class above it whose behavior is exchanged.
    """
    made: type[nn.Module] = _class_of(kind, own, base)
    return made


@functools.cache
def _class_of(kind: Any, own: Any, base: Any) -> Any:
    name = own.__name__
    mark = getattr(kind, "marks", {}).get(base, base)
    mark = base if issubclass(own, mark) else mark
    bases: tuple[type, ...] = (Exchanged, kind, mark) if own is base else (Exchanged, own, _between(kind, mark))
    space = {"_kind": kind, "_own": own, "_base": base, "__qualname__": own.__qualname__}
    module = kind.__module__ if getattr(kind, "traced_inside", False) else own.__module__
    return type(name, bases, space | {"__module__": module, "__doc__": own.__doc__})


@functools.cache
def _between(kind: Any, base: Any) -> Any:
    return kind if issubclass(kind, base) else type(kind.__name__, (kind, base), {"__module__": kind.__module__})


def revive(kind: type, own: type, base: type) -> Any:
    """Return an empty layer for `pickle` and `copy` to fill."""
    return object.__new__(class_of(kind, own, base))
