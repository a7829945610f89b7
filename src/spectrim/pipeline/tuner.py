"""The training of `compress`: several goes of one schedule."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from spectrim.budget.allocate import allocate
from spectrim.budget.cut_to import has_norms, renew_statistics
from spectrim.errors import SettingError
from spectrim.penalties import Orthogonality
from spectrim.pipeline.cutter import Cutter
from spectrim.pipeline.store import Store, Told
from spectrim.protocols import Penalty, RankSchedule
from spectrim.surgery.prune import prune_
from spectrim.surgery.recalibrate import recalibrate
from spectrim.training.data import count_batches
from spectrim.training.distillation import Distillation, Loss
from spectrim.training.fit import Precision, fit
from spectrim.training.history import History
from spectrim.training.squeeze import Squeeze

LEARNING_RATE = 1e-3
"""Of the default optimizer, Adam."""


WARMUP = 0.2
"""Share of the steps in which the learning rate rises; it falls along a cosine to zero in the rest."""


@dataclass
class Tuner:
    """Trains a network in one or several parts of a single schedule."""

    data: Iterable[Any]
    loss: Loss
    epochs: int
    make: Callable[[Iterable[nn.Parameter]], Optimizer] | None
    teacher: Distillation | None
    eval_data: Iterable[Any] | None
    clip: float | None
    precision: Precision
    compiled: bool
    store: Store
    progress: bool
    optimizer: Optimizer = field(init=False)
    scheduler: OneCycleLR = field(init=False)
    done: int = field(init=False, default=0)

    def start(self, network: nn.Module) -> None:
        """Make the optimizer and its schedule over all epochs."""
        if not self.epochs:
            return
        parameters = [p for p in network.parameters() if p.requires_grad]
        if not parameters:
            hint = "epochs=0 compresses it without training; model.requires_grad_(True) lets it train"
            raise SettingError("compress", "model", got="one whose parameters are all frozen", rule="one to train, with epochs", hint=hint)
        self.optimizer = torch.optim.Adam(parameters, LEARNING_RATE) if self.make is None else self.make(parameters)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        steps = max(1, self.epochs * count_batches(self.data, "compress"))
        rise = WARMUP if WARMUP * steps != 1 else 2 * WARMUP  # torch divides by the steps of the rise less one
        self.scheduler = OneCycleLR(self.optimizer, rates, steps, pct_start=rise, cycle_momentum=False)

    def run(self, network: nn.Module, epochs: int, penalties: Sequence[Penalty], name: str, ranks: RankSchedule | None = None) -> History:
        """Train for some epochs, which follow those of earlier parts."""
        history = fit(
            network, self.data, self.loss, self.optimizer, epochs, penalties=penalties, eval_data=self.eval_data,
            scheduler=self.scheduler, scheduler_steps="batch", distill=self.teacher, clip=self.clip, precision=self.precision,
            rank_schedule=ranks, compiled=self.compiled, checkpoint=self.store.path(name), first_epoch=self.done, progress=self.progress,
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
    history = tuner.run(low, epochs, [Orthogonality(), *penalties], "squeeze", toward)
    recalibrate(low, judge.known)  # at a high learning rate the running statistics lag
    scores["squeezed"] = judge(low)
    prune_(low, allocate(low, cutter.budget, cutter.inputs, importance=cutter.importance, prices=prices), tuner.optimizer)
    scores["cut"] = judge(low)
    if has_norms(low):
        found, kept = renew_statistics(low, judge.known, judge, scores["cut"])
        (scores if kept else told.dropped)["recalibrated"] = dict(found)
    return history
