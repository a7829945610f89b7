"""The training loop: one plain loop on accelerate, with progress, checkpoints and a log of each penalty's term."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from spectrim.checks import check, outside_inference_mode
from spectrim.checks.words import worded
from spectrim.errors import SettingError
from spectrim.files import make_folder
from spectrim.layers.sharded import has_shards, reshard
from spectrim.locks import locked
from spectrim.protocols import Course, Lesson, Penalty, RankSchedule
from spectrim.surgery.frozen import training_mode
from spectrim.training import processes
from spectrim.training.checkpoint import Checkpoint
from spectrim.training.data import announce, generators_of, length_of
from spectrim.training.distillation import Loss
from spectrim.training.history import History, layer_lines
from spectrim.training.loop import Loop, Position
from spectrim.training.order import Order
from spectrim.training.prepared import Precision, make_accelerator, prepared
from spectrim.training.progress import _bar
from spectrim.training.signals import ending_cleanly
from spectrim.training.step import Step
from spectrim.training.stopping import Best, check_plateau, plateau_value, wants_to_stop
from spectrim.training.tuning import Tuning

DEFAULT = Tuning()


@runtime_checkable
class EpochCallback(Protocol):
    """Called at the end of each epoch, after the evaluation and before the checkpoint is written."""

    def __call__(self, epoch: int, metrics: dict[str, float], model: nn.Module, /) -> bool | None:
        """Take the number of finished epochs, the epoch's line of the log, and the model; return True to end training here."""


