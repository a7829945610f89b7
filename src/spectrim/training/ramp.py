"""`Ramp`: cuts along a ramp while a network trains."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from spectrim.budget.allocate import allocate
from spectrim.budget.budget import Budget
from spectrim.budget.rules import Energy
from spectrim.errors import SettingError
from spectrim.protocols import Change, Sizes


@dataclass(frozen=True)
class Ramp:
    """Cut in several steps, from full rank down to the target, on a cubic ramp: ``keep = target + (1 - target) (1 - k / cuts)^3``.

    Most is cut early, and the last cuts are small. Training becomes faster with each cut, and later cuts use spectra that training has
    adapted to the earlier ones.

    Args:
        target: what the network keeps in the end: a `Budget` of fractions of macs, params or size (`as_fractions` makes one of bytes), or a
            fraction in (0, 1] of each weight's spectral energy.
        begin: when the ramp begins, as a fraction of training in [0, 1).
        end: when the last cut is made, in (begin, 1]; before the last step at the latest. What is left of training is fine-tuning at the
            final ranks.
        cuts: number of cuts, >= 1.

    A `Course`: give it to ``fit(..., courses=[...])``.

    Raises:
        SettingError: for a value outside its range.

    Examples:
        >>> ramp = Ramp(Budget(macs=0.5), cuts=2)
        >>> [ramp.at(step, 100) for step in (0, 25, 50)]
        [None, Budget(macs=0.5625), Budget(macs=0.5)]

    Source: the cubic ramp: Zhu and Gupta, arXiv 1710.01878, equation 1 (there for the sparsity of pruned weights).
    """

    target: Budget | float
    begin: float = 0.0
    end: float = 0.5
    cuts: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.target, Budget) and not 0 < self.target <= 1:
            raise SettingError("Ramp", "target", got=self.target, rule="a Budget, or a fraction in (0, 1] of the energy")
        refused = [] if not isinstance(self.target, Budget) else set(self.target.limits) - {"macs", "params", "size"}
        if refused:
            hint = (
                "bytes: as_fractions(budget, model, inputs); seconds need a latency table, tiles crossbars: allocate once, after training"
            )
            raise SettingError("Ramp", "target", got=self.target, rule="a Budget of macs, params and size, which are fractions", hint=hint)
        if not 0 <= self.begin < self.end <= 1:
            raise SettingError("Ramp", "begin and end", got=(self.begin, self.end), rule="0 <= begin < end <= 1")
        if isinstance(self.cuts, bool) or self.cuts < 1:
            raise SettingError("Ramp", "cuts", got=self.cuts, rule=">= 1")

    def at(self, step: int, steps: int) -> Budget | float | None:
        """Return what is kept from this step on, or None when nothing is cut before it.

        Args:
            step: number of finished steps.
            steps: of the whole training.
        """
        due = self._due(steps)
        left = self._left(due, step)
        if step not in due:
            return None
        if not isinstance(self.target, Budget):
            return self.target + (1 - self.target) * left
        return replace(self.target, **{name: value + (1 - value) * left for name, value in self.target.limits.items()})

    def __call__(self, model: nn.Module, inputs: Any, step: int, steps: int) -> Sizes | None:
        """Return the ranks to cut to before this step, or None.

        Args:
            model: factorized.
            inputs: one batch of its inputs, for the costs.
            step: number of finished steps.
            steps: of the whole training.
        """
        kept = self.at(step, steps)
        if kept is None:
            return None
        if isinstance(kept, Budget):
            return allocate(model, kept, inputs)
        assert isinstance(self.target, float | int)
        before = self.target + (1 - self.target) * self._left(self._due(steps), step - 1)
        return Energy(min(1.0, kept / before))  # of what earlier cuts have left

    def start(self, model: nn.Module, inputs: Any, steps: int) -> dict[str, Any]:
        """Return an empty memory, see `Course`."""
        return {}

    def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any]) -> Change:
        """Return the ranks to cut to before this step, see `Course`."""
        return Change(self(model, inputs, step, steps))

    def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any]) -> None:
        """Do nothing, see `Course`."""

    def _due(self, steps: int) -> list[int]:
        """Return the step before which each cut is made."""
        shares = (self.begin + (self.end - self.begin) * cut / self.cuts for cut in range(1, self.cuts + 1))
        return [min(round(steps * share), steps - 1) for share in shares]

    def _left(self, due: list[int], step: int) -> float:
        """Return how much of the way down is left after the cuts up to `step`: 1 before the first one, 0 after the last."""
        return float((1 - sum(one <= step for one in due) / self.cuts) ** 3)
