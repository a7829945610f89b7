"""Low-rank training in Lightning: a `SpectrimCallback`, and `penalty` for the ``training_step``."""

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

try:
    # Lightning has two package names: the imported one, else the newer one, else the other
    older = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
    if older or find_spec("lightning") is None:
        from pytorch_lightning import Callback
    else:
        from lightning.pytorch import Callback  # type: ignore[assignment,unused-ignore]
except ImportError as error:
    raise ImportError("spectrim.integrations.lightning needs Lightning: pip install lightning, or install the extra 'lightning'") from error

from spectrim.errors import SettingError
from spectrim.integrations.steps import Steps, loading_ranks, sizes
from spectrim.metrics.inputs import inputs_of
from spectrim.protocols import Course, Lesson, Penalty, RankSchedule
from spectrim.training.history import mean_rank

AVERAGING = {"StochasticWeightAveraging", "WeightAveraging"}
"""Callbacks of Lightning that hold another copy of the weights."""


class SpectrimCallback(Callback):  # type: ignore[misc,unused-ignore]
    """Penalties, courses and lessons for a Lightning ``Trainer``.

    No callback of Lightning can add to the loss that ``training_step`` returned, and a separate backward pass would miss loss scaling
    and break DDP. So ``training_step`` adds the penalties itself: ``return loss + penalty(self)``. When the first optimizer step ends
    and `penalty` was never called, a `UserWarning` says that penalties have no effect. Likewise lessons, such as `Distillation`, need
    ``training_step`` to call `taught`.

    It logs, after each optimizer step, what each penalty added and ``mean_rank``; at the end of each epoch ``params`` and the largest
    ``orthogonality_defect``. Checkpoints hold the courses' memories. While a ``Trainer`` runs, whatever it loads (a checkpoint to resume
    from, the best one to test) first gives the module the ranks of what is loaded.

    Args:
        penalties: each is called on the module and returns what it adds to the loss of an optimizer step.
        inputs: from a batch of the data, what the module's ``forward`` takes (a tensor, a tuple of arguments or a dict of keyword
            arguments), for the costs of a course; of a pair ``(inputs, target)`` the first when omitted.
        courses: change training step by step, for example `Ramp` and `Squeeze`, see `fit`. With automatic optimization, one process and a
            known number of steps.
        lessons: change the loss, for example `Distillation`, see `fit`.

    Attributes:
        cuts: one entry for each cut that changed a rank: ``step``, the number of optimizer steps before it, and ``ranks`` after it.

    Raises:
        SettingError: for something that cannot be called, and, when training starts, for courses where they cannot be followed.

    Examples:
        >>> from spectrim import Hoyer, Orthogonality, Ramp
        >>> callback = SpectrimCallback(penalties=[Orthogonality(1.0), Hoyer(0.05)], courses=[Ramp(0.9)])
    """

    def __init__(
        self,
        penalties: Sequence[Penalty] = (),
        inputs: Callable[[Any], Any] = inputs_of,
        courses: Sequence[Course | RankSchedule] = (),
        lessons: Sequence[Lesson] = (),
    ) -> None:
        super().__init__()
        self.steps = Steps("SpectrimCallback", penalties, courses, lessons)
        self.inputs = inputs
        self.total, self.step, self.batch = 0, 0, 0
        self.warned = False
        self.loading = ExitStack()

    @property
    def cuts(self) -> list[dict[str, Any]]:
        """What was cut so far."""
        return self.steps.cuts

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let whatever is loaded from now on bring its ranks along: Lightning loads weights before it tells callbacks."""
        self.loading.close()
        self.loading.enter_context(loading_ranks(pl_module))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        self.steps.close()
        self.loading.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was."""
        self.steps.close()
        self.loading.close()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that this module can be penalized and cut here."""
        self.steps.begin(pl_module, trainer.world_size, trainer.global_step, getattr(pl_module, "device", None))
        self.warned, self.total = False, 0
        known = not math.isinf(trainer.estimated_stepping_batches) and trainer.estimated_stepping_batches >= 0
        if known:
            self.total = int(trainer.estimated_stepping_batches)
        if not self.steps.courses:
            return
        got = ", ".join(self.steps.courses)
        if not pl_module.automatic_optimization:
            hint = "only your code knows when a step begins: call prune_(self, ranks, optimizer) yourself"
            raise SettingError("SpectrimCallback", "courses", got=got, rule="empty with manual optimization", hint=hint)
        kinds = {kind.__name__ for callback in trainer.callbacks for kind in type(callback).__mro__}
        if averaging := sorted(kinds & AVERAGING):
            hint = "their averages keep the ranks that they began with: cut in one run, average in the next"
            raise SettingError("SpectrimCallback", "courses", got=got, rule=f"empty beside {averaging[0]}", hint=hint)
        if not known:
            rule = "empty where the number of steps is not known"
            raise SettingError("SpectrimCallback", "courses", got=got, rule=rule, hint="give the Trainer max_steps")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Cut what is due, before the first batch of an optimizer step."""
        self.batch = batch_idx
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.step = trainer.global_step
            if self.steps.courses:
                self.steps.advance(pl_module, self.inputs(batch), trainer.optimizers[0], self.step, self.total)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log after an optimizer step; warn when the loss never included the penalties."""
        if trainer.global_step == self.step:
            return
        self.steps.finish(pl_module)
        if self.steps.lessons and not self.steps.heard and not self.warned:
            self.warned = True
            hint = "write 'loss = taught(self, loss, inputs, output, target)' there, with taught from spectrim.integrations.lightning"
            asked = "taught was not called by training_step in the first optimizer step: lessons have no effect"
            warnings.warn(f"SpectrimCallback: {asked}; {hint}", UserWarning, stacklevel=2)
        if self.steps.terms and not self.steps.called and not self.warned:
            self.warned = True
            hint = "write 'return loss + penalty(self)' there, with penalty from spectrim.integrations.lightning"
            asked = "penalty was not called by training_step in the first optimizer step: penalties have no effect"
            warnings.warn(f"SpectrimCallback: {asked}; {hint}", UserWarning, stacklevel=2)
        rank = mean_rank(pl_module)
        pl_module.log_dict(self.steps.means() | ({"mean_rank": rank} if rank else {}))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log sizes."""
        pl_module.log_dict({name: value for name, value in sizes(pl_module).items() if name != "mean_rank"})

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return self.steps.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.steps.load_state_dict(state_dict)

    def penalty(self, module: nn.Module, trainer: Any) -> Tensor:
        """Return what is added to the loss of the present batch; see the function `penalty`."""
        divisor, batches = trainer.accumulate_grad_batches, _batches_of_step(trainer, self.batch)
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        return self.steps.penalty(module, 1 / batches, device) * float(divisor / batches)

    def taught(self, trainer: Any, loss: Tensor, inputs: Any, output: Any, target: Any) -> Tensor:
        """Return the loss of the present batch with all lessons in it; see the function `taught`."""
        batches = _batches_of_step(trainer, self.batch)
        done = min(1.0, trainer.global_step / self.total) if self.total else 0.0
        return self.steps.lesson(loss, inputs, output, target, done, 1 / batches)


