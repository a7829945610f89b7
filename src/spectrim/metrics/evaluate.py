"""`evaluate`: loss and accuracy on a data set."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.metrics.inputs import _arguments, _send, evaluating, loss_of, pair_of, scores_of


def evaluate(model: nn.Module, data: Iterable[Any], loss: Callable[[Any, Any], Tensor]) -> dict[str, float]:
    """Compute loss and accuracy in eval mode, without gradients; training flags are as before afterwards.

    Args:
        model: any module; batches are moved to its device.
        data: batches ``(inputs, target)``; `inputs` is a tensor, a tuple or list of arguments, or a dict of keyword arguments.
        loss: called as ``loss(output, target)``, gives a scalar: the mean over the targets of a batch.

    Returns:
        ``loss``, the mean over all targets (each batch weighs ``target.numel()``), and ``accuracy``, a fraction, where the output (or its
        ``logits``, see `scores_of`) is ``(N, classes)`` and the target ``(N,)`` integers.

    Raises:
        SettingError: `data` yields nothing, or something that is not ``(inputs, target)``.

    Examples:
        >>> data = [(torch.eye(2), torch.tensor([0, 0]))]
        >>> evaluate(nn.Identity(), data, nn.CrossEntropyLoss())["accuracy"]
        0.5
    """
    total, count, correct, judged = 0.0, 0, 0, 0
    with evaluating(model):
        for batch in data:
            inputs, target = pair_of(batch, "evaluate")
            if not isinstance(target, Tensor):
                raise SettingError("evaluate", "data", got=type(target), rule="batches (inputs, target) with a tensor as target")
            (args, kwargs), target = _send((_arguments(inputs), target), model)
            output = model(*args, **kwargs)
            total += float(loss_of(loss, output, target, "evaluate")) * target.numel()
            count += target.numel()
            scores = scores_of(output)
            if _is_classification(scores, target):
                correct += int((scores.argmax(1) == target).sum())
                judged += len(target)
    if not count:
        hint = "a generator can be read only once: give a list or a DataLoader"
        raise SettingError("evaluate", "data", got=f"no targets from {type(data).__name__}", rule="at least one batch", hint=hint)
    return {"loss": total / count} | ({"accuracy": correct / judged} if judged else {})


def _is_classification(output: Any, target: Tensor) -> bool:
    whole = target.dim() == 1 and target.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    return whole and isinstance(output, Tensor) and output.dim() == 2 and len(output) == len(target)
