"""Rules of numbers."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, SupportsIndex

from torch import Tensor

from spectrim.checks.messages import fail

Rule = Callable[[str, str, Any], None]
"""Takes the verb, the name of the argument and its value; raises a `SettingError` for a wrong value."""


def integer(least: int) -> Rule:
    """Return the rule of an integer of at least `least`."""

    def rule(verb: str, name: str, value: Any) -> None:
        if isinstance(value, bool | Tensor) or not isinstance(value, SupportsIndex) or value.__index__() < least:
            raise fail(verb, name, value, f"an integer of at least {least}")

    return rule


def number(rule: str, fits: Callable[[float], bool]) -> Rule:
    """Return the rule of a real number that fits; `rule` says so in words."""

    def check_number(verb: str, name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value) or not fits(float(value)):
            raise fail(verb, name, value, rule)

    return check_number
