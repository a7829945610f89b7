"""`Sampling`: a course that takes samples of a trajectory, evenly spaced over the steps of a training."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from spectrim.errors import SettingError
from spectrim.protocols import Change
from spectrim.training.trajectory import Trajectory


@dataclass(frozen=True)
class Sampling:
    """Take samples of a `Trajectory`, evenly spaced over the steps of a training: more than one an epoch, or fewer.

    The first sample is taken before the first step of the span, so that there is one more than `samples`. Training is not changed. A run
    that resumes from a checkpoint needs a trajectory with a folder; samples behind the checkpoint are taken again.

    Args:
        trajectory: gets the samples; nothing else may add to it meanwhile.
        samples: how many after the first one, >= 1, at most the number of steps.
        begin: where sampling begins, as a fraction of training in [0, 1).
        end: where the last sample is taken, in (begin, 1].

    Raises:
        SettingError: for a value outside its range; when training starts, for more samples than steps; when it resumes, for a trajectory
            that has lost its samples.

    Examples:
        >>> import torch
        >>> from spectrim import fit
        >>> model, trajectory = nn.Linear(2, 1), Trajectory()
        >>> data = [(torch.randn(8, 2), torch.randn(8, 1))] * 6
        >>> _ = fit(model, data, nn.MSELoss(), courses=[Sampling(trajectory, 3)], progress=False)
        >>> len(trajectory)
        4
    """

    trajectory: Trajectory
    samples: int = 40
    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.trajectory, Trajectory):
            raise SettingError("Sampling", "trajectory", got=self.trajectory, rule="a Trajectory")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise SettingError("Sampling", "samples", got=self.samples, rule="an integer >= 1")
        if not 0 <= self.begin < self.end <= 1:
            raise SettingError("Sampling", "begin and end", got=(self.begin, self.end), rule="0 <= begin < end <= 1")

    def start(self, model: nn.Module, inputs: Any, steps: int) -> dict[str, Any]:
        """Return the memory before the first step, see `Course`."""
        first, last = self._span(steps)
        if last - first < self.samples:
            got = f"{self.samples} for {last - first} steps"
            raise SettingError("Sampling", "samples", got=got, rule="at most the number of steps from begin to end")
        self.trajectory.open(model)
        return {"before": len(self.trajectory), "taken": 0}

    def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any]) -> Change:
        """Take the first sample where it is due, see `Course`."""
        self._refuse_lost(model, memory)
        if step == self._span(steps)[0]:
            self._take(model, memory)
        return Change()

    def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any]) -> None:
        """Take a sample where one is due, see `Course`."""
        first, last = self._span(steps)
        if step + 1 in {first + round((last - first) * k / self.samples) for k in range(1, self.samples + 1)}:
            self._take(model, memory)

    def _span(self, steps: int) -> tuple[int, int]:
        """Return how many steps are finished at the first and at the last sample."""
        return round(steps * self.begin), round(steps * self.end)

    def _refuse_lost(self, model: nn.Module, memory: dict[str, Any]) -> None:
        """Raise a SettingError where a run has resumed without its samples."""
        expected = memory["before"] + memory["taken"]
        if len(self.trajectory) < expected and len(self.trajectory.open(model)) < expected:
            got, hint = f"{len(self.trajectory)} samples", "give it a folder: Trajectory(folder); or begin the run again"
            raise SettingError("Sampling", "trajectory", got=got, rule=f"the {expected} taken so far", hint=hint)

    def _take(self, model: nn.Module, memory: dict[str, Any]) -> None:
        """Take a sample behind those that the memory counts."""
        self.trajectory.open(model).keep(memory["before"] + memory["taken"])
        self.trajectory.record(model)
        memory["taken"] += 1
