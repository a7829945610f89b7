"""`Squeeze`: a penalty on what will be cut, whose strength follows the budget."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from spectrim.budget.allocate import allocate
from spectrim.budget.budget import Budget
from spectrim.budget.ladder import Ladder
from spectrim.checks.words import check_words
from spectrim.errors import SettingError
from spectrim.forms.form import Size
from spectrim.layers import named_factors
from spectrim.layers.sharded import whole_values
from spectrim.penalties import TailEnergy, tail_shares
from spectrim.penalties.sums import total
from spectrim.penalties.tail import larger
from spectrim.protocols import Change, Importance, Latencies
from spectrim.runtimes.crossbar import Crossbars

PULL, DAMPING = 15.0, 1.5
"""How fast `Squeeze` corrects a strength: for being behind, over the whole span; and for falling behind."""


FASTEST = 50.0
"""Most that the logarithm of a strength can change over the whole span; one step has its part of that."""


START, WEAKEST, STRONGEST = 0.01, 1e-4, 10.0
"""Strength to begin with, and the limits of what is tried, in units of the loss per tail energy: that of a share over the energy.

A tail value then shrinks by ``2 * strength * rate`` of itself in a step, whatever the scale of its layer; plain gradient descent is stable
while that is below 2, so up to a rate of 0.1 at the strongest.
"""


SMALLEST_SHARE = 1e-12
"""Shares of energy below this are rounding."""


@dataclass(frozen=True)
class SteeredTail(TailEnergy):
    """``sum_l strength_l * max(0, tau_l - goal_l)``: a `TailEnergy` that is zero for weights at their present goal.

    The memory of `Squeeze`, as plain data.

    Args:
        ranks: see `TailEnergy`.
        strengths: see `TailEnergy`.
        goals: the present goal for the share of each weight's tail.
        lags: ``log(share / goal)`` when it was last measured.
    """

    goals: Mapping[str, float]
    lags: Mapping[str, float]

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the weighted penalty of all named weights that are behind their goal, a scalar."""
        held = larger(model, self.ranks)
        return total(model, [self.strengths[name] * F.relu(f.tail_share(self.ranks[name]) - self.goals[name]) for name, f in held])


