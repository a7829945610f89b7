"""What a message shows of a wrong value."""

from typing import Any

import numpy as np
from torch import Tensor

from spectrim.errors import SettingError


def _shown(value: Any) -> Any:
    """Return what a message shows of a value: itself where that is short, else its type."""
    if isinstance(value, Tensor | np.ndarray):
        return Text(f"a {type(value).__name__} of shape {tuple(value.shape)}")
    if isinstance(value, type):
        return Text(f"the class {value.__name__}")
    if isinstance(value, str | int | float | bool | None) and len(repr(value)) <= 60:
        return value
    if isinstance(value, list | tuple) and not value:
        return value
    return Text(f"a {type(value).__name__}")


class Text(str):
    """Text that a message shows without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def fail(verb: str, name: str, value: Any, rule: str, hint: str = "") -> SettingError:
    """Return the error for a wrong value of an argument."""
    return SettingError(verb, name, got=_shown(value), rule=rule, hint=hint)
