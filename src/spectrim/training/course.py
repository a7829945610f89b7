"""Rank and penalty schedules at one step of training."""

from collections.abc import Mapping
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectrim.layers import named_factors
from spectrim.protocols import Penalty, PenaltySchedule, RankRule
from spectrim.surgery.prune import prune_


def cut_ranks(model: nn.Module, ranks: RankRule | Mapping[str, SupportsIndex] | None, optimizer: Optimizer) -> dict[str, int] | None:
    """Cut to what a schedule says, if anything; return the ranks after it, or None where they are as before."""
    if ranks is None:
        return None
    before = {name: factors.rank for name, factors in named_factors(model)}
    prune_(model, ranks, optimizer)
    after = {name: factors.rank for name, factors in named_factors(model)}
    return after if after != before else None


class ScheduledPenalty:
    """The penalty of a schedule: it is asked before each step and told what it returned last, which a checkpoint keeps."""

    def __init__(self, schedule: PenaltySchedule) -> None:
        """Start without a penalty."""
        self.schedule = schedule
        self.penalty: Penalty | None = None
        self.before: dict[str, Any] | None = None

    def advance(self, model: nn.Module, inputs: Any, step: int, steps: int) -> None:
        """Ask the schedule for the penalty of this step."""
        self.hold(self.schedule.penalty(model, inputs, step, steps, self.before))

    def hold(self, penalty: Penalty | None) -> None:
        """Take this as the penalty of the step."""
        self.penalty = penalty
        self.before = None if self.penalty is None else dict(vars(self.penalty))

    def __call__(self, model: nn.Module) -> Tensor:
        """Return what the present penalty adds; zero without one."""
        return torch.zeros(()) if self.penalty is None else self.penalty(model)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on."""
        return {"before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.before = state["before"]
