"""`evaluate`: loss and accuracy on a data set."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data.distributed import DistributedSampler

from spectrim.checks import READ_ONCE, check
from spectrim.errors import SettingError
from spectrim.metrics.batch import BatchDims, stated
from spectrim.metrics.calls import call_model, evaluating, loss_of, scores_of
from spectrim.metrics.inputs import pair_of
from spectrim.metrics.tensors import send, tensors_of


class Scores(dict[str, float]):
    """``loss`` and ``accuracy``, with how sure they are.

    Attributes:
        targets: number of class labels that the accuracy is a mean over; None without an accuracy.
        chance: accuracy of the most frequent label as a constant answer; None without an accuracy.
        loss_error: standard error of the loss, from its spread over batches; None for a single batch.
    """

    targets: int | None = None
    chance: float | None = None
    loss_error: float | None = None


def evaluate(model: nn.Module, data: Iterable[Any], loss: Callable[[Any, Any], Tensor], *, batch_dims: BatchDims | None = None) -> Scores:
    """Compute loss and accuracy in eval mode, without gradients; training flags are as before afterwards.

    Args:
        model: any module; batches are moved to its device.
        data: batches ``(inputs, target)``; `inputs` is a tensor, a tuple or list of arguments, or a dict of keyword arguments; `target` is
            what the loss takes: a tensor, or a tuple, list, dict or dataclass of tensors.
        loss: called as ``loss(output, target)``, gives a scalar: the mean over the targets of a batch.
        batch_dims: states the batch axes of the inputs (see `spectrim.metrics.batch.BatchDims`), so that each batch weighs as much as it
            has examples: for a loss that is a mean over examples where targets do not show their number.

    Returns:
        ``loss``, the mean over all targets (each batch weighs ``target.numel()``, or its examples where the target is no tensor), and
        ``accuracy``, a fraction, where the output (or its ``logits``, see `scores_of`) is ``(N, classes)`` and the target ``(N,)``
        integers. The dict has attributes that say how sure they are, see `Scores`.

    Raises:
        SettingError: `data` yields nothing, or something that is not ``(inputs, target)``.

    Examples:
        >>> data = [(torch.eye(2), torch.tensor([0, 0]))]
        >>> evaluate(nn.Identity(), data, nn.CrossEntropyLoss())["accuracy"]
        0.5
    """
    losses: list[tuple[float, int]] = []
    correct, labels = 0, Counter[int]()
    check("evaluate", model=model, data_once=data, loss=loss)
    with evaluating(model):
        for batch in data:
            inputs, target = pair_of(batch, "evaluate")
            inputs, target = send(inputs, model), send(target, model)
            output = call_model(model, inputs)
            targets = weight_of(target) if batch_dims is None else stated(inputs, batch_dims, "evaluate").size
            losses.append((float(loss_of(loss, output, target, "evaluate")), targets))
            scores = scores_of(output)
            if isinstance(target, Tensor) and _is_classification(scores, target):
                correct += int((scores.argmax(1) == target).sum())
                labels.update(target.tolist())
    count, judged = sum(weight for _, weight in losses), labels.total()
    if not count:
        raise SettingError("evaluate", "data", got=f"no targets from {type(data).__name__}", rule="at least one batch", hint=READ_ONCE)
    mean = sum(value * weight for value, weight in losses) / count
    found = Scores({"loss": mean} | ({"accuracy": correct / judged} if judged else {}))
    found.loss_error = _standard_error(losses, mean)
    if judged:
        found.targets, found.chance = judged, max(labels.values()) / judged
    return found


def _standard_error(losses: Sequence[tuple[float, int]], mean: float) -> float | None:
    """Return the standard error of a weighted mean over batches, which are taken for independent; None for fewer than two of them."""
    count = sum(weight for _, weight in losses)
    if len(losses) < 2:
        return None
    spread = sum((weight / count * (value - mean)) ** 2 for value, weight in losses)
    return math.sqrt(spread * len(losses) / (len(losses) - 1))


def weight_of(target: Any) -> int:
    """Return the weight of a batch: the numbers in its target, or of several tensors or objects the number of examples; at least 1."""
    if isinstance(target, Tensor):
        return target.numel()
    if isinstance(target, list) and target and not isinstance(target[0], Tensor):
        return len(target)
    sizes = [tensor.size(0) for tensor in tensors_of(target) if tensor.dim()]
    return max(1, Counter(sizes).most_common(1)[0][0]) if sizes else 1


def _is_classification(output: Any, target: Tensor) -> bool:
    whole = target.dim() == 1 and target.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    return whole and isinstance(output, Tensor) and output.dim() == 2 and len(output) == len(target)


def is_divided(data: Any) -> bool:
    """Whether each process has its own part of the data already."""
    return bool(getattr(data, "_is_accelerate_prepared", False)) or isinstance(getattr(data, "sampler", None), DistributedSampler)
