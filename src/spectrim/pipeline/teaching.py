"""Which teacher `compress` takes."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
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


def teacher_for(dense: nn.Module, examples: Sequence[tuple[Any, Any]], loss: Loss) -> Distillation | None:
    """Return distillation from the dense network where outputs are scores of classes and targets are their numbers, else None.

    None, too, where outputs in training mode are of another form than in eval mode, for example ``(logits, auxiliary logits)``.

    How it teaches is `TEACHING`, or `RECITING` where its loss on the examples is below `BY_HEART`.

    Args:
        dense: what teaches.
        examples: batches ``(inputs, target)`` of the training data.
        loss: ``(output, target) -> scalar``, in nats.
    """
    axis = axis_of_classes(dense, examples[0])
    if axis is None or _axis_of(scores_of(training_output(dense, examples[0][0])), examples[0][1]) != axis:
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
    return _axis_of(output, target)


def _axis_of(output: Any, target: Any) -> int | None:
    if not (isinstance(output, Tensor) and isinstance(target, Tensor)) or target.is_floating_point() or not output.is_floating_point():
        return None
    axes = [axis for axis in (1, output.dim() - 1) if output.dim() > 1 and output.shape[:axis] + output.shape[axis + 1 :] == target.shape]
    return axes[0] if axes else None


def why_untaught(dense: nn.Module, batch: tuple[Any, Any]) -> str:
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


def showing(teacher: Distillation, low: nn.Module, batch: tuple[Any, Any]) -> Distillation:
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
