"""Outputs that say nothing: a file cannot be proved equal to a network that gives NaN."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spectrim.errors import ExportError
from spectrim.metrics.calls import call_model


def check_finite(format: str, model: nn.Module, inputs: Any, outputs: Sequence[Tensor]) -> None:
    """Refuse a model whose outputs hold NaN, or nothing but infinite values; some infinite values, as of masked logits, are compared.

    Args:
        format: for the error.
        model: in eval mode.
        inputs: what it was called with.
        outputs: what it gave.

    Raises:
        ExportError: it names the first layer, in the order of calls, whose output is like that.
    """
    if not any(map(_says_nothing, outputs)):
        return
    layer = _first(model, inputs)
    problem = "the model's outputs are NaN or infinite on the inputs, so no file can be proved equal to it"
    raise ExportError(format, problem, layer=layer, hint="look for values that overflow in its weights or in the inputs")


def _says_nothing(value: Any) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return False
    return bool(value.isnan().any()) or not bool(value.isfinite().any())


def _first(model: nn.Module, inputs: Any) -> str:
    """Return the name of the first layer without children, else of the first module, whose output says nothing; empty where none does."""
    found: dict[str, bool] = {}

    def noting(name: str, leaf: bool) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if name not in found and any(map(_says_nothing, tree_leaves(output))):
                found[name] = leaf

        return note

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(noting(name, not module._modules)) for name, module in named]
    try:
        with torch.no_grad():
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return next(iter(found), "")
