"""How `compress` distills."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from spectrim.metrics.evaluate import evaluate
from spectrim.metrics.inputs import call_model, evaluating, scores_of
from spectrim.training.distillation import Distillation, Loss, outputs_of, taught_layers

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


def teacher_for(dense: nn.Module, examples: Sequence[tuple[Any, Tensor]], loss: Loss, level: float | None = None) -> Distillation | None:
    """Return distillation from the dense network where outputs are scores of classes and targets are their numbers, else None.

    Its settings are `TEACHING`, or `MEMORIZED` where the loss on the examples is below `MEMORIZED_LOSS`.

    Args:
        dense: the teacher; it is not copied.
        examples: batches ``(inputs, target)`` of the training data.
        loss: ``(output, target) -> scalar``, in nats.
        level: the loss of the dense network on the examples, where it is known.
    """
    axis = axis_of_classes(dense, examples[0])
    if axis is None:
        return None
    level = evaluate(dense, examples, loss)["loss"] if level is None else level
    return Distillation(dense, dim=axis, **(MEMORIZED if level < MEMORIZED_LOSS else TEACHING))


def axis_of_classes(network: nn.Module, batch: tuple[Any, Any]) -> int | None:
    """Return the axis without which the output has the shape of the targets, which are numbers of classes; None where they are not.

    Args:
        network: runs once.
        batch: ``(inputs, target)``.
    """
    inputs, target = batch
    with evaluating(network):
        output = scores_of(call_model(network, inputs))
    if not (isinstance(output, Tensor) and isinstance(target, Tensor)) or target.is_floating_point() or not output.is_floating_point():
        return None
    axes = [axis for axis in (1, output.dim() - 1) if output.dim() > 1 and output.shape[:axis] + output.shape[axis + 1 :] == target.shape]
    return axes[0] if axes else None


def with_hint_layers(teacher: Distillation, low: nn.Module, batch: tuple[Any, Tensor]) -> Distillation:
    """Return the teacher with the layers whose outputs can be observed in both networks, and have the same shape.

    Args:
        teacher: with layers or none.
        low: factorized, what it will teach.
        batch: ``(inputs, target)``.
    """
    if not teacher.features:
        return teacher
    names = taught_layers(low)
    with evaluating(low), evaluating(teacher.teacher), outputs_of(low, names) as own, outputs_of(teacher.teacher, names) as taught:
        for network in (low, teacher.teacher):
            call_model(network, batch[0])
    seen = tuple(name for name in names if name in own and name in taught and own[name].shape == taught[name].shape)
    return replace(teacher, layers=None if seen == names else seen, features=teacher.features if seen else 0.0)
