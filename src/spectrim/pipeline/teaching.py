"""How `compress` distills."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.metrics.calls import call_model, evaluating, scores_of
from spectrim.metrics.evaluate import evaluate
from spectrim.training.distillation import Distillation, Loss, hint_layers, outputs_of

GAP, NATS_GAP = 2.0, 0.25
"""A large loss gap: the loss of a cut network on the calibration set over the dense network's, or of a classifier above it.

With one, the dense network is distilled; with a smaller one the labels alone are learned. Chosen by trials on ResNet-8, ResNet-20 and
LeNet-5: a rule of few networks.
"""


TEACHING: dict[str, Any] = {"temperature": 2.0, "weight": 0.5, "features": 2.0, "until": 0.5}
"""Distillation by default: logits throughout, intermediate features for the first half of training."""


MEMORIZED_LOSS = 0.05
"""Nats: below this loss on the calibration set a dense network has memorized it."""


MEMORIZED: dict[str, Any] = {"temperature": 4.0, "weight": 0.7}
"""Distillation from a dense network that has memorized the training examples: logits only, at a higher temperature.

A guess at why: its logits hold hardly more than the labels, until softened, and its intermediate features are its memory of the examples.
"""


def teacher_for(dense: nn.Module, examples: Sequence[Any], loss: Loss, level: float | None = None) -> Distillation | None:
    """Return distillation from the dense network where outputs are scores of classes and targets are their numbers, else None.

    None, too, where outputs in training mode are of another form than in eval mode, for example ``(logits, auxiliary logits)``.

    Its settings are `TEACHING`, or `MEMORIZED` where the loss on the examples is below `MEMORIZED_LOSS`.

    Args:
        dense: the teacher; it is not copied.
        examples: batches ``(inputs, target)`` of the training data.
        loss: ``(output, target) -> scalar``, in nats.
        level: the loss of the dense network on the examples, where it is known.
    """
    axis = axis_of_classes(dense, examples[0])
    if axis is None or _axis_of(scores_of(training_output(dense, examples[0][0])), examples[0][1]) != axis:
        return None
    level = evaluate(dense, examples, loss)["loss"] if level is None else level
    return Distillation(dense, dim=axis, **(MEMORIZED if level < MEMORIZED_LOSS else TEACHING))


def chosen_teacher(dense: nn.Module, low: nn.Module, known: Sequence[Any], loss: Loss, level: float) -> tuple[Distillation | None, str]:
    """Return the teacher that ``distill="auto"`` takes, with its layers, and a note where there is none.

    Args:
        dense: the teacher.
        low: factorized, what it will teach.
        known: batches ``(inputs, target)`` of the training data.
        loss: ``(output, target) -> scalar``, in nats.
        level: the loss of the dense network on them.
    """
    able = teacher_for(dense, known, loss, level=level)
    return (None, why_untaught(dense, known[0])) if able is None else (with_hint_layers(able, low, known[0]), "")


def axis_of_classes(network: nn.Module, batch: Any) -> int | None:
    """Return the axis without which the output has the shape of the targets, which are numbers of classes; None where they are not.

    Args:
        network: runs once.
        batch: ``(inputs, target)``.
    """
    inputs, target = batch
    with evaluating(network):
        output = scores_of(call_model(network, inputs))
    return _axis_of(output, target)


def _axis_of(output: Any, target: Any) -> int | None:
    if not (isinstance(output, Tensor) and isinstance(target, Tensor)) or target.is_floating_point() or not output.is_floating_point():
        return None
    axes = [axis for axis in (1, output.dim() - 1) if output.dim() > 1 and output.shape[:axis] + output.shape[axis + 1 :] == target.shape]
    return axes[0] if axes else None


def why_untaught(dense: nn.Module, batch: Any) -> str:
    """Say why `teacher_for` returns None.

    Args:
        dense: runs once.
        batch: ``(inputs, target)`` of the training data.
    """
    output, shown = scores_of(training_output(dense, batch[0])), "class scores with class indices as targets"
    form = f"{type(output).__name__} {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    return f"no teacher: distillation needs {shown} in eval and in training mode; in training mode the output is a {form}"


def training_output(network: nn.Module, inputs: Any) -> Any:
    """Return what a network computes in training mode; its flags, its buffers and torch's random generators are as before afterwards.

    Args:
        network: any module.
        inputs: of one batch.
    """
    with evaluating(network), torch.random.fork_rng(devices=[]):
        held = [(buffer, buffer.clone()) for buffer in network.buffers()]
        network.train()
        try:
            return call_model(network, inputs)
        finally:
            for buffer, value in held:
                buffer.copy_(value)


def with_hint_layers(teacher: Distillation, low: nn.Module, batch: Any) -> Distillation:
    """Return the teacher with the layers whose outputs can be observed in both networks, and have the same shape.

    Args:
        teacher: with layers or none.
        low: factorized, what it will teach.
        batch: ``(inputs, target)``.
    """
    if not teacher.features:
        return teacher
    names = hint_layers(low)
    with evaluating(low), evaluating(teacher.teacher), outputs_of(low, names) as own, outputs_of(teacher.teacher, names) as taught:
        for network in (low, teacher.teacher):
            call_model(network, batch[0])
    seen = tuple(name for name in names if name in own and name in taught and own[name].shape == taught[name].shape)
    return replace(teacher, layers=None if seen == names else seen, features=teacher.features if seen else 0.0)
