"""Folding BatchNorm into the layer before it."""

import copy
from collections import Counter, OrderedDict
from typing import Any

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from spectrim.errors import LayerError
from spectrim.layers.forwards import runs_forward_of
from spectrim.layers.geometry import CONVOLUTIONS
from spectrim.plain.chain import PlainPair

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batchnorms(model: nn.Module) -> list[str]:
    """Multiply each BatchNorm that alone reads a convolution or a linear layer into that layer; in place.

    ``W <- W * gamma / sqrt(var + eps)`` for each output feature, ``b <- (b - mean) * gamma / sqrt(var + eps) + beta``. Which layer a
    BatchNorm follows is taken from a trace by `torch.fx`. It is left alone when one of the two has hooks (its own, or of the pair of layers
    that it is in), runs more than once or holds a tensor that another module holds too. A `BatchNorm1d` behind a linear layer is taken
    to normalize its features, as it does for inputs ``(batch, features)``.

    Args:
        model: in eval mode, of ordinary layers.

    Returns:
        Names of the BatchNorms folded; an `nn.Identity` is in their place.

    Raises:
        LayerError: when the model cannot be traced, or a BatchNorm that could be folded is in training mode.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> fold_batchnorms(model)
        ['1']
        >>> model[0].bias.shape, model[1]
        (torch.Size([8]), Identity())

    Source: Jacob et al., arXiv 1712.05877, section 3.2.
    """
    if not any(isinstance(module, NORMS) for module in model.modules()):
        return []
    graph = _trace(model)
    modules = dict(model.named_modules())
    calls = Counter(id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    holders = Counter(id(tensor) for module in modules.values() for tensor in (*module._parameters.values(), *module._buffers.values()))
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}  # weights that a forward uses itself
    folded = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1 or len(before.args) > 1 or before.kwargs:
            continue
        name, norm, layer = str(node.target), modules[str(node.target)], modules[str(before.target)]
        between = _prefixes(name) ^ _prefixes(str(before.target))  # the two, and what holds one of them alone: a pair of layers
        alone = not {name, str(before.target)} & read and not any(_has_hooks(modules[part]) for part in between)
        alone = alone and all(
            calls[id(module)] == places[id(module)] == 1
            and all(tensor is None or holders[id(tensor)] == 1 for tensor in (*module._parameters.values(), *module._buffers.values()))
            for module in (norm, layer)
        )
        if not (alone and _fits(layer, norm)):
            continue
        if norm.training:
            raise LayerError(name, "is in training mode: it normalizes by each batch and cannot be folded", hint="call model.eval() first")
        _fold(layer, norm)
        parent, _, key = name.rpartition(".")
        setattr(modules[parent], key, nn.Identity().eval())
        folded.append(name)
    return folded


def _trace(model: nn.Module) -> fx.Graph:
    """Trace a copy without hooks, which would be run, that shares all tensors."""
    shared = {id(tensor): tensor for module in model.modules() for tensor in (*module._parameters.values(), *module._buffers.values())}
    probe = copy.deepcopy(model, dict(shared))
    for module in probe.modules():
        for key in _hook_tables(module):
            module.__dict__[key] = OrderedDict()
    try:
        return _Tracer().trace(probe)
    except Exception as error:  # whatever the model's own code raises when it is given a proxy
        problem = (
            f"cannot be traced, so the layers before its BatchNorms are not known ({type(error).__name__}: {str(error).splitlines()[0]})"
        )
        raise LayerError(type(model).__name__, problem, hint="merge it without fold_batchnorm") from error


class _Tracer(fx.Tracer):
    """Takes inference modules as a whole, too: their code depends on the input's shape."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, PlainPair):
            return False
        return type(m).__module__.startswith("spectrim.plain.") or super().is_leaf_module(m, module_qualified_name)


def _prefixes(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts) + 1)}


def _hook_tables(module: nn.Module) -> list[str]:
    return [key for key, value in vars(module).items() if key.endswith("_hooks") and "state_dict" not in key and isinstance(value, dict)]


def _has_hooks(module: nn.Module) -> bool:
    return any(vars(module)[key] for key in _hook_tables(module))


def _fits(layer: Any, norm: Any) -> bool:
    """Whether both are torch's own, and the statistics are those of the layer's output features."""
    if not any(isinstance(norm, kind) and runs_forward_of(norm, kind) for kind in NORMS) or norm.running_mean is None:
        return False
    layers: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, nn.Linear)
    if not any(isinstance(layer, kind) and runs_forward_of(layer, kind) for kind in layers):
        return False
    if "weight" not in layer._parameters:  # computed by a hook or a parametrization
        return False
    if isinstance(layer, nn.Linear):
        return isinstance(norm, nn.BatchNorm1d) and bool(norm.num_features == layer.out_features)
    return bool(norm.num_features == layer.out_channels) and not (layer.transposed and layer.groups > 1)


def _fold(layer: Any, norm: Any) -> None:
    trainable = layer.weight.requires_grad
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    if isinstance(layer, nn.Linear):
        layer.weight, layer.bias = fuse_linear_bn_weights(layer.weight, layer.bias, *statistics)
    else:
        layer.weight, layer.bias = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, transpose=layer.transposed)
    layer.bias.requires_grad_(trainable)