@outside_inference_mode
@worded
def fit(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss,
    optimizer: Optimizer | None = None,
    epochs: int = 1,
    *,
    tuning: Tuning = DEFAULT,
    penalties: Sequence[Penalty] = (),
    eval_data: Iterable[Any] | None = None,
    courses: Sequence[Course | RankSchedule] = (),
    lessons: Sequence[Lesson] = (),
    checkpoint: str | Path | None = None,
    first_epoch: int = 0,
    callbacks: Sequence[EpochCallback] = (),
    accelerator: Any = None,
    progress: bool = True,
) -> History:
    """Train `model` in place: the one verb that changes weights.

    The loss of a step is ``loss(model(inputs), target)``, as lessons change it, plus the sum of penalties; each share is in the log.
    Modules in eval mode inside a model in training mode stay there, and so do normalization layers whose parameters are frozen;
    training flags are as before afterwards. SIGTERM ends training as Ctrl-C does, by an exception; the last checkpoint is whole.

    Started by ``accelerate launch`` or ``torchrun`` on several processes, all of them call it with the same arguments. It averages
    gradients with DistributedDataParallel, or runs a model that FSDP2 shards; the log holds means over processes, each penalty counts
    once, and the main process alone writes.

    Args:
        model: factorized or dense.
        data: gives batches ``(inputs, target)``, again for each epoch: a `DataLoader`, any iterable; without a length it is counted in the
            first epoch. `inputs` is a tensor, a tuple of arguments or a dict of keyword arguments. When it, or its sampler, has
            ``set_epoch``, that is called with the epoch's number. Several processes divide it: one step takes one batch in each of them, so
            that `n` processes with batches of `b` train on ``n * b`` examples. A `DataLoader` that accelerate prepared or that has a
            `DistributedSampler` is divided already. Where another number of batches comes than its length says, a warning names both.
        loss: ``(output, target) -> scalar``.
        optimizer: over the model's parameters; None for the one that `tuning` makes.
        epochs: passes over the data in all, those before a resume included; >= 0.
        tuning: schedule, clipping, precision and the rest of how to train, see `Tuning`.
        penalties: each is called on the model and returns what it adds.
        eval_data: the validation split, evaluated after each epoch, each batch by one process and once.
        courses: change training step by step: `Ramp`, `Squeeze`, any `Course`, or a function ``(model, inputs, step, steps)`` that returns
            ranks to cut to, or None. Each is asked before each optimizer step; the optimizer's moments are cut along, later steps cost
            less. The penalty of a course has a separate column in the log. They need the number of steps. Not when sharded: cut
            `gathered` models between two calls.
        lessons: change the loss of the task, in this order, for example `Distillation`; ``loss`` in the log holds them, and what each
            changed has a separate column.
        checkpoint: folder for ``checkpoint.pt``, written atomically after each epoch; None for none. A second run at a time is refused.
            All processes of a run need access. It holds whole tensors, sharded or not: a run may resume with another number of processes.
            A call continues from the checkpoint when there is one; delete it to begin again. A resumed run ends with the same bits on a
            CPU, as long as everything random draws from the global generators of torch, numpy and Python, or from a generator that the
            data, their sampler or their data set hold, or data have ``state_dict`` and ``load_state_dict``; each process has its own, so
            their number must not change. Counts of passes and orders that data hold as plain attributes are restored.
        first_epoch: what ``set_epoch`` gets for the first epoch, >= 0: the number of those before, for a further call on the same data.
        callbacks: called after each epoch, in every process. One that returns True ends training after that epoch; a later call with the
            same `epochs` and checkpoint returns that end.
        accelerator: your own `accelerate.Accelerator`, with its own precision; one is made when omitted.
        progress: whether to show a progress bar; the main process does.

    Returns:
        The history, the same in every process, earlier epochs of a resumed run included.

    Raises:
        DivergedError: when the loss, or at the end of an epoch a parameter, is not finite.
        FormatError: for a checkpoint that is damaged or of another model or optimizer; nothing is changed then.
        SettingError: for a setting outside its range, before anything is changed.
        WriteError: the checkpoint cannot be written, or another process trains with it.

    Examples:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> batches = [(torch.randn(8, 2), torch.randn(8, 1))] * 3
        >>> history = fit(model, batches, nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.1), epochs=2, progress=False)
        >>> len(history.epochs)
        2
    """
    check("fit", model=model, data=data, loss=loss, epochs=epochs, penalties=penalties, eval_data=eval_data)
    check("fit", optional=("optimizer",), optimizer=optimizer)
    check("fit", tuning=tuning, first_epoch=first_epoch)
    judged, limit = eval_data is not None, tuning.steps_per_epoch
    best = Best(tuning.keep_best, judged) if tuning.keep_best else None
    check_plateau(tuning.scheduler, tuning.scheduler_steps, judged, best)
    step = Step("fit", penalties, courses, lessons)
    _check_length(step, length_of(data), limit)
    accelerator = _accelerator(accelerator, tuning.precision)
    optimizer = _own(optimizer, model, tuning)
    processes.shard(accelerator, model, optimizer)
    if has_shards(model):
        _check_sharded(courses, tuning)
    generators, order = generators_of(data), Order(data, eval_data)
    own_data = processes.share(accelerator, data)
    generators, several = generators or generators_of(data), accelerator.num_processes > 1
    step.agree, step.device = partial(processes.from_main, accelerator) if several else None, accelerator.device
    position = Position(epochs, tuning.accumulate, limit or length_of(own_data))
    scheduler = tuning.schedule_of(optimizer, epochs, position.length) if epochs else None
    check_plateau(scheduler, tuning.scheduler_steps, judged, best)
    saver, history = None, History()
    if checkpoint is not None:
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": accelerator.scaler, "course": step}
        saver = Checkpoint(Path(checkpoint), generators, accelerator, **parts, position=position, best=best, data=order)
        saver.resizes = bool(courses)
        history = saver.restore()
        history.stopped = history.stopped if _is_over(history, epochs) else None
        if 0 < len(history.epochs) < epochs and history.stopped is None:
            order.warn()
    path = None if saver is None else saver.path
    with (
        ending_cleanly(),
        _alone(accelerator, path if len(history.epochs) < epochs and history.stopped is None else None),
        training_mode(model) as train,
        step.watching(model, accelerator.device, tuning.compiled),
        prepared(accelerator, model, optimizer, tuning.compiled) as (ready, stepper),
        _bar(accelerator, progress, position.length) as bar,
    ):
        each_step = scheduler if tuning.scheduler_steps == "batch" else None
        parts_of_loop = (model, loss, optimizer, step, position, history, accelerator, ready, stepper, bar)
        loop = Loop(*parts_of_loop, tuning.clip, each_step, tuning.execution == "measured", path)
        while len(history.epochs) < epochs and history.stopped is None:
            epoch, cuts = len(history.epochs), len(history.cuts)
            announce(first_epoch + epoch, data, own_data)
            train()
            line = loop.epoch(own_data, epoch, limit)
            if eval_data is not None:
                line |= _evaluated(accelerator, model, eval_data, loss)
            history.epochs.append(line)
            history.layers += layer_lines(model)
            ends = [wants_to_stop(callback(epoch + 1, line, model)) for callback in callbacks]
            if not processes.everywhere(accelerator, not any(ends)):
                history.stopped = {"epoch": epoch + 1, "epochs": epochs}
            if best is not None:
                best.note(epoch + 1, line, model, len(history.cuts) > cuts)
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(plateau_value(scheduler, line, best))
            elif scheduler is not None and tuning.scheduler_steps == "epoch":
                scheduler.step()
            if saver is not None:
                saver.write(history)
            bar.finish(line)
    if best is not None:
        best.restore(model)
        history.best = best.found
    return history


