"""Checks of types and shapes at a fraction of the price of jaxtyping's own decorator, which its import hook puts on every function.

`jaxtyping.jaxtyped` binds the arguments of each call to a signature, checks them once before the call and once more with the result, and
builds its checks again each time that a function inside a function is defined. The decorator here has beartype check arguments and result
in one pass, builds the checks of a function at its first call, and keeps them for every later definition by the same lines.
"""

import functools
import inspect
import threading
import types
from collections.abc import Callable
from typing import Any, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

CHECK = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))
SIZES = jaxtyping.jaxtyped("context")  # within it, a name in a shape stands for one size
THEIRS = jaxtyping.jaxtyped


class Waiting(threading.local):
    """The functions whose arguments are being checked in this thread."""

    def __init__(self) -> None:
        self.stack: list[Callable[..., Any]] = []


WAITING = Waiting()
KNOWN: dict[int, tuple[types.FunctionType, dict[str, Any], Callable[..., Any]]] = {}


def resolved(fn: types.FunctionType) -> dict[str, Any]:
    """Return the annotations of a function, strings evaluated; an annotation with an unknown name allows anything, as with jaxtyping."""

    def one(hint: Any) -> Any:
        holder = types.SimpleNamespace(__annotations__={"value": hint}, __globals__=fn.__globals__)
        try:
            return get_type_hints(holder, fn.__globals__, include_extras=True)["value"]
        except Exception:  # whatever evaluating a string raises
            return Any

    return {name: one(hint) for name, hint in fn.__annotations__.items()}


def checks(fn: types.FunctionType) -> Callable[..., Any]:
    """Return the checks of a function; they check arguments, call the last function of `WAITING` with them, and check its result."""
    known = KNOWN.get(id(fn.__code__))
    if known and known[1] == fn.__annotations__:
        return known[2]
    # a copy without values of the surrounding function, which are not to be kept alive
    cells = tuple(types.CellType() for _ in fn.__code__.co_freevars)
    hollow = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, cells)
    hollow.__kwdefaults__, hollow.__qualname__, hollow.__module__ = fn.__kwdefaults__, fn.__qualname__, fn.__module__
    hollow.__annotations__ = resolved(fn)

    @functools.wraps(hollow)
    def waiting(*args: Any, **kwargs: Any) -> Any:
        return WAITING.stack.pop()(*args, **kwargs)

    made = CHECK(waiting)
    KNOWN[id(fn.__code__)] = (hollow, fn.__annotations__, made)
    return made


def jaxtyped(fn: Any = None, *, typechecker: Any = None) -> Any:
    """Decorate a function with its checks, as `jaxtyping.jaxtyped` does, which is left properties, class methods and static methods."""
    if fn is None:
        return jaxtyped
    if inspect.isclass(fn) and "__dataclass_fields__" in fn.__dict__ and isinstance(fn.__init__, types.FunctionType):
        if not hasattr(fn.__init__, "checked"):
            fn.__init__ = jaxtyped(fn.__init__)
        return fn
    if not isinstance(fn, types.FunctionType):
        return THEIRS(fn, typechecker=typechecker or CHECK)
    made: Callable[..., Any] | None = None

    @functools.wraps(fn)
    def checked(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal made
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        if made is None:
            made = checks(fn)
        stack = WAITING.stack
        depth = len(stack)
        stack.append(fn)
        try:
            with SIZES:
                return made(*args, **kwargs)
        finally:
            del stack[depth:]

    checked.checked = True  # type: ignore[attr-defined]
    return checked
