"""Batches: how a model is called with them, their size, their first examples."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map_only

from spectrim.errors import SettingError

# Models and inputs, also for training and costs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside; each module's own training flag again afterwards."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def unfused() -> Iterator[None]:
    """Let torch's transformer layers call their children inside, instead of one fused kernel that calls none of them."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model on inputs as a data set gives them.

    Args:
        model: a module or any function.
        inputs: a tensor, a tuple or list of arguments, or a dict of keyword arguments.

    Raises:
        SettingError: `inputs` is none of these.

    Examples:
        >>> call_model(torch.add, {"input": torch.tensor(1), "other": torch.tensor(2)})
        tensor(3)
    """
    args, kwargs = _arguments(inputs)
    return model(*args, **kwargs)


def scores_of(output: Any) -> Any:
    """Return the scores in what a model puts out: its ``logits``, an attribute or a key, as models of transformers have; else all of it.

    Args:
        output: of a forward pass.

    Examples:
        >>> scores_of({"logits": torch.tensor(1), "hidden_states": torch.tensor(2)})
        tensor(1)
        >>> scores_of(torch.tensor(3))
        tensor(3)
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else output


def loss_of(loss: Callable[[Any, Any], Tensor], output: Any, target: Any, owner: str) -> Tensor:
    """Return the loss of a forward pass.

    Args:
        loss: called as ``loss(output, target)``.
        output: whatever the model puts out.
        target: of the batch.
        owner: what an error names.

    Raises:
        SettingError: where a loss of tensors gets an output that only holds one, as those of transformers' models do.
    """
    try:
        return loss(output, target)
    except (TypeError, AttributeError) as error:
        if scores_of(output) is output:
            raise
        rule = f"(output, target) -> scalar for an output of type {type(output).__name__}"
        hint = "which holds its scores as logits: give lambda output, target: loss(output.logits, target)"
        raise SettingError(owner, "loss", got=loss, rule=rule, hint=hint) from error


def batch_size_of(inputs: Any, given: int | None = None) -> int:
    """Return the number of examples: the one given, or the leading dimension of the first tensor.

    Raises:
        SettingError: there is none to read, or it is below 1.

    Examples:
        >>> batch_size_of((torch.zeros(8, 3), torch.zeros(2)))
        8
    """
    if given is None:
        leaves = tree_leaves(_arguments(inputs), is_leaf=lambda leaf: isinstance(leaf, PackedSequence))
        first = next((leaf for leaf in leaves if isinstance(leaf, Tensor | PackedSequence)), None)
        if isinstance(first, PackedSequence):
            batch = int(first.batch_sizes[0])
        else:
            batch = 0 if first is None or first.dim() == 0 else first.size(0)
    else:
        batch = given
    if batch < 1:
        hint = "" if given is not None else "it cannot be read off the inputs"
        raise SettingError("measure", "batch_size", got=given, rule="an integer of at least 1", hint=hint)
    return batch


def one_example(batches: Iterable[Any]) -> Any:
    """Return the inputs of the first batch, cut to one example.

    Examples:
        >>> one_example([({"x": torch.zeros(8, 3)}, torch.zeros(8))])["x"].shape
        torch.Size([1, 3])
    """
    inputs, _ = pair_of(next(iter(batches)), "one_example")
    return tree_map_only(Tensor, lambda tensor: tensor[:1], inputs)


def pair_of(batch: Any, owner: str) -> tuple[Any, Any]:
    """Return ``(inputs, target)`` of a batch; `owner` is named in the error for any other."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    hint = "for a dict that holds its labels: spectrim.integrations.batches.pairs(data)" if isinstance(batch, Mapping) else ""
    raise SettingError(owner, "data", got=type(batch), rule="batches (inputs, target)", hint=hint)


def inputs_of(batch: Any) -> Any:
    """Return the inputs of a batch ``(inputs, target)``, or of bare inputs."""
    return batch[0] if isinstance(batch, tuple | list) and len(batch) == 2 else batch


def first_examples(data: Iterable[Any], count: int) -> list[Any]:
    """Return the first batches until they hold `count` examples, counted along the leading dimension; the last one is whole."""
    taken, seen = [], 0
    for batch in data:
        taken.append(batch)
        seen += batch_size_of(inputs_of(batch))
        if seen >= count:
            break
    return taken


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Tensor | PackedSequence):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    raise SettingError("measure", "inputs", got=type(inputs), rule="a tensor, a tuple of arguments or a dict of keyword arguments")


def _send(value: Any, model: nn.Module) -> Any:
    """Move tensors, in whatever they are nested, to the model's device."""
    first = next((tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors), None)
    if first is None or all(leaf.device == first.device for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
        return value
    from accelerate.utils import send_to_device

    return send_to_device(value, first.device)
