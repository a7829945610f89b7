"""The training loop: one plain loop on accelerate, with progress, checkpoints and a log of what every penalty added."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from spectrim.errors import DivergedError, SettingError
from spectrim.layers.sharded import has_shards, is_sharded, reshard, whole
from spectrim.metrics.inputs import call_model, loss_of, pair_of
from spectrim.protocols import Penalty, PenaltySchedule, RankSchedule
from spectrim.surgery.frozen import training_mode
from spectrim.training import processes
from spectrim.training.checkpoint import Checkpoint, generators_of
from spectrim.training.course import ScheduledPenalty, cut_ranks
from spectrim.training.distillation import Distillation, Loss, missed, outputs_of, taught_layers
from spectrim.training.execution import choose_execution
from spectrim.training.history import History, largest_gradient, layer_lines, mean_rank
from spectrim.training.progress import _bar

Precision = Literal["no", "bf16", "fp16"]


Execution = Literal["macs", "measured"]


@runtime_checkable
class EpochCallback(Protocol):
    """Called at the end of each epoch, after the evaluation and before the checkpoint is written."""

    def __call__(self, epoch: int, metrics: dict[str, float], model: nn.Module, /) -> None:
        """Take the number of finished epochs, the epoch's line of the log, and the model."""


def fit(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss,
    optimizer: Optimizer,
    epochs: int,
    *,
    penalties: Sequence[Penalty] = (),
    eval_data: Iterable[Any] | None = None,
    scheduler: LRScheduler | None = None,
    scheduler_steps: Literal["epoch", "batch"] = "epoch",
    distill: Distillation | None = None,
    precision: Precision = "no",
    accumulate: int = 1,
    clip: float | None = None,
    rank_schedule: RankSchedule | None = None,
    execution: Execution = "macs",
    compiled: bool = False,
    checkpoint: str | Path | None = None,
    resume: bool = True,
    first_epoch: int = 0,
    callbacks: Sequence[EpochCallback] = (),
    accelerator: Any = None,
    progress: bool = True,
) -> History:
    """Train `model` in place: the one verb that changes weights.

    The loss of a step is ``loss(model(inputs), target) + sum of penalties``; each penalty's share is in the log.

    Started by ``accelerate launch`` or ``torchrun`` on several processes, all of them call it with the same arguments. It averages
    gradients with DistributedDataParallel, or runs a model that FSDP2 shards; the log holds means over processes, each penalty counts
    once, and the main process alone writes.

    Args:
        model: factorized or dense.
        data: gives batches ``(inputs, target)`` anew for each epoch: a `DataLoader` or any iterable with a length. `inputs` is a tensor,
            a tuple of arguments or a dict of keyword arguments. When it, or its sampler, has ``set_epoch``, that is called with the epoch's
            number. Several processes divide it: one step takes one batch in each of them, so that `n` processes with batches of `b` train
            on ``n * b`` examples. A `DataLoader` that accelerate prepared or that has a `DistributedSampler` is divided already.
        loss: ``(output, target) -> scalar``.
        optimizer: over the model's parameters.
        epochs: passes over the data in all, those before a resume included; >= 0.
        penalties: each is called on the model and returns what it adds.
        eval_data: the validation split, evaluated after each epoch, each batch by one process and once.
        scheduler: a torch learning-rate schedule of `optimizer`.
        scheduler_steps: whether the schedule advances each epoch or each batch (that is, each optimizer step).
        distill: adds a teacher's loss.
        precision: ``no`` for float32, ``bf16`` or ``fp16`` for automatic mixed precision (with loss scaling for fp16).
        accumulate: batches whose gradients are averaged for one optimizer step, >= 1; the last group of an epoch may be smaller.
        clip: largest norm of the whole gradient; None for no clipping.
        rank_schedule: cuts ranks as training goes, for example `Ramp`; the optimizer's moments are cut along, later steps cost less. It is
            asked before each optimizer step. One that is a `PenaltySchedule` too, for example `Squeeze`, adds its penalty to the loss; in
            the log it goes by the schedule's name. Not when sharded: cut `gathered` models between two calls.
        execution: whether layers compose their weight or run two operations by ``macs``, or by ``measured`` seconds (`choose_execution`, at
            the start and after each cut; which form was faster may differ from run to run, and with it the rounding). Not when sharded.
        compiled: run the training steps, the teacher's too, through `torch.compile`: the first step compiles, for a minute or more, and
            numbers differ by rounding. Each size of batch, and each cut of a `rank_schedule`, is compiled for itself; what
            torch had compiled before is compiled anew when it is called again. Not when sharded.
        checkpoint: folder for ``checkpoint.pt``, written atomically after each epoch; None for none. One run has it for itself. All its
            processes see it. It holds whole tensors, sharded or not: a run may go on with another number of processes.
        resume: go on from the checkpoint when there is one. A resumed run ends with the same bits on a CPU, as long as everything random
            draws from the global generators of torch, numpy and Python, or from the generator of the `DataLoader` or its sampler; each
            process has its own, and as many processes have to go on.
        first_epoch: what ``set_epoch`` gets for the first epoch, >= 0: the number of those before, for a further call on the same data.
        callbacks: called after each epoch, in every process.
        accelerator: your own `accelerate.Accelerator`, with its own precision; one is made when omitted.
        progress: whether to show a progress bar; the main process does.

    Returns:
        The history, the same in every process, earlier epochs of a resumed run included.

    Raises:
        DivergedError: when the loss, or at the end of an epoch a parameter, is not finite.
        FormatError: for a checkpoint that is damaged or of another model or optimizer; nothing is changed then.
        SettingError: for a setting outside its range.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> batches = [(torch.randn(8, 2), torch.randn(8, 1))] * 3
        >>> history = fit(model, batches, nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.1), epochs=2, progress=False)
        >>> len(history.epochs)
        2
    """
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import convert_to_fp32, send_to_device

    if epochs < 0:
        raise SettingError("fit", "epochs", got=epochs, rule=">= 0")
    if first_epoch < 0:
        raise SettingError("fit", "first_epoch", got=first_epoch, rule=">= 0")
    if accumulate < 1:
        raise SettingError("fit", "accumulate", got=accumulate, rule=">= 1")
    if clip is not None and not clip > 0:
        raise SettingError("fit", "clip", got=clip, rule="> 0, or None")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise SettingError("fit", "scheduler", got="ReduceLROnPlateau", rule="a schedule whose step() takes no metric")
    if execution not in ("macs", "measured"):
        raise SettingError("fit", "execution", got=execution, rule="'macs' or 'measured'")
    _length(data)
    if accelerator is not None and precision not in ("no", accelerator.mixed_precision):
        raise SettingError("fit", "precision", got=precision, rule=f"{accelerator.mixed_precision!r}, that of your accelerator")
    accelerator = accelerator or _accelerator(precision)
    if not {id(p) for p in model.parameters()} & {id(p) for group in optimizer.param_groups for p in group["params"]}:
        hint = "make the optimizer after factorize, prune or load, or call prune_optimizer_state after prune"
        raise SettingError("fit", "optimizer", got="one that holds none of them", rule="over the parameters of this very model", hint=hint)
    if isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    processes.shard(accelerator, model, optimizer)
    sharded = has_shards(model)
    if sharded and rank_schedule is not None:
        hint = "FSDP2 keeps the shapes it was given: cut gathered(model) with prune between two calls of fit, and shard the result"
        raise SettingError("fit", "rank_schedule", got=rank_schedule, rule="None for a model that FSDP2 shards", hint=hint)
    if sharded and execution == "measured":
        raise SettingError("fit", "execution", got=execution, rule="'macs' for a model that FSDP2 shards")
    if sharded and compiled:
        raise SettingError("fit", "compiled", got=True, rule="False for a model that FSDP2 shards")
    several, generators = accelerator.num_processes > 1, generators_of(data)
    own_data = processes.share(accelerator, data)
    length, generators = _length(own_data), generators or generators_of(data)
    history = History()
    names = [type(penalty).__name__ for penalty in penalties]
    scheduled = ScheduledPenalty(rank_schedule) if isinstance(rank_schedule, PenaltySchedule) else None
    if scheduled is not None:
        names, penalties = [*names, type(rank_schedule).__name__], [*penalties, scheduled]
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": accelerator.scaler, "penalty": scheduled}
    saver = Checkpoint(Path(checkpoint), generators, accelerator, **parts) if checkpoint is not None else None
    if saver is not None:
        saver.resizes = rank_schedule is not None
    if saver is not None and resume:
        history = saver.restore()
    names, timed, groups_per_epoch = unique_names(names), False, -(-length // accumulate)
    if distill is not None:
        distill.teacher.to(accelerator.device)

    def diverged(what: str, epoch: int, step: int) -> DivergedError:
        layer, norm = largest_gradient(model)
        last = saver.path if saver is not None and saver.path.exists() else None
        return DivergedError(what, epoch=epoch, step=step, layer=layer, grad_norm=norm, checkpoint=last)

    with (
        _lesson(distill, model, compiled) as lesson,
        _prepared(accelerator, model, optimizer, compiled) as (prepared, stepper),
        _bar(accelerator, progress, length) as bar,
        training_mode(model) as train,
    ):
        for epoch in range(len(history.epochs), epochs):
            parts_of_data = {id(part): part for part in (data, getattr(data, "sampler", None), own_data)}
            for set_epoch in (getattr(part, "set_epoch", None) for part in parts_of_data.values()):
                if set_epoch is not None:
                    set_epoch(first_epoch + epoch)
            train()
            start, examples, sums, groups, rate = time.perf_counter(), 0, dict.fromkeys(("loss", *names), 0.0), 0, 0.0
            bar.start(epoch, epochs)
            for index, batch in enumerate(own_data):
                inputs, target = send_to_device(pair_of(batch, "fit"), accelerator.device)
                step = epoch * length + index
                cut: dict[str, int] | None = None
                if rank_schedule is not None and index % accumulate == 0:  # not within a group: its gradients are of one shape
                    at = epoch * groups_per_epoch + index // accumulate, epochs * groups_per_epoch
                    cut = cut_ranks(model, processes.from_main(accelerator, rank_schedule(model, inputs, *at)), optimizer)
                    if cut is not None:
                        prepared.renew()
                        history.cuts.append({"step": at[0], "epoch": at[0] / groups_per_epoch, "ranks": cut})
                    if scheduled is not None:
                        scheduled.advance(model, inputs, *at)
                        scheduled.hold(processes.from_main(accelerator, scheduled.penalty))
                if execution == "measured" and (cut is not None or not timed):
                    with accelerator.autocast():
                        choose_execution(model, inputs)
                    timed = True
                last = (index + 1) % accumulate == 0 or index + 1 == length
                inputs, task_loss = (inputs, loss) if distill is None else distill.mixed(inputs, loss)
                with processes.unsynchronised(accelerator, prepared.model, last):
                    if sharded:  # before the forward pass makes the tensors whole
                        reshard(model)
                        added = [whole(penalty(model)) for penalty in penalties]
                    with accelerator.autocast():
                        output = convert_to_fp32(call_model(prepared.call, inputs))
                        task = loss_of(task_loss, output, target, "fit")
                        if lesson is not None:
                            task = lesson(task, inputs, output, target, step / (epochs * length))
                    if not sharded:
                        added = [penalty(model) for penalty in penalties]
                    penalty_sum = sum(added, start=torch.zeros((), device=task.device))
                    total = task + penalty_sum
                    terms = [term.detach() for term in (total, task, *added)]
                    value, *shares = processes.reduced(accelerator, terms)
                    if not math.isfinite(value):  # so in every process, none of which is left waiting
                        raise diverged(f"loss became {value}", epoch, step)
                    if index % accumulate == 0:
                        stepper.zero_grad(set_to_none=True)
                        groups = min(accumulate, length - index)
                    if sharded:  # the gradient of the penalties is of the shards: FSDP adds that of the task when it has reduced it
                        if penalty_sum.requires_grad:
                            accelerator.backward(penalty_sum / groups)
                        accelerator.backward(task / groups)
                    else:
                        accelerator.backward(total / groups)
                if last:
                    if clip is not None:
                        accelerator.clip_grad_norm_(model.parameters(), clip)
                    rate = float(optimizer.param_groups[0]["lr"])
                    stepper.step()
                    if scheduler is not None and scheduler_steps == "batch" and not stepper.step_was_skipped:
                        scheduler.step()
                for name, term in zip(sums, shares, strict=True):
                    sums[name] += term
                examples += _count(target)
                bar.advance(sums, index + 1, examples / (time.perf_counter() - start), partial(mean_rank, model))
            reshard(model)
            finite = all(bool(torch.isfinite(_local(p)).all()) for p in model.parameters())
            if not processes.everywhere(accelerator, finite):
                raise diverged("a parameter stopped being finite", epoch, (epoch + 1) * length - 1)
            seconds = time.perf_counter() - start
            if several:
                examples = round(processes.reduced(accelerator, [float(examples)], "sum")[0])
                processes.same_tensors(accelerator, model.buffers())
            line = {name: value / length for name, value in sums.items()}
            line |= {"mean_rank": mean_rank(model), "learning_rate": rate}
            line |= {"examples_per_s": examples / seconds, "seconds": seconds}
            if scheduler is not None and scheduler_steps == "epoch":
                scheduler.step()
            if eval_data is not None:
                with accelerator.autocast():
                    found = processes.evaluate_together(
                        accelerator, model, eval_data, lambda output, target: loss(convert_to_fp32(output), target)
                    )
                reshard(model)
                line |= {f"eval_{name}": value for name, value in found.items()}
            history.epochs.append(line)
            history.layers += layer_lines(model)
            for callback in callbacks:
                callback(epoch + 1, line, model)
            if saver is not None:
                saver.write(history)
            bar.finish(line)
    return history


@contextmanager
def _lesson(distill: Distillation | None, model: nn.Module, compiled: bool) -> Iterator[Callable[..., Tensor] | None]:
    """Give the loss with a teacher, who watches the layers of the model for the time of training where he teaches by them."""
    if distill is None:
        yield None
        return
    names = (taught_layers(model) if distill.layers is None else distill.layers) if distill.features else ()
    with outputs_of(model, names) as own, outputs_of(distill.teacher, names) as taught:
        share: Callable[..., Tensor] = missed
        if compiled:  # with the watching inside
            share = _compiled(missed)
            distill = replace(distill, teacher=cast(nn.Module, torch.compile(distill.teacher, dynamic=False)))

        def loss(task: Tensor, inputs: Any, output: Any, target: Any, done: float) -> Tensor:
            hints = partial(share, own, taught) if names and done < distill.until else None
            taught_loss = distill(task, inputs, output, hints, target)
            own.clear()  # nothing is held for longer than a step
            taught.clear()
            return taught_loss

        yield loss


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function of tensors that are results: torch's compiler looks at their gradients, and torch warns of that."""
    fast = torch.compile(function, dynamic=False)

    def call(*arguments: Any) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            return fast(*arguments)

    return call


def _length(data: Iterable[Any]) -> int:
    """Return the number of batches."""
    try:
        length = len(data)  # type: ignore[arg-type]
    except TypeError:
        hint = "a generator can be read only once: give a list or a DataLoader"
        raise SettingError("fit", "data", got=type(data), rule="an iterable with a length", hint=hint) from None
    if length == 0:
        raise SettingError("fit", "data", got="no batches", rule="at least one batch")
    return length


def _accelerator(precision: Precision) -> Any:
    """Make an accelerator; accelerate keeps one state for the process, which is renewed when the precision differs."""
    if precision not in ("no", "bf16", "fp16"):
        raise SettingError("fit", "precision", got=precision, rule="'no', 'bf16' or 'fp16'")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision)
    if precision != "no" and not accelerator.native_amp:  # accelerate would go on in float32 and not say so
        where = "a CPU" if accelerator.device.type == "cpu" else "this device"
        raise SettingError("fit", "precision", got=precision, rule=f"'no' or 'bf16' on {where}")
    return accelerator