@dataclass(frozen=True)
class Squeeze:
    """Train toward a budget: drive the values that the cut will discard to zero, with self-tuning strengths.

    At `updates` steps `allocate` chooses ranks for the budget. The share ``tau_l`` of the energy that lies beyond the allocated
    rank has a goal that falls from its present value to `left` at the `end`, by the same factor at every step; the excess is
    penalized, ``strength_l * max(0, tau_l - goal_l)``. Before every step the strength of each weight is corrected by how far it is behind
    its goal and by how much it has fallen behind since: ``log strength_l += (15 / steps) lag_l + 1.5 (change of lag_l)`` with
    ``lag_l = log(tau_l / goal_l)``, so that it adapts to optimizer, learning rate and task. A weight whose allocated rank changes starts
    again, from its present value to `left`. At the `end` the tails are cut; the rest of training is fine-tuning.

    A `Course`: give it to ``fit(..., courses=[...])``. The penalty has a separate column in the log, ``Squeeze``. Keep
    `Orthogonality` beside it: shares are those of ``S``, which is the spectrum as far as the factors are orthonormal.

    Args:
        budget: what the network keeps in the end.
        begin: when it begins, as a fraction of training in [0, 1).
        end: when the goal is reached and the cut is made, in (begin, 1]; before the last step at the latest.
        updates: how often the ranks are allocated again, >= 1, evenly from begin to end; as often after it
            when nothing is cut.
        left: share of each weight's energy that may be left to cut, in (0, 1).
        importance: for `allocate`; its own default when omitted. It is called at every update.
        latency: a `LatencyTable` of the model, for `allocate`.
        crossbars: `spectrim.runtimes.crossbar.Crossbars`, for a budget of tiles.
        cut: False to leave the cut to a later `prune`: from `end` on the tails are then kept at `left`.
        prices: the `ladder` of the model, so that it is not recomputed at every update; its ranks must not change before the cut.

    Raises:
        SettingError: for a value outside its range.

    Examples:
        >>> import torch
        >>> from spectrim.surgery.factorize import factorize
        >>> low = factorize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), where=lambda name, module: True)
        >>> squeeze = Squeeze(Budget(macs=0.5), end=0.5)
        >>> penalty = squeeze.penalty(low, torch.zeros(1, 8), 0, 100, None)
        >>> sum(16 * rank for rank in penalty.ranks.values()) <= 0.5 * 128
        True
        >>> squeeze(low, torch.zeros(1, 8), 50, 100) == penalty.ranks
        True

    Source: ours; the derivation is in the method card.
    """

    budget: Budget
    begin: float = 0.0
    end: float = 0.6
    updates: int = 40
    left: float = 1e-4
    importance: Importance | None = None
    latency: Latencies | None = None
    crossbars: Crossbars | None = None
    cut: bool = True
    prices: Ladder | None = field(default=None, repr=False, compare=False)
    penalizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_words(self)
        if not 0 <= self.begin < self.end <= 1:
            raise SettingError("Squeeze", "begin and end", got=(self.begin, self.end), rule="0 <= begin < end <= 1")
        if isinstance(self.updates, bool) or self.updates < 1:
            raise SettingError("Squeeze", "updates", got=self.updates, rule=">= 1")
        if not 0 < self.left < 1:
            raise SettingError("Squeeze", "left", got=self.left, rule="a share of the energy in (0, 1)")

    def __call__(self, model: nn.Module, inputs: Any, step: int, steps: int) -> Mapping[str, Size] | None:
        """Return the allocated ranks at the end, else None.

        Args:
            model: factorized.
            inputs: one batch of its inputs, for the costs.
            step: number of finished steps.
            steps: of the whole training.
        """
        if self.cut and step == self._span(steps)[1]:
            return self._allocate(model, inputs)
        return None

    def penalty(self, model: nn.Module, inputs: Any, step: int, steps: int, before: Mapping[str, Any] | None = None) -> SteeredTail | None:
        """Return the penalty of this step; None before `begin`, and after the cut.

        Args:
            model: factorized.
            inputs: one batch of its inputs, for the costs.
            step: number of finished steps.
            steps: of the whole training.
            before: the fields of the penalty of the step before; None when there was none.
        """
        first, last = self._span(steps)
        if step < first or (self.cut and step >= last):
            return None
        tail = self._steer(SteeredTail(**before), model, last - step, max(1, last - first)) if before is not None else None
        if tail is None or self._due(step, steps):
            tail = _aim(tail, model, self._allocate(model, inputs))
        return tail

    def start(self, model: nn.Module, inputs: Any, steps: int) -> dict[str, Any]:
        """Return the memory before the first step: no penalty yet, see `Course`."""
        return {"tail": None}

    def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any]) -> Change:
        """Return the penalty of this step and, at the end, the ranks to cut to, see `Course`.

        Args:
            model: factorized.
            inputs: one batch of its inputs, for the costs.
            step: number of finished steps.
            steps: of the whole training.
            memory: ``tail``, the fields of the last penalty, or None.
        """
        tail = self.penalty(model, inputs, step, steps, memory["tail"])
        memory["tail"] = None if tail is None else dict(vars(tail))
        return Change(self(model, inputs, step, steps), tail)

    def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any]) -> None:
        """Do nothing, see `Course`."""

    def _span(self, steps: int) -> tuple[int, int]:
        """Return the first step with a penalty and that of the cut."""
        return round(steps * self.begin), min(round(steps * self.end), steps - 1)

    def _due(self, step: int, steps: int) -> bool:
        """Whether a new part of the span, of `updates` equal ones, begins with this step; they go on behind it when nothing is cut."""
        first, last = self._span(steps)
        if step < first or (self.cut and step >= last):
            return False
        part, part_before = ((done * self.updates) // max(1, last - first) for done in (step - first, step - first - 1))
        return part != part_before

    def _allocate(self, model: nn.Module, inputs: Any) -> dict[str, Size]:
        on = {"latency": self.latency, "crossbars": self.crossbars, "prices": self.prices}
        return allocate(model, self.budget, inputs, importance=self.importance, **on)  # type: ignore[arg-type]

    def _steer(self, tail: SteeredTail, model: nn.Module, remaining: int, span: int) -> SteeredTail:
        """Move every goal on by one step and correct every strength.

        Args:
            tail: of the step before.
            model: factorized.
            remaining: steps from now to the end; not positive after it.
            span: steps from begin to end.
        """
        goals, lags, strengths, energies = {}, {}, {}, _energies(model)
        for name, share in tail_shares(model, tail.ranks).items():
            goal, strength = tail.goals[name], tail.strengths[name]
            goals[name] = goal * min(1.0, self.left / goal) ** (1 / max(1, remaining + 1))
            lags[name] = math.log(max(SMALLEST_SHARE, share) / goals[name])
            change = PULL / span * lags[name] + DAMPING * (lags[name] - tail.lags[name])
            change = min(max(change, -FASTEST / span), FASTEST / span)
            strengths[name] = min(max(strength * math.exp(change), WEAKEST * energies[name]), STRONGEST * energies[name])
        return SteeredTail({name: tail.ranks[name] for name in goals}, strengths, goals, lags)


def _aim(tail: SteeredTail | None, model: nn.Module, ranks: Mapping[str, Size]) -> SteeredTail:
    """Return the penalty for newly allocated ranks: a weight whose rank is as before goes on, any other starts from its present value.

    A weight that had no tail before starts at the usual strength for its energy, the geometric mean of the others.
    """
    old, energies = tail or SteeredTail({}, {}, {}, {}), _energies(model)
    known = [math.log(strength / energies[name]) for name, strength in old.strengths.items()]
    usual = math.exp(sum(known) / len(known)) if known else START
    goals, lags = {}, {}
    for name, share in tail_shares(model, ranks).items():
        goes_on = old.ranks.get(name) == ranks[name]
        goals[name] = old.goals[name] if goes_on else max(SMALLEST_SHARE, share)
        lags[name] = old.lags[name] if goes_on else 0.0
    strengths = {name: old.strengths.get(name, usual * energies[name]) for name in goals}
    return SteeredTail({name: ranks[name] for name in goals}, strengths, goals, lags)


def _energies(model: nn.Module) -> dict[str, float]:
    """Return the sum of squared singular values of each weight, as the factors hold them; a weight of zeros has the least there is."""
    return {name: max(SMALLEST_SHARE, float(whole_values(f)[0].double().square().sum())) for name, f in named_factors(model)}
