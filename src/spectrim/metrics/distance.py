"""Losses that need no labels: how far outputs are from those of the dense network, and probes of their curvature."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from spectrim.errors import SettingError
from spectrim.metrics.calls import call_model, evaluating, scores_of
from spectrim.metrics.inputs import inputs_of
from spectrim.metrics.tensors import send


def floats_of(output: Any) -> list[Tensor]:
    """Return the floating tensors in whatever a model returns; its scores alone where it names them."""
    return [leaf for leaf in tree_leaves(scores_of(output)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@dataclass(frozen=True)
class RelativeDistance:
    """``sum ||y - y_dense||^2 / sum ||y_dense - mean||^2``: the lost share of the output's variance, the mean over the output's tensors.

    Args:
        variances: of each tensor in the output of the dense network, over a calibration set.

    Examples:
        >>> RelativeDistance((4.0,))(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
        tensor(0.5000)
    """

    variances: tuple[float, ...]

    def __call__(self, output: Any, target: Any) -> Tensor:
        """Return the distance of an output from that of the dense network."""
        shapes = [[tuple(part.shape) for part in floats_of(given)] for given in (output, target)]
        if shapes[0] != shapes[1]:
            found = next((pair for pair in zip(*shapes, strict=False) if pair[0] != pair[1]), (len(shapes[0]), len(shapes[1])))
            hint = "give one that compares what keeps its shape, for example lambda output, target: mse_loss(output.hidden, target.hidden)"
            why = f"given, since the shapes of the outputs depend on their values ({found[0]}, the dense network's {found[1]})"
            raise SettingError("compress", "loss", got=None, rule=why, hint=hint)
        pairs = zip(floats_of(output), floats_of(target), self.variances, strict=True)
        return torch.stack([(out - wanted).square().mean() / variance for out, wanted, variance in pairs]).mean()

    def probe(self, output: Any) -> Tensor:
        """Return a random direction of the output, whose squared slope is, in the mean, the curvature of the distance at the dense network.

        The Gauss-Newton matrix is ``2 J^T J``, scaled; with ``z`` of independent signs, ``g = J^T z`` has it as its second moment.
        """
        outputs = floats_of(output)
        total = torch.zeros((), device=outputs[0].device)
        for out, variance in zip(outputs, self.variances, strict=True):
            signs = torch.randint(0, 2, out.shape, device=out.device).to(out) * 2 - 1
            each = out.numel() / max(1, len(out)) if out.dim() else 1.0  # numbers in the output of one example
            total = total + (out * signs).sum() * (2 / (each * variance * len(outputs))) ** 0.5
        return total


@dataclass(frozen=True)
class Divergence:
    """``KL(softmax(y_dense) || softmax(y))`` along the last axis, in nats: for outputs that are logits of classes, or of tokens."""

    def __call__(self, output: Any, target: Any) -> Tensor:
        """Return the mean over examples and positions."""
        out, wanted = floats_of(output)[0].log_softmax(-1), floats_of(target)[0].log_softmax(-1)
        return (wanted.exp() * (wanted - out)).sum(-1).mean()

    def probe(self, output: Any) -> Tensor:
        """Return the cross-entropy of classes drawn from the softmax, summed over examples: its slopes have the Fisher matrix."""
        logs = floats_of(output)[0].log_softmax(-1)
        drawn = torch.multinomial(logs.detach().exp().flatten(0, -2), 1).reshape(logs.shape[:-1])
        each = max(1, drawn[0].numel()) if drawn.dim() else 1
        return -logs.gather(-1, drawn.unsqueeze(-1)).sum() / each


Unlabeled = RelativeDistance | Divergence
"""Losses that compare with the dense network's outputs, and that probe their curvature."""


def with_outputs(dense: nn.Module, data: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Return batches ``(inputs, outputs of the dense network)``.

    Args:
        dense: the network.
        data: batches ``(inputs, target)``, whose targets are dropped, or bare inputs.
    """
    with evaluating(dense):
        made = []
        for batch in data:
            inputs = send(inputs_of(batch), dense)
            made.append((inputs, tree_map_only(Tensor, Tensor.detach, scores_of(call_model(dense, inputs)))))
    return made


def relative_distance(pairs: Iterable[tuple[Any, Any]]) -> RelativeDistance:
    """Return the distance whose unit is the variance of the outputs in batches ``(inputs, outputs)``."""
    columns = list(zip(*(floats_of(output) for _, output in pairs), strict=True))
    variances = []
    for parts in columns:
        count = sum(part.numel() for part in parts)
        mean = sum(float(part.sum(dtype=torch.float64)) for part in parts) / count
        variances.append(sum(float((part.double() - mean).square().sum()) for part in parts) / count or 1.0)
    return RelativeDistance(tuple(variances))