class _Prepared:
    """What is called in training in place of the model: the model, or with several processes its wrapper."""

    def __init__(self, accelerator: Any, model: nn.Module, optimizer: Optimizer, compiled: bool) -> None:
        self.accelerator, self.plain, self.optimizer, self.compiled = accelerator, model, optimizer, compiled
        self.had_forward = "forward" in vars(model)
        self.model = processes.wrap(accelerator, model)
        self.call = self._callable()

    def _callable(self) -> Callable[..., Any]:
        if not self.compiled:
            return self.model
        torch.compiler.reset()  # it keeps eight programs for the same lines of code and runs what comes later as it is
        return torch.compile(self.model, dynamic=False)  # else the last batch of an epoch makes all later ones slower

    def renew(self) -> None:
        """Wrap the model again when its parameters were exchanged; all processes go on with what the main one has."""
        if self.model is not self.plain:
            self.close()
            self.model = processes.wrap(self.accelerator, self.plain)
            processes.same_moments(self.accelerator, self.optimizer)
        self.call = self._callable()

    def close(self) -> None:
        """Make the model what it was before."""
        processes.unwrap(self.accelerator, self.model, self.plain)
        if not self.had_forward:
            vars(self.plain).pop("forward", None)


@contextmanager
def _prepared(accelerator: Any, model: nn.Module, optimizer: Optimizer, compiled: bool) -> Iterator[tuple[_Prepared, Any]]:
    """Give the model and optimizer to accelerate for the time of training; afterwards the model is what it was before, or sharded."""
    if not has_shards(model):
        model.to(accelerator.device)
        for state in optimizer.state.values():
            state.update({key: value.to(accelerator.device) for key, value in state.items() if isinstance(value, Tensor) and value.dim()})
    prepared = _Prepared(accelerator, model, optimizer, compiled)
    stepper = accelerator.prepare_optimizer(optimizer)
    try:
        yield prepared, stepper
    finally:
        prepared.close()
        reshard(model)
        accelerator._optimizers = [held for held in accelerator._optimizers if held is not stepper]


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


def unique_names(names: list[str]) -> list[str]:
    """Number repeated names."""
    return [name if names.count(name) == 1 else f"{name} {names[: index + 1].count(name)}" for index, name in enumerate(names)]
