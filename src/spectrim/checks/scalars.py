"""Rules of numbers and of words from a list."""

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


def choice(*allowed: str) -> Rule:
    """Return the rule of one of several words."""

    def rule(verb: str, name: str, value: Any) -> None:
        if value not in allowed:
            raise fail(verb, name, value, ", ".join(f"'{entry}'" for entry in allowed[:-1]) + f" or '{allowed[-1]}'")

    return rule
