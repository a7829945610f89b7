"""`tap`: watch the operation of a layer itself, inside a forward of its own that prepares the input, and inside the hooks of others."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from spectrim.layers.kinds import kind_of
from spectrim.plain.exchanged import Exchanged

Before = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
"""Called with a layer and the arguments of its operation, before that runs."""

After = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]
"""Called with a layer, the arguments of its operation and the output."""

HELD = "_taps"
"""Attribute of a layer that is watched by its class: its taps."""


class Tap:
    """What watches a layer until it is removed."""

    def __init__(self, layer: nn.Module, before: Before | None, after: After | None) -> None:
        self.layer, self.before, self.after = layer, before, after
        self.handles: list[Any] = []

    def remove(self) -> None:
        """Watch no longer; with the last tap a layer gets its class back."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        held: Any = vars(self.layer)
        if self in held.get(HELD, ()):
            held[HELD].remove(self)
            if not held[HELD]:
                del held[HELD]
                self.layer.__class__ = type(self.layer)._tapped  # type: ignore[attr-defined]


def tap(layer: nn.Module, before: Before | None = None, after: After | None = None) -> Tap:
    """Watch each run of a layer's operation: what its weight meets, and what it makes of that.

    A sub-class whose forward prepares the input, or changes the output, and calls ``super().forward`` in between is watched there, as often
    as it calls it. Forward hooks of others run outside.

    Args:
        layer: dense, factorized or merged, or any other module, which is watched as a whole.
        before: called with the layer and the arguments of the operation.
        after: called with the layer, the arguments and the output.

    Returns:
        What ends it: call its ``remove``.

    Examples:
        >>> import torch
        >>> class Doubled(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(2 * x)
        >>> layer, seen = Doubled(2, 3), []
        >>> watching = tap(layer, lambda layer, args, kwargs: seen.append(args[0].tolist()))
        >>> _ = layer(torch.ones(2))
        >>> watching.remove()
        >>> seen, type(layer) is Doubled
        ([[2.0, 2.0]], True)
    """
    made = Tap(layer, before, after)
    if HELD in vars(layer):
        vars(layer)[HELD].append(made)
    elif "forward" not in vars(layer) and ((below := _below(layer)) is not type(layer) or layer._forward_hooks or layer._forward_pre_hooks):
        vars(layer)[HELD] = [made]
        kind: Any = type(layer)
        layer.__class__ = _class_of(kind, below)
    else:
        if before is not None:
            made.handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            made.handles.append(layer.register_forward_hook(after, with_kwargs=True))
    return made


def operate(layer: nn.Module, x: Any) -> Any:
    """Run a layer's operation alone: what `tap` watches, without a forward of its own around it and without hooks."""
    return _below(layer).forward(layer, x)


def _below(layer: nn.Module) -> Any:
    """Return the class whose forward is the operation: the layer's own class, or what that calls by ``super().forward``."""
    kind: Any = type(layer)
    if issubclass(kind, Exchanged):
        return kind if kind._own is kind._base else kind.__bases__[-1]
    known = kind_of(layer)
    base: Any = kind if known is None else known.base_of(kind)
    return kind if kind.forward is base.forward else base


@functools.cache
def _class_of(kind: Any, below: Any) -> Any:
    """Return `kind` with the taps around the forward of `below`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        taps = tuple(vars(self).get(HELD, ()))
        for each in taps:
            if each.before is not None:
                each.before(self, args, kwargs)
        output = super(around, self).forward(*args, **kwargs)
        for each in taps:
            if each.after is not None:
                each.after(self, args, kwargs, output)
        return output

    space = {"forward": forward, "_tapped": kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    around: Any = type(kind.__name__, (_Unregistered, below) if below is kind else (below,), space)
    return (
        around
        if below is kind
        else type(kind.__name__, (_Unregistered, kind, around), {name: value for name, value in space.items() if name != "forward"})
    )


class _Unregistered:
    """First base of the classes made here: the ``__init_subclass__`` of an own class does not see them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass
