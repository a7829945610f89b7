"""Linear weights on levels as int8 tensors of torchao: the same values, a quarter of their memory."""

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from spectrim.checks import check, outside_inference_mode, unwrapped
from spectrim.errors import LayerError
from spectrim.runtimes.level_weights import step_of
from spectrim.surgery.exchange import duplicate

__all__ = ["int8_linears"]


@outside_inference_mode
@torch.no_grad()
def int8_linears(model: nn.Module) -> nn.Module:
    """Return a copy whose linear layers with weights on levels hold them as int8 tensors of torchao.

    `quantize_` of torchao would choose scales of its own, one for each row, and change every weight; here the scale is the step that
    `round_to`, or training on levels, left, so that the values are the same to the bit. What is computed stays in the layer's dtype
    (weight only), and outputs differ by rounding at most. As they are stay convolutions, which torchao does not hold as int8, layers whose
    weights lie on no levels or on more than 127 on each side of zero, and layers whose weight is read instead of multiplied with, for which
    torchao's tensors have no operations: those with a ``forward`` of their own, and the output layer of attention.

    Args:
        model: dense or merged, such as ``round_to(...).model``. It is left untouched.

    Raises:
        LayerError: when no linear layer has such a weight.
        ImportError: without torchao (the extra ``quant``).

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> with torch.no_grad():
        ...     for layer in (net[0], net[2]):
        ...         _ = layer.weight.copy_(torch.randint(-7, 8, layer.weight.shape) * 0.01)
        >>> held = int8_linears(net)
        >>> held[0].weight.qdata.dtype, torch.equal(held[0].weight.dequantize(), net[0].weight)
        (torch.int8, True)
    """
    check("int8_linears", model=model)
    try:
        kind: Any = import_module("torchao.quantization").Int8Tensor
    except (ImportError, AttributeError) as error:
        raise ImportError("int8_linears needs torchao of at least 0.15: pip install torchao, or install the extra 'quant'") from error
    made = duplicate(unwrapped(model)).eval()
    held: dict[int, nn.Parameter] = {}
    for module in made.modules():
        if type(module).forward is not nn.Linear.forward or isinstance(module, NonDynamicallyQuantizableLinear):
            continue
        weight: Any = module.weight
        if id(weight) not in held:
            values = weight.detach().float().cpu()
            step = step_of(np.unique(values.abs().numpy()))
            if step is None:
                continue
            levels = (values / float(step)).round().to(torch.int8).to(weight.device)
            scale = torch.full((len(levels), 1), float(step), dtype=weight.dtype, device=weight.device)
            tensor = kind(levels, scale, [1, levels.shape[1]], weight.dtype)
            if not torch.equal(tensor.dequantize(), weight):
                continue  # the step is none of the weight's dtype
            held[id(weight)] = nn.Parameter(tensor, requires_grad=False)
        module.weight = held[id(weight)]
    if not held:
        raise LayerError(type(model).__name__, "has no linear layer whose weight lies on levels", hint="call round_to(model, ...) first")
    return made