def penalty(module: Any) -> Tensor:
    """Return what the `SpectrimCallback` of a module's trainer adds to the loss of a batch, for ``training_step`` to add it.

    Each optimizer step gets the gradient of every penalty once, however many batches it accumulates: Lightning divides by
    ``accumulate_grad_batches`` even where the last step of an epoch has fewer, and this is compensated.

    Args:
        module: a ``LightningModule``.

    Returns:
        A scalar on the module's device; zero outside of training, and where the trainer has no such callback.

    Raises:
        SettingError: for several callbacks of this kind.
    """
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    found, trainer = _callback_of(module)
    return torch.zeros((), device=device) if found is None else found.penalty(module, trainer)


def taught(module: Any, loss: Tensor, inputs: Any, output: Any, target: Any) -> Tensor:
    """Return the loss of a batch with the lessons of the `SpectrimCallback` in it, for ``training_step``, together with `penalty`.

    Args:
        module: a ``LightningModule``.
        loss: of the task, a mean over the batch.
        inputs: of the batch, as the teacher takes them.
        output: of the module.
        target: of the batch.

    Returns:
        The loss; as it came outside of training, and where the trainer has no such callback.

    Raises:
        SettingError: for several callbacks of this kind.
    """
    found, trainer = _callback_of(module)
    return loss if found is None else found.taught(trainer, loss, inputs, output, target)


def _callback_of(module: Any) -> tuple[SpectrimCallback | None, Any]:
    """Return the one callback of this kind while its trainer trains, and the trainer."""
    trainer: Any = getattr(module, "_trainer", None)
    found = [each for each in trainer.callbacks if isinstance(each, SpectrimCallback)] if trainer is not None else []
    if len(found) > 1:
        raise SettingError("Trainer", "callbacks", got=f"{len(found)} SpectrimCallbacks", rule="one with all penalties")
    return (found[0] if found and trainer.training else None), trainer


def _batches_of_step(trainer: Any, batch: int) -> int:
    """Return how many batches make up the optimizer step that a batch belongs to; the last one of an epoch may have fewer."""
    full: int = trainer.accumulate_grad_batches
    return int(min(full, trainer.num_training_batches - (batch - batch % full)))
