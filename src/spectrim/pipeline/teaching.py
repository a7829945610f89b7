"""Which teacher `compress` takes."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from spectrim.metrics.evaluate import evaluate
from spectrim.metrics.inputs import call_model, evaluating, scores_of
from spectrim.training.distillation import Distillation, Loss, hint_layers, outputs_of

AHEAD, NATS_AHEAD = 2.0, 0.25
"""From which on a cut network has far to go: its loss on training examples over the dense network's, or of a classifier above it.

Then the dense network teaches; nearer to it labels alone do. Chosen by trials on ResNet-8, ResNet-20 and LeNet-5: a rule of few networks.
"""


TEACHING: dict[str, Any] = {"temperature": 2.0, "weight": 0.5, "features": 2.0, "until": 0.5}
"""How the dense network teaches by default: by what it says, and in the first half of the steps by what its layers put out."""


BY_HEART = 0.05
"""Nats: below this loss on training examples a dense network knows them by heart."""


RECITING: dict[str, Any] = {"temperature": 4.0, "weight": 0.7}
"""How a dense network teaches that knows the training examples by heart: by what it says alone, softened more.

A guess at why: what it says of them is hardly more than their labels, until softened, and what its layers put out is its memory of them.
"""


def teacher_for(dense: nn.Module, examples: Sequence[tuple[Any, Tensor]], loss: Loss) -> Distillation | None:
    """Return distillation from the dense network where outputs are scores of classes and targets are their numbers, else None.

    How it teaches is `TEACHING`, or `RECITING` where its loss on the examples is below `BY_HEART`.

    Args:
        dense: what teaches.
        examples: batches ``(inputs, target)`` of the training data.
        loss: ``(output, target) -> scalar``, in nats.
    """
    axis = axis_of_classes(dense, examples[0])
    if axis is None:
        return None
    way = RECITING if evaluate(dense, examples, loss)["loss"] < BY_HEART else TEACHING
    return Distillation(copy.deepcopy(dense), dim=axis, **way)


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


def showing(teacher: Distillation, low: nn.Module, batch: tuple[Any, Tensor]) -> Distillation:
    """Return the teacher with those layers to show whose outputs can be seen in both networks, and are alike in shape.

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
