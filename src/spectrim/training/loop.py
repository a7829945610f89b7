"""The loop inside an epoch: batches, groups of batches that make one optimizer step, and their log."""

import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from spectrim.errors import DivergedError, SettingError
from spectrim.layers.sharded import has_shards, is_sharded, reshard, whole
from spectrim.metrics.calls import call_model, loss_of
from spectrim.metrics.inputs import pair_of
from spectrim.training import processes
from spectrim.training.distillation import Loss
from spectrim.training.execution import choose_execution
from spectrim.training.history import History, largest_gradient, mean_rank
from spectrim.training.prepared import Prepared
from spectrim.training.progress import _Bar
from spectrim.training.step import Step


@dataclass
class Position:
    """Progress of a run.

    Attributes:
        epochs: of the whole training.
        accumulate: batches of one optimizer step.
        length: batches of one epoch; None before the first pass over data that do not say.
        batches: done, in all epochs.
        steps: optimizer steps done, in all epochs.
    """

    epochs: int
    accumulate: int
    length: int | None
    batches: int = 0
    steps: int = 0
    counted: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; 0 where that is not known."""
        return -(-self.length // self.accumulate) if self.length else 0

    @property
    def total(self) -> int:
        """Optimizer steps of the whole training; 0 where that is not known."""
        return self.epochs * self.steps_per_epoch

    @property
    def done(self) -> float:
        """Share of the batches of the whole training that are done."""
        return min(1.0, self.batches / (self.epochs * self.length)) if self.length else 0.0

    def finish(self, epoch: int, came: int) -> None:
        """Compare the number of batches of an epoch with the announced one; from now on it is the length.

        Args:
            epoch: that ended.
            came: batches that it had.
        """
        if self.length is not None and came != self.length:
            what = (
                f"{self.length} batches were announced (by a length, steps_per_epoch or the pass before), but {came} came in epoch {epoch}"
            )
            means = "means in the log are over those that came; courses and lessons went by the number announced"
            warnings.warn(f"fit: {what}; {means}", UserWarning, stacklevel=4)
        if came != self.length:
            self.length = self.counted = came

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"batches": self.batches, "steps": self.steps, "counted": self.counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.batches, self.steps, self.counted = state["batches"], state["steps"], state["counted"]
        self.length = self.counted or self.length


@dataclass
class Tally:
    """Sums over the batches of an epoch."""

    sums: dict[str, float]
    start: float = field(default_factory=time.perf_counter)
    batches: int = 0
    examples: int = 0
    rate: float = 0.0

    def add(self, names: list[str], terms: list[float], target: Any) -> None:
        """Add a batch."""
        for name, term in zip(names, terms, strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + term
        self.batches += 1
        self.examples += _count(target)

    @property
    def seconds(self) -> float:
        """Seconds since the epoch began."""
        return time.perf_counter() - self.start


@dataclass
class Loop:
    """Runs epochs, as prepared by `fit`."""

    model: nn.Module
    loss: Loss
    optimizer: Optimizer
    step: Step
    position: Position
    history: History
    accelerator: Any
    prepared: Prepared
    stepper: Any
    bar: _Bar
    clip: float | None
    scheduler: LRScheduler | None
    measured: bool
    checkpoint: Path | None
    timed: bool = False

    def epoch(self, data: Iterable[Any], epoch: int, limit: int | None) -> dict[str, float]:
        """Train on one pass over the data and return its line of the log.

        Args:
            data: batches of this process.
            epoch: number of finished epochs.
            limit: batches to take at most; None for all.
        """
        self.tally = Tally(dict.fromkeys(("loss", *self.step.terms, *self.step.lessons), 0.0))
        self.number = epoch
        self.bar.length = limit or self.position.length
        self.bar.start(epoch, self.position.epochs)
        for group in processes.rounds(islice(data, limit), self.position.accumulate):
            self._group(group)
        tally = self.tally
        if not tally.batches:
            raise SettingError("fit", "data", got=f"no batches in epoch {epoch}", rule="at least one batch at each pass")
        reshard(self.model)
        finite = all(bool(torch.isfinite(_local(p)).all()) for p in self.model.parameters())
        if not processes.everywhere(self.accelerator, finite):
            raise self._diverged("a parameter stopped being finite", self.position.batches - 1)
        self.position.finish(epoch, tally.batches)
        seconds, examples = tally.seconds, tally.examples
        if self.accelerator.num_processes > 1:
            examples = round(processes.reduced(self.accelerator, [float(examples)], "sum")[0])
            processes.same_tensors(self.accelerator, [*self.model.buffers(), *self.step.tensors()])
        line = {name: value / tally.batches for name, value in tally.sums.items()}
        line |= self.step.noted()
        line |= {"mean_rank": mean_rank(self.model), "learning_rate": tally.rate}
        return line | {"examples_per_s": examples / seconds, "seconds": seconds}

    def _group(self, group: list[Any]) -> None:
        """Make one optimizer step from the mean gradient of some batches."""
        at, total = self.position.steps, self.position.total
        self._before(group[0], at, total)
        for index, batch in enumerate(group):
            self._batch(batch, index, len(group))
        self.step.stop_gradients(self.model)
        if self.clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        self.tally.rate = float(self.optimizer.param_groups[0]["lr"])
        self.stepper.step()
        if self.scheduler is not None and not self.stepper.step_was_skipped:
            self._schedule(self.scheduler, total)
        self.step.after(self.model, at, total, self.optimizer)
        self.position.steps += 1

    def _schedule(self, scheduler: LRScheduler, total: int) -> None:
        """Step the schedule, which may have been made for fewer batches than come."""
        try:
            scheduler.step()
        except ValueError as error:
            got = f"more than the {total} optimizer steps that its length and the epochs promise" if total else str(error)
            hint = "give data whose len() is their number of batches, or steps_per_epoch"
            raise SettingError("fit", "data", got=got, rule="as many batches as the schedule was made for", hint=hint) from error

    def _before(self, batch: Any, at: int, total: int) -> None:
        """Cut and choose what is due before an optimizer step; not within a group, whose gradients are of one shape."""
        if not self.step.courses and (self.timed or not self.measured):
            return
        inputs, _ = self._sent(batch)
        cut = self.step.before(self.model, inputs, self.optimizer, at, total)
        if cut is not None:
            self.prepared.renew()
            self.history.cuts.append({"step": at, "epoch": at / self.position.steps_per_epoch, "ranks": cut})
        if self.measured and (cut is not None or not self.timed):
            with self.accelerator.autocast():
                choose_execution(self.model, inputs)
            self.timed = True

    def _batch(self, batch: Any, index: int, count: int) -> None:
        """Add the gradient of one batch of a group of `count`."""
        inputs, target = self._sent(batch)
        inputs, task_loss = self.step.mixed(inputs, self.loss)
        sharded, accelerator = has_shards(self.model), self.accelerator
        with processes.unsynchronised(accelerator, self.prepared.model, index + 1 == count):
            if sharded:  # before the forward pass makes the tensors whole
                reshard(self.model)
                added = [whole(term) for term in self.step.added(self.model)]
            task, shares = self._task(inputs, target, task_loss)
            if not sharded:
                added = self.step.added(self.model)
            penalty = sum(added, start=torch.zeros((), device=task.device))
            terms = self._finite(task + penalty, [task, *added, *shares])
            if index == 0:
                self.stepper.zero_grad(set_to_none=True)
            if sharded:  # the gradient of the penalties is of the shards: FSDP adds that of the task when it has reduced it
                if penalty.requires_grad:
                    accelerator.backward(penalty / count)
                accelerator.backward(task / count)
            else:
                accelerator.backward((task + penalty) / count)
        self.tally.add(["loss", *self.step.terms, *self.step.lessons], terms, target)
        self.position.batches += 1
        tally = self.tally
        self.bar.advance(tally.sums, tally.batches, tally.examples / tally.seconds, partial(mean_rank, self.model))

    def _task(self, inputs: Any, target: Any, loss: Loss) -> tuple[Tensor, list[Tensor]]:
        """Return the loss of a batch with all lessons in it, and what each changed."""
        from accelerate.utils import convert_to_fp32

        with self.accelerator.autocast():
            output = convert_to_fp32(call_model(self.prepared.call, inputs))
            task = loss_of(loss, output, target, "fit")
            return self.step.taught(task, inputs, output, target, self.position.done)

    def _finite(self, total: Tensor, terms: list[Tensor]) -> list[float]:
        """Return the terms of the loss, means over processes.

        Raises:
            DivergedError: when the whole is not finite; so in every process, none of which is left waiting.
        """
        value, *shares = processes.reduced(self.accelerator, [term.detach() for term in (total, *terms)])
        if not math.isfinite(value):
            raise self._diverged(f"loss became {value}", self.position.batches)
        return shares

    def _sent(self, batch: Any) -> tuple[Any, Any]:
        from accelerate.utils import send_to_device

        inputs, target = send_to_device(pair_of(batch, "fit"), self.accelerator.device)
        return inputs, target

    def _diverged(self, what: str, step: int) -> DivergedError:
        layer, norm = largest_gradient(self.model)
        broken = [name for name, p in self.model.named_parameters() if not bool(torch.isfinite(_local(p)).all())]
        if what.startswith("loss") and broken:
            what += f", and so is parameter '{broken[0]}' before the step,"
        last = self.checkpoint if self.checkpoint is not None and self.checkpoint.exists() else None
        half = any(p.dtype == torch.float16 and p.requires_grad for p in self.model.parameters())
        return DivergedError(what, epoch=self.number, step=step, layer=layer, grad_norm=norm, checkpoint=last, half=half)


def _local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    shard: Any = tensor
    return shard.to_local() if is_sharded(tensor) else tensor


def _count(target: Any) -> int:
    """Return the number of examples of a batch from its target."""
    first = target
    while isinstance(first, dict | list | tuple) and first:
        first = next(iter(first.values())) if isinstance(first, dict) else first[0]
    return len(first) if isinstance(first, Tensor) and first.dim() else 1
