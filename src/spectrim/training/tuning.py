"""`Tuning`: how a network is trained, one value for `fit`, `compress`, recipes and benchmarks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from spectrim.checks import check
from spectrim.checks.words import check_words
from spectrim.errors import SettingError
from spectrim.training.prepared import Precision
from spectrim.training.stopping import monitored

Execution = Literal["macs", "measured"]

Schedule = LRScheduler | ReduceLROnPlateau
"""A learning-rate schedule of torch."""

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeSchedule = Callable[[Optimizer, int], Schedule]

LEARNING_RATE = 1e-3
"""Of the default optimizer, Adam."""


WARMUP = 0.2
"""Share of the steps of `one_cycle` in which the learning rate rises; it falls along a cosine to zero in the rest."""


@dataclass(frozen=True)
class Tuning:
    """How a network is trained; for how many epochs is said beside it.

    Args:
        optimizer: makes an optimizer from parameters, ``partial(torch.optim.SGD, lr=0.1)``; Adam with rate 0.001 when omitted.
        scheduler: makes a torch learning-rate schedule, ``(optimizer, steps) -> schedule``, from the number of times that it will advance;
            for `fit` also a schedule of the optimizer that it gets. When omitted, the rate is constant in `fit`, and follows `one_cycle` in
            `compress`. `ReduceLROnPlateau` monitors the number that `keep_best` names, else ``eval_loss`` (``eval_accuracy`` for
            ``mode="max"``), without a validation split ``loss``.
        scheduler_steps: whether the schedule advances each ``epoch`` or each ``batch`` (that is, each optimizer step).
        accumulate: batches whose gradients are averaged for one optimizer step, >= 1; the last group of an epoch may be smaller.
        clip: largest norm of the whole gradient, > 0; None for no clipping.
        precision: ``no`` for float32, ``bf16`` or ``fp16`` for automatic mixed precision (with loss scaling for fp16).
        compiled: run the training steps, the teacher's too, through `torch.compile`: the first step compiles, for a minute or more, and
            numbers differ by rounding. Each size of batch, and each cut of a course, is compiled separately; what
            torch had compiled before is compiled again when it is called again. Not when sharded.
        execution: whether layers compose their weight or run two operations by ``macs``, or by ``measured`` seconds (`choose_execution`, at
            the start and after each cut; which form was faster may differ from run to run, and with it the rounding). Not when sharded.
        steps_per_epoch: batches that make an epoch, in each process, >= 1; for data without an end. None for all of the data.
        keep_best: end with the weights of the best epoch, by a number of its line in the log: True for ``eval_loss``, a name that ends on
            ``loss`` or ``accuracy``, else ``"min NAME"`` or ``"max NAME"``. Epochs before the last cut do not count. Not when sharded.

    Raises:
        SettingError: for a field outside its range.

    Examples:
        >>> Tuning(clip=1.0, precision="bf16").accumulate
        1
        >>> Tuning(clip=-1.0)
        Traceback (most recent call last):
        spectrim.errors.SettingError: Tuning: clip must be above 0, got -1.0
    """

    optimizer: MakeOptimizer | None = None
    scheduler: MakeSchedule | Schedule | None = None
    scheduler_steps: Literal["epoch", "batch"] = "epoch"
    accumulate: int = 1
    clip: float | None = None
    precision: Precision = "no"
    compiled: bool = False
    execution: Execution = "macs"
    steps_per_epoch: int | None = None
    keep_best: bool | str = False

    def __post_init__(self) -> None:
        check("Tuning", factory=self.optimizer, schedule=self.scheduler, accumulate=self.accumulate, clip=self.clip)
        check("Tuning", steps_per_epoch=self.steps_per_epoch)
        check_words(self)
        if self.keep_best:
            monitored(self.keep_best, "Tuning")

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that changes the result but the optimizer, as plain data for JSON."""
        changing = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in ("optimizer", "compiled")}
        schedule = self.scheduler
        return changing | {"scheduler": schedule and (getattr(schedule, "__qualname__", None) or type(schedule).__qualname__)}

    def optimizer_of(self, model: nn.Module) -> Optimizer:
        """Make the optimizer over all parameters that train.

        Args:
            model: what is trained.

        Raises:
            SettingError: when all are frozen.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            hint = "model.requires_grad_(True) lets it train"
            raise SettingError("fit", "model", got="one whose parameters are all frozen", rule="one to train", hint=hint)
        return torch.optim.Adam(parameters, LEARNING_RATE) if self.optimizer is None else self.optimizer(parameters)

    def schedule_of(self, optimizer: Optimizer, epochs: int, batches: int | None) -> Schedule | None:
        """Return the schedule of an optimizer: the one given, or made for a training of some epochs; None for a constant rate.

        Args:
            optimizer: whose rate it sets.
            epochs: of the whole training.
            batches: of one epoch, where no `steps_per_epoch` says it; None where that is not known.

        Raises:
            SettingError: when the schedule advances each batch, and their number is not known.
        """
        if self.scheduler is None or isinstance(self.scheduler, Schedule):
            return self.scheduler
        if self.scheduler_steps == "epoch":
            return self.scheduler(optimizer, max(1, epochs))
        batches = self.steps_per_epoch or batches
        if batches is None:
            hint = "give Tuning(steps_per_epoch=...), the number of batches"
            raise SettingError("fit", "data", got="data without one", rule="of a known length for a schedule by batches", hint=hint)
        return self.scheduler(optimizer, max(1, epochs * -(-batches // self.accumulate)))

    def with_schedule(self) -> "Tuning":
        """Return it with `one_cycle` where it names no schedule."""
        return self if self.scheduler is not None else replace(self, scheduler=one_cycle, scheduler_steps="batch")


def one_cycle(optimizer: Optimizer, steps: int) -> OneCycleLR:
    """Return a schedule whose rate rises to the optimizer's own for a fifth of the steps and falls along a cosine to zero.

    Args:
        optimizer: whose rates are the highest ones.
        steps: of the whole training, >= 1.

    Examples:
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
        >>> schedule = one_cycle(optimizer, 10)
        >>> schedule.get_last_lr()[0] < 0.5
        True
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    rise = WARMUP if WARMUP * steps != 1 else 2 * WARMUP  # torch divides by the steps of the rise less one
    return OneCycleLR(optimizer, rates, steps, pct_start=rise, cycle_momentum=False)
