"""`recalibrate` renews the statistics of BatchNorm layers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from spectrim.checks import check
from spectrim.metrics.inputs import call_model


def recalibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Renew the statistics of BatchNorm layers on `batches`, in place; nothing happens to a model without them.

    Args:
        model: any module.
        batches: ``(inputs, target)``; inputs are a tensor, a tuple of arguments or a dict of keyword arguments, or a bare tensor.

    Examples:
        >>> model = nn.Sequential(nn.BatchNorm1d(1))
        >>> recalibrate(model, [(torch.tensor([[1.0], [3.0]]), None)])
        >>> model[0].running_mean
        tensor([2.])
    """
    check("recalibrate", model=model, batches=batches)
    with torch.no_grad():
        update_bn(batches, _Called(model))


class _Called(nn.Module):
    """A model that takes its inputs as data give them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, model.training  # which is what it is set back to

    def forward(self, inputs: Any) -> Any:
        return call_model(self.model, inputs)