def _is_over(history: History, epochs: int) -> bool:
    """Whether a callback had ended a run of as many epochs."""
    return history.stopped is not None and bool(history.stopped["epochs"] >= epochs)


@contextmanager
def _alone(accelerator: Any, path: Path | None) -> Iterator[None]:
    """Hold the folder of a checkpoint, so that a second run with it is refused; processes of one run share it.

    Raises:
        WriteError: another process trains there, or the folder cannot be made.
    """
    if path is None or accelerator.num_processes > 1:
        yield
        return
    make_folder(path.parent)
    with locked(path.parent):
        yield


def _evaluated(accelerator: Any, model: nn.Module, data: Iterable[Any], loss: Loss) -> dict[str, float]:
    """Return the entries of the validation split."""
    from accelerate.utils import convert_to_fp32

    with accelerator.autocast():
        found = processes.evaluate_together(accelerator, model, data, lambda output, target: loss(convert_to_fp32(output), target))
    reshard(model)
    return {f"eval_{name}": value for name, value in found.items()}


def _accelerator(own: Any, precision: Precision) -> Any:
    """Return the user's accelerator, or one of this precision.

    Raises:
        SettingError: for an accelerator of another precision.
    """
    if own is not None and precision not in ("no", own.mixed_precision):
        raise SettingError("fit", "precision", got=precision, rule=f"{own.mixed_precision!r}, that of your accelerator")
    return own or make_accelerator(precision)


def _check_length(step: Step, length: int | None, steps_per_epoch: int | None) -> None:
    """Raise a SettingError where a course or lesson needs the number of steps, and it is unknown."""
    if length is None and steps_per_epoch is None:
        until = [name for name, lesson in step.lessons.items() if 0 < getattr(lesson, "until", 1.0) < 1]
        for name in (*step.courses, *until):
            hint = "give Tuning(steps_per_epoch=...), the number of batches"
            raise SettingError("fit", "data", got="data without one", rule=f"of a known length for {name}, which counts steps", hint=hint)


def _check_sharded(courses: Sequence[Any], tuning: Tuning) -> None:
    """Raise a SettingError for what a model that FSDP2 shards cannot have."""
    if courses:
        hint = "FSDP2 keeps the shapes it was given: cut gathered(model) with prune between two calls of fit, and shard the result"
        raise SettingError("fit", "courses", got=courses, rule="empty for a model that FSDP2 shards", hint=hint)
    if tuning.execution == "measured":
        raise SettingError("fit", "execution", got="measured", rule="'macs' for a model that FSDP2 shards")
    for name in ("compiled", "keep_best"):
        if value := getattr(tuning, name):
            raise SettingError("fit", name, got=value, rule="False for a model that FSDP2 shards")


def _own(optimizer: Any, model: nn.Module, tuning: Tuning) -> Optimizer:
    """Return the torch optimizer inside accelerate's, or the optimizer itself, or the one that `tuning` makes.

    Raises:
        SettingError: for one that trains nothing of the model, or whose step needs a closure, or a second one.
    """
    from accelerate.optimizer import AcceleratedOptimizer

    if optimizer is not None and tuning.optimizer is not None:
        raise SettingError("fit", "optimizer", got=optimizer, rule="None where tuning names one", hint="give it once")
    optimizer = tuning.optimizer_of(model) if optimizer is None else optimizer
    if not {id(p) for p in model.parameters()} & {id(p) for group in optimizer.param_groups for p in group["params"]}:
        hint = "make the optimizer after factorize, prune or load, or call prune_optimizer_state after prune"
        raise SettingError("fit", "optimizer", got="one that holds none of them", rule="over the parameters of this model", hint=hint)
    own: Optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if isinstance(own, LBFGS) or getattr(own, "needs_closure", False):
        hint = "write its loop by hand: prune_ and the penalties work in it"
        raise SettingError("fit", "optimizer", got=type(own).__name__, rule="one whose step needs no closure", hint=hint)
    return own
