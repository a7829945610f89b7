"""`recalibrate` renews the statistics of BatchNorm layers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spectrim.checks import check, outside_inference_mode
from spectrim.errors import SettingError
from spectrim.metrics.calls import call_model
from spectrim.metrics.inputs import inputs_of
from spectrim.metrics.tensors import send
from spectrim.surgery.frozen import is_frozen_norm, training_mode


@outside_inference_mode
def recalibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Renew the statistics of BatchNorm layers on `batches`, in place; nothing happens to a model without them.

    Statistics become the mean over batches. Frozen layers keep theirs: those with frozen parameters, and those that are in eval mode inside
    a model in training mode. So do layers that the model does not call. Training flags are as before afterwards.

    Args:
        model: any module.
        batches: ``(inputs, target)``; inputs are a tensor, a tuple of arguments or a dict of keyword arguments, or a bare tensor.

    Raises:
        SettingError: `batches` is empty; the statistics are unchanged, as after any other error.

    Examples:
        >>> model = nn.Sequential(nn.BatchNorm1d(1))
        >>> recalibrate(model, [(torch.tensor([[1.0], [3.0]]), None)])
        >>> model[0].running_mean
        tensor([2.])
    """
    check("recalibrate", model=model, batches=batches)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    norms = [norm for norm in norms if not is_frozen_norm(norm, model)]
    if not norms:
        return
    before = [(norm, norm.momentum, {name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)}) for norm in norms]
    done = False
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over batches, each with the same weight
        done = _run(model, batches)
    finally:
        for norm, momentum, buffers in before:
            norm.momentum = momentum
            if not done or not _was_called(norm):
                _restore(norm, buffers)
    if not done:
        hint = "a generator can be read only once: give a list or a DataLoader"
        raise SettingError("recalibrate", "batches", got="no batches", rule="at least one batch", hint=hint)


@torch.no_grad()
def _run(model: nn.Module, batches: Iterable[Any]) -> bool:
    """Run the model on all batches in training mode; return whether there were any."""
    found = False
    with training_mode(model):
        for batch in batches:
            call_model(model, send(inputs_of(batch), model))
            found = True
    return found


def _was_called(norm: _BatchNorm) -> bool:
    return norm.num_batches_tracked is not None and bool(norm.num_batches_tracked > 0)


@torch.no_grad()
def _restore(norm: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, value in buffers.items():
        norm.get_buffer(name).copy_(value)
