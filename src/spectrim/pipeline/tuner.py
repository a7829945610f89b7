"""The training of `compress`: several goes of one schedule."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from spectrim.budget.allocate import allocate
from spectrim.budget.cut_to import has_norms, renew_statistics
from spectrim.metrics.tensors import tensors_of
from spectrim.penalties import Orthogonality
from spectrim.pipeline.cutter import Cutter
from spectrim.pipeline.recovery import Recovery
from spectrim.pipeline.store import Store, Told
from spectrim.protocols import Penalty, RankSchedule
from spectrim.surgery.prune import prune_
from spectrim.surgery.recalibrate import recalibrate
from spectrim.surgery.side_by_side import room
from spectrim.training.data import count_batches
from spectrim.training.distillation import Distillation, Loss
from spectrim.training.fit import fit
from spectrim.training.history import History
from spectrim.training.squeeze import Squeeze
from spectrim.training.tuning import Tuning


@dataclass
class Tuner:
    """Trains a network in one or several parts of a single schedule."""

    data: Iterable[Any]
    loss: Loss
    epochs: int
    tuning: Tuning
    teacher: Distillation | None
    eval_data: Iterable[Any] | None
    store: Store
    progress: bool
    optimizer: Optimizer = field(init=False)
    done: int = field(init=False, default=0)

    def start(self, network: nn.Module) -> None:
        """Make the optimizer and its schedule over all epochs."""
        if not self.epochs:
            return
        self.optimizer = self.tuning.optimizer_of(network)
        schedule = self.tuning.with_schedule()
        made = schedule.schedule_of(self.optimizer, self.epochs, schedule.steps_per_epoch or count_batches(self.data, "compress"))
        self.tuning = replace(schedule, optimizer=None, scheduler=made)

    def recovery(self, steps: int, penalties: Sequence[Penalty], chosen: bool) -> Recovery | None:
        """Return a recovery of some steps before training starts, its batches read, up to half of the free memory; None for no steps."""
        if not steps:
            return None
        batches, left = list[Any](), room(torch.device("cpu"))
        for batch in islice(self.data, steps * self.tuning.accumulate):
            batches.append(batch)
            left -= sum(tensor.nbytes for tensor in tensors_of(batch))
            if left <= 0:
                break
        return Recovery(steps, self.loss, self.tuning, penalties, self.teacher, batches, chosen)

    def run(self, network: nn.Module, epochs: int, penalties: Sequence[Penalty], name: str, toward: Sequence[RankSchedule] = ()) -> History:
        """Train for some epochs, which follow those of earlier parts."""
        history = fit(
            network, self.data, self.loss, self.optimizer, epochs,
            tuning=replace(self.tuning, keep_best=False) if toward else self.tuning,  # a course has the last word before the cut
            penalties=penalties, eval_data=self.eval_data, courses=toward, lessons=[] if self.teacher is None else [self.teacher],
            checkpoint=self.store.path(name), first_epoch=self.done, progress=self.progress,
        )  # fmt: skip
        self.done += epochs
        return history


def squeezed(
    low: nn.Module, tuner: Tuner, cutter: Cutter, epochs: int, penalties: Sequence[Penalty], scores: dict[str, Any], told: Told
) -> History:
    """Train toward the budget, cut, and renew BatchNorm statistics where that is better; all in place."""
    tuner.start(low)
    judge, prices = cutter.judge, cutter.prices
    toward = Squeeze(cutter.budget, end=1.0, importance=cutter.importance, latency=prices.latency, cut=False, prices=prices)
    history = tuner.run(low, epochs, [Orthogonality(), *penalties], "squeeze", [toward])
    recalibrate(low, judge.known)  # at a high learning rate the running statistics lag
    scores["squeezed"] = judge(low)
    prune_(low, allocate(low, cutter.budget, cutter.inputs, importance=cutter.importance, prices=prices), tuner.optimizer)
    scores["cut"] = judge(low)
    if has_norms(low):
        found, kept = renew_statistics(low, judge.known, judge, scores["cut"])
        (scores if kept else told.dropped)["recalibrated"] = dict(found)
    return history
