"""`Judge`: how far the outputs of a cut network are from those of the uncut one, and its scores."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spectrim.metrics.calls import call_model, evaluating
from spectrim.metrics.evaluate import evaluate
from spectrim.metrics.inputs import first_examples, inputs_of

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Judge:
    """The evaluation examples, and what the uncut network puts out for them.

    Attributes:
        batches: with targets, or bare inputs.
        inputs: of each batch.
        loss: called as ``loss(output, target)``; None for no scores.
        outputs: of the uncut network, for each batch.
        scores: of the uncut network: loss and accuracy where there is a loss.
    """

    batches: Sequence[Any]
    inputs: Sequence[Any]
    loss: Loss | None
    outputs: Sequence[Any]
    scores: Mapping[str, float]

    @classmethod
    def of(cls, model: nn.Module, inputs: Any, data: Iterable[Any] | None, loss: Loss | None, examples: int) -> "Judge":
        """Run the uncut network on the first `examples` of data, or on `inputs` where there are none."""
        batches = [] if data is None else first_examples(data, examples)
        given = [inputs_of(batch) for batch in batches] or [inputs]
        return cls(batches, given, loss, *_run(model, batches, given, loss))

    def judged(self, model: nn.Module) -> dict[str, float]:
        """Return the error of the output, and loss and accuracy where there is a loss; the model runs once on each batch."""
        wrong = whole = 0.0
        outputs, scores = _run(model, self.batches, self.inputs, self.loss)
        for output, before in zip(outputs, self.outputs, strict=True):
            for new, old in zip(_numbers(output), _numbers(before), strict=True):
                wrong += float((new - old).square().sum())
                whole += float(old.square().sum())
        error = math.sqrt(wrong / whole) if whole else math.inf * wrong if wrong else 0.0
        return {"output_error": error} | scores


def _run(model: nn.Module, batches: Sequence[Any], inputs: Sequence[Any], loss: Loss | None) -> tuple[list[Any], dict[str, float]]:
    """Return what a network puts out for each batch, and its scores where there is a loss."""
    if loss is None or not batches:
        with evaluating(model):
            return [call_model(model, x) for x in inputs], {}
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda _, args, output: outputs.append(output))
    try:
        return outputs, evaluate(model, batches, loss)
    finally:
        handle.remove()


def _numbers(output: Any) -> list[Tensor]:
    """Return the real tensors in whatever a model returns, in float64."""
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf.detach().double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
