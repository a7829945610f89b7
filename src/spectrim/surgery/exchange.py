"""Exchanging layers in a copy of a model, while tied and shared ones stay so."""

import copy
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn import functional as F


def duplicate(model: nn.Module, without: Iterable[Tensor] = ()) -> nn.Module:
    """Return a deep copy; tensors that hooks compute (old weight norm, pruning), which torch refuses to copy, are detached.

    Args:
        model: left untouched.
        without: parameters that the copy does not need; it holds empty ones, on the meta device, in their place.
    """
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf]
    memo: dict[int, object] = {id(tensor): tensor.detach().clone() for tensor in held}
    memo.update({id(weight): nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad) for weight in without})
    return copy.deepcopy(model, memo)


def carry_hooks(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give `new`, which takes the place of `old`, its forward and backward hooks and its training mode; return `new`."""
    for key, value in vars(old).items():
        if key.startswith(("_forward_", "_backward_", "_is_full_backward_")):
            new.__dict__[key] = copy.copy(value)
    return new.train(old.training)


def replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    """Put new modules in the place of old ones, in every parent that holds them; in place, but for the root.

    Args:
        model: the root.
        replacements: ``id`` of the old module → the new one.

    Returns:
        The root, which is a new module when it was itself replaced.
    """
    parents = [*model.modules(), *(module for new in replacements.values() for module in new.modules())]
    for parent in parents:
        for key, child in parent._modules.items():
            if child is not None and id(child) in replacements:
                parent._modules[key] = replacements[id(child)]
                if isinstance(parent, nn.TransformerEncoderLayer):
                    parent.activation_relu_or_gelu = _fused_activation(parent)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and not all(getattr(m, "activation_relu_or_gelu", 1) for m in encoder.layers):
            encoder.use_nested_tensor = False  # only the fused kernel can read nested tensors
    return replacements.get(id(model), model)


def _fused_activation(layer: nn.TransformerEncoderLayer) -> int:
    """Return torch's code of the activation (0: none) for the fused kernel, which reads ``linear1.weight`` and does not call the layers."""
    children = (layer.self_attn, layer.linear1, layer.linear2)
    if any(type(child) not in (nn.MultiheadAttention, nn.Linear) for child in children):
        return 0
    activation = layer.activation
    if activation is F.relu or isinstance(activation, nn.ReLU):
        return 1
    return 2 if activation is F.gelu or isinstance(activation, nn.GELU) else 0
