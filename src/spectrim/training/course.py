"""Courses at one step of training: the cut that one asks for, and functions that stand for a course."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from spectrim.errors import SettingError
from spectrim.forms.form import Size
from spectrim.layers import named_factors
from spectrim.protocols import Change, Course, RankSchedule, Sizes
from spectrim.surgery.prune import prune_


def cut_ranks(model: nn.Module, ranks: Sizes | None, optimizer: Optimizer) -> dict[str, Size] | None:
    """Cut to the ranks that a course returned, if any; return the ranks after it, or None where they are as before."""
    if ranks is None:
        return None
    before = {name: factors.size for name, factors in named_factors(model)}
    prune_(model, ranks, optimizer)
    after = {name: factors.size for name, factors in named_factors(model)}
    return after if after != before else None


@dataclass(frozen=True)
class Cuts:
    """A course from a function that returns ranks; its memory is empty.

    Args:
        schedule: see `RankSchedule`.
    """

    schedule: RankSchedule

    def start(self, model: nn.Module, inputs: Any, steps: int) -> dict[str, Any]:
        """Return an empty memory."""
        return {}

    def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any]) -> Change:
        """Ask the function."""
        return Change(self.schedule(model, inputs, step, steps))

    def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any]) -> None:
        """Do nothing."""


def as_course(given: Any, owner: str) -> Course:
    """Return what was given as a course; a function of ``(model, inputs, step, steps)`` becomes one.

    Raises:
        SettingError: for anything else.
    """
    if isinstance(given, type) or not (isinstance(given, Course) or callable(given)):
        rule = "courses, such as Ramp(0.9), or functions (model, inputs, step, steps) -> ranks or None"
        raise SettingError(owner, "courses", got=given, rule=rule)
    return given if isinstance(given, Course) else Cuts(given)


def name_of(given: Any) -> str:
    """Return the name of a penalty, course or lesson in the log."""
    if isinstance(given, Cuts):
        return name_of(given.schedule)
    return str(getattr(given, "__name__", None) or type(given).__name__)
