"""Low-rank training in the ``Trainer`` of transformers: `LowRankTrainer` with a `SpectrimCallback`."""

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "spectrim.integrations.transformers needs transformers: pip install transformers, or install the extra 'hf'"
    ) from error

from spectrim.errors import FormatError, SettingError
from spectrim.integrations.steps import Steps, loading_ranks, second_names, sizes
from spectrim.protocols import Course, Lesson, Penalty, RankSchedule
from spectrim.training.statefile import read_state, write_state

STATE = "spectrim_state.pt"
"""What a checkpoint of a `LowRankTrainer` holds beside those of the ``Trainer``."""


class SpectrimCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Penalties, courses and lessons for a `LowRankTrainer`, given as one of its ``callbacks``.

    A callback alone gets neither the loss nor the batch, and trackers receive their numbers before it runs. So the trainer's own methods
    call this one: see `SpectrimMixin`. In any other trainer penalties, cuts and logging have no effect; a `UserWarning` says so after
    the first step.

    Args:
        penalties: each is called on the model and returns what it adds to the loss of an optimizer step.
        courses: change training step by step, for example `Ramp` and `Squeeze`, see `fit`. Not with several processes.
        lessons: change the loss, for example `Distillation`, see `fit`. They see the model's whole output, and the batch's ``labels`` as
            target. They need the number of steps where they change with it.

    Attributes:
        cuts: one entry for each cut that changed a rank: ``step``, the number of optimizer steps before it, and ``ranks`` after it.

    Raises:
        SettingError: for something that cannot be called.

    Examples:
        >>> from spectrim import Hoyer, Orthogonality, Ramp
        >>> callback = SpectrimCallback(penalties=[Orthogonality(1.0), Hoyer(0.05)], courses=[Ramp(0.9)])
    """

    def __init__(
        self,
        penalties: Sequence[Penalty] = (),
        courses: Sequence[Course | RankSchedule] = (),
        lessons: Sequence[Lesson] = (),
    ) -> None:
        self.steps = Steps("SpectrimCallback", penalties, courses, lessons)
        self.due = self.warned = self.running = False

    @property
    def cuts(self) -> list[dict[str, Any]]:
        """What was cut so far."""
        return self.steps.cuts

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Check that this model can be penalized and cut here."""
        if self.steps.courses and hasattr(model, "peft_config"):
            hint = "cut with prune before the adapters are added"
            rule = "empty for a model with adapters of peft: its checkpoints hold the adapters, not the ranks and factors of the layers"
            raise SettingError("SpectrimCallback", "courses", got=", ".join(self.steps.courses), rule=rule, hint=hint)
        if self.running and self.cuts and state.global_step == 0 and getattr(args, "auto_find_batch_size", False):
            hint = "set per_device_train_batch_size, and load the network again"
            rule = "empty where memory runs out after a cut: auto_find_batch_size begins again on the network as it was cut"
            raise SettingError("SpectrimCallback", "courses", got=", ".join(self.steps.courses), rule=rule, hint=hint)
        self.running = True
        self.steps.begin(model, args.world_size, state.global_step, args.device)
        self.due = self.warned = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note that a new optimizer step begins with the next batch."""
        self.due = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop watching layers."""
        self.running = False
        self.steps.close()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Let courses do what they do after a step; warn when the trainer never called."""
        self.steps.finish(model)
        if (self.steps.terms or self.steps.courses or self.steps.lessons) and not self.steps.called and not self.warned:
            self.warned = True
            asked = "compute_loss of SpectrimMixin was not called in the first optimizer step: penalties, cuts and logging have no effect"
            hint = "use LowRankTrainer, or class MyTrainer(SpectrimMixin, YourTrainer), the mixin first"
            warnings.warn(f"SpectrimCallback: {asked}; {hint}", UserWarning, stacklevel=2)


class SpectrimMixin:
    """Adds a `SpectrimCallback` to any ``Trainer``: ``class MyTrainer(SpectrimMixin, SFTTrainer)``, the mixin first.

    - ``compute_loss`` returns the loss of the underlying trainer, label smoothing and ``compute_loss_func`` included, plus the sum
      of the penalties. Each optimizer step gets the gradient of every penalty once, however many batches it accumulates and however the
      loss is averaged over them. Outside of training steps nothing is added: an evaluation's loss has no penalty in it.
    - ``training_step`` cuts before the first batch of an optimizer step.
    - ``log`` adds, to each line with a training ``loss``, what each penalty added to it on average, ``task_loss`` (the loss without them),
      ``params``, ``mean_rank`` and the largest ``orthogonality_defect``; so they reach every tracker.
    - Checkpoints hold the schedule's state. Resuming, and loading the best model at the end, give the model the ranks of the checkpoint
      first, whether larger or smaller.

    Raises:
        SettingError: for several callbacks of this kind, or a trainer whose ``training_step`` scales the loss in a way unknown here.
    """

    _in_step = False
    _expected: Tensor | None = None
    _scale_checked = False

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Cut what is due, then train on a batch."""
        callback = self._spectrim
        if callback is None:
            return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc,no-any-return]
        trainer: Any = self
        if callback.due:
            callback.due = False
            batch = dict(inputs) if isinstance(inputs, Mapping) else inputs
            callback.steps.advance(trainer.model, batch, _plain(trainer.optimizer), trainer.state.global_step, trainer.state.max_steps)
        with self._training():
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self._check_scale(loss)
        return loss

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Return the trainer's loss, in a training step with the penalties added to it."""
        callback, trainer = self._spectrim, self  # type: Any, Any
        learns = callback is not None and self._in_step and bool(callback.steps.lessons)
        batch = dict(inputs) if learns else {}  # the trainer takes the labels out where it smooths them
        found = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs or learns, num_items_in_batch=num_items_in_batch
        )
        if callback is None or not self._in_step:
            return found
        loss, outputs = found if return_outputs or learns else (found, None)
        batches = trainer.current_gradient_accumulation_steps
        penalty = callback.steps.penalty(trainer.model, 1 / batches, loss.device)
        divided = self._divides(num_items_in_batch)
        if learns:  # the loss as a mean over the batch, whichever way the trainer scales it
            scale = 1 if divided else batches
            done = min(1.0, trainer.state.global_step / max(1, trainer.state.max_steps))
            loss = callback.steps.lesson(loss * scale, batch, outputs, batch.get("labels"), done, 1 / batches) / scale
        loss = loss + (penalty if divided else penalty / batches)
        self._expected = loss.detach().mean() / (batches if divided else 1)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, in lines of training, the penalties and the ranks too."""
        callback = self._spectrim
        if callback is not None and "loss" in logs and callback.steps.called:
            added = callback.steps.means()
            logs = logs | {"task_loss": logs["loss"] - sum(added.values())} | added | sizes(self.model)  # type: ignore[attr-defined]
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; in a checkpoint, the state of the schedule beside it."""
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        callback = self._spectrim
        if callback is not None and _internal_call and output_dir and self.args.should_save:  # type: ignore[attr-defined]
            os.makedirs(output_dir, exist_ok=True)
            write_state(Path(output_dir) / STATE, callback.steps.state_dict())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save tied factors under one name: transformers knows ties of weights only, and would refuse."""
        model: nn.Module = self.model  # type: ignore[attr-defined]
        again = second_names(model)
        if again and state_dict is None:
            state_dict = {name: tensor for name, tensor in model.state_dict().items() if name not in again}
        super()._save(output_dir, state_dict)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """Give the model the ranks of the checkpoint, load it, and go on with the schedule from there."""
        with loading_ranks(self.model, _plain(self.optimizer)):  # type: ignore[attr-defined]
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        if self._spectrim is not None:
            _load_state(self._spectrim.steps, Path(resume_from_checkpoint) / STATE)

    def _load_best_model(self) -> None:
        """Give the model the ranks of the best checkpoint and load it."""
        with loading_ranks(self.model, _plain(self.optimizer)):  # type: ignore[attr-defined]
            super()._load_best_model()  # type: ignore[misc]

    @property
    def _spectrim(self) -> SpectrimCallback | None:
        """The one callback of this kind, or None."""
        found = [each for each in self.callback_handler.callbacks if isinstance(each, SpectrimCallback)]  # type: ignore[attr-defined]
        if len(found) > 1:
            raise SettingError(type(self).__name__, "callbacks", got=f"{len(found)} SpectrimCallbacks", rule="one with all penalties")
        return found[0] if found else None

    @contextmanager
    def _training(self) -> Iterator[None]:
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def _divides(self, num_items_in_batch: Any) -> bool:
        """Whether ``training_step`` divides what ``compute_loss`` returned by the number of batches of the optimizer step."""
        trainer: Any = self
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = (trainer.model_accepts_loss_kwargs and num_items_in_batch is not None) or trainer.compute_loss_func is not None
        return not scaled

    def _check_scale(self, loss: Tensor) -> None:
        """Raise a SettingError, at the first batch that shows it, where this trainer scales the loss otherwise than `_divides` says."""
        if self._scale_checked or self._expected is None:
            return
        expected, got = float(self._expected), float(loss)
        self._scale_checked = True
        if math.isfinite(expected) and not math.isclose(expected, got, rel_tol=1e-2, abs_tol=1e-6):  # a half-precision loss is rounded
            rule = f"{expected:.6g}, what compute_loss returned, averaged over the batches of the step"
            hint = "set loss_is_scaled_for_ga to what your training_step does"
            raise SettingError(type(self).__name__, "the loss after training_step", got=got, rule=rule, hint=hint)


class LowRankTrainer(SpectrimMixin, Trainer):  # type: ignore[misc,unused-ignore]
    """The ``Trainer`` of transformers with `SpectrimMixin`; all arguments are those of ``Trainer``.

    Examples:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> from spectrim import Orthogonality, factorize
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        >>> model = factorize(BertForSequenceClassification(config))
        >>> arguments = TrainingArguments("runs", report_to="none", save_strategy="no")  # doctest: +SKIP
        >>> callback = SpectrimCallback(penalties=[Orthogonality(1.0)])
        >>> trainer = LowRankTrainer(model, arguments, train_dataset=data, callbacks=[callback])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """


def _plain(optimizer: Any) -> Any:
    """Return the torch optimizer inside accelerate's."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _load_state(steps: Steps, path: Path) -> None:
    """Read the state of the schedule; a schedule without penalties needs none."""
    if not path.exists():
        if any(getattr(course, "penalizes", False) for course in steps.courses.values()):
            hint = "it was written without a SpectrimCallback: start again, or resume with its own trainer"
            raise FormatError(path, "is missing, and the courses cannot resume without it", hint=hint)
        return
    hint = "resume from an earlier checkpoint"
    state = read_state(path, hint)
    try:
        steps.load_state_dict(state)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(path, f"is not a readable state ({error})", hint=hint) from error
