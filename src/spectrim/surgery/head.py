"""Which layer is the classifier head: the last one called for the output, or without a forward pass the one of fitting name and size."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from spectrim.layers import has_matrix
from spectrim.metrics.calls import call_model, evaluating, scores_of, unfused
from spectrim.metrics.tensors import tensors_of

NAMES = ("head", "classifier", "cls", "cls_head", "cls_score", "class_head", "lm_head", "score", "logits")
"""Parts of layer names that stand for a classifier head in torchvision, timm, transformers and detectron."""


def call_order(model: nn.Module, inputs: Any) -> list[str]:
    """Run the model once in eval mode and return the names of its layers with a matrix, in the order of their last calls.

    A layer whose weight is read instead, as by ``F.linear(x, head.weight)``, counts as called then. Where the last one has no part in the
    output, as an auxiliary head has whose output is a second one or is dropped, the last one that has comes after it. The output is the
    ``logits``, else the first tensor; where the tensors end in several layers of which one is named as in `NAMES`, that one's.

    Args:
        model: dense or factorized.
        inputs: one batch: a tensor, a tuple of arguments or a dict of keyword arguments.

    Examples:
        >>> import torch
        >>> call_order(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(1, 2))
        ['0', '2']
    """
    called: dict[str, None] = {}
    try:
        with evaluating(model, gradients=True), _graph_alone(model), _noting(model, called):
            last = _last_of_output(model, call_model(model, inputs), list(called))
    except Exception:  # a forward pass that cannot be differentiated; what else is wrong with it is raised below
        called.clear()
        with evaluating(model), _noting(model, called):
            call_model(model, inputs)
        last = None
    if last is not None:
        called.pop(last)
        called[last] = None
    return list(called)


@contextmanager
def _noting(model: nn.Module, called: dict[str, None]) -> Iterator[None]:
    """Note the layers in the order of their last calls."""

    def noting(name: str) -> Any:
        def note(*_: Any) -> None:
            called.pop(name, None)
            called[name] = None

        return note

    layers = _layers(model)
    held = [(name, p) for name, module in layers for p in module.parameters(recurse=False) if p.dim() > 1]
    uses = Counter(id(p) for _, p in held)
    with ExitStack() as stack:
        for name, module in layers:
            stack.callback(module.register_forward_pre_hook(noting(name)).remove)
        stack.enter_context(unfused())
        stack.enter_context(_Reads({id(p): noting(name) for name, p in held if uses[id(p)] == 1}))
        yield


@contextmanager
def _graph_alone(model: nn.Module) -> Iterator[None]:
    """Let a forward pass build its graph, frozen parameters included, without keeping the tensors that a backward pass would need."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point() and not p.is_inference()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with saved_tensors_hooks(lambda tensor: None, lambda kept: kept):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _last_of_output(model: nn.Module, output: Any, order: Sequence[str]) -> str | None:
    """Return the last layer called that the output depends on, see `call_order`; None where no graph tells."""
    parameters = {name: {id(p) for p in module.parameters()} for name, module in _layers(model)}
    ends = list[str]()
    for tensor in (held for held in tensors_of(scores_of(output)) if held.grad_fn is not None):
        reached = _reached(tensor)
        found = None if reached is None else next((name for name in reversed(order) if parameters[name] & reached), None)
        if found is None:
            return None
        ends.append(found)
    named = [name for name in dict.fromkeys(ends) if set(name.split(".")) & set(NAMES)]
    return named[0] if len(named) == 1 else next(iter(ends), None)


def _reached(tensor: Tensor) -> set[int] | None:
    """Return the identities of the parameters that a tensor depends on; None where a checkpoint hides some."""
    nodes: list[Any] = [tensor.grad_fn]
    seen, found = set[Node](), set[int]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return None
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [before for before, _ in node.next_functions]
    return found


class _Reads(TorchFunctionMode):
    """Notes the parameters that functions are given."""

    def __init__(self, notes: Mapping[int, Callable[[], None]]) -> None:
        super().__init__()
        self.notes = notes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # a shape or a dtype
            for value in (*args, *(kwargs or {}).values()):
                if (note := self.notes.get(id(value))) is not None:
                    note()
        return func(*args, **(kwargs or {}))


def head_of(model: nn.Module, order: Sequence[str] | None = None) -> str | None:
    """Return the name of the classifier head, a linear layer, factorized or dense.

    With the order of calls it is the last in it. Without one it is the last linear layer whose name has a part in `NAMES`; without
    such a name the last layer registered, unless another layer reads as many features as it returns while exactly one linear layer has
    outputs that no layer reads.

    Args:
        model: dense or factorized.
        order: what `call_order` returned.

    Returns:
        None when the model has no other layer with a matrix, when the last layer is not linear, or when it is the end of one of several
        blocks in a `ModuleList`.
    """
    layers = _layers(model)
    linear = [name for name, module in layers if _is_linear(module) and not name.endswith("out_proj")]
    if len(layers) < 2 or not linear:
        return None
    if order:
        return order[-1] if order[-1] in linear and not _ends_block(model, order[-1]) else None
    named = [name for name in linear if set(name.split(".")) & set(NAMES) and not _in_list(model, name)]
    if named:
        return named[-1]
    last = linear[-1] if linear[-1] == layers[-1][0] and not _in_list(model, linear[-1]) else None
    unread = _unread(model, linear)
    if last is not None and last not in unread and len(unread) == 1 and not _in_list(model, unread[0]):
        return unread[0]
    return last


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if has_matrix(module)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _lists(model: nn.Module, name: str) -> Iterable[str]:
    """Return the names of the lists of several modules that a layer lies in."""
    modules = dict(model.named_modules())
    parts = name.split(".")
    parents = [".".join(parts[:end]) for end in range(len(parts))]
    return [parent for parent in parents if isinstance(modules[parent], nn.ModuleList) and len(modules[parent]) > 1]


def _in_list(model: nn.Module, name: str) -> bool:
    return bool(_lists(model, name))


def _ends_block(model: nn.Module, name: str) -> bool:
    """Whether a layer lies in a block of a list, and is not itself an entry of it."""
    return any(name.removeprefix(f"{parent}.").count(".") for parent in _lists(model, name))


def _unread(model: nn.Module, linear: Sequence[str]) -> list[str]:
    """Return the linear layers whose number of outputs no layer has for its number of inputs."""
    widths = {
        getattr(module, key, None) for _, module in _layers(model) for key in ("in_features", "in_channels", "input_size", "embed_dim")
    }
    return [name for name in linear if getattr(model.get_submodule(name), "out_features", None) not in widths]
