"""Batches: how a model is called with them, their size, their first examples."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map_only

from spectrim.checks import READ_ONCE, check, unwrapped
from spectrim.errors import SettingError, SpectrimError
from spectrim.metrics.batch import BatchDims, Layout, agreeing, candidates, described, hints_of, same_example, sizes_in_both, stated, take

# Models and inputs, also for training and costs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside; training flags are restored afterwards."""
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
        inputs: a tensor, a tuple or list of arguments, or a dict of keyword arguments. A list is one argument where the model's signature
            does not take its entries, as models do that take a list of images.

    Raises:
        SettingError: `inputs` is none of these.

    Examples:
        >>> call_model(torch.add, {"input": torch.tensor(1), "other": torch.tensor(2)})
        tensor(3)
    """
    args, kwargs = _arguments(inputs, model)
    return model(*args, **kwargs)


def scores_of(output: Any) -> Any:
    """Return the scores in a model's output: its ``logits`` (an attribute or a key, as in models of transformers), else the whole output.

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
        output: of the model.
        target: of the batch.
        owner: the verb that was called, for errors.

    Raises:
        SettingError: where the loss fails on this output and target, or does not return a scalar tensor.
    """
    try:
        value = loss(output, target)
    except (SpectrimError, torch.OutOfMemoryError):
        raise
    except (TypeError, AttributeError, ValueError, IndexError, KeyError, RuntimeError) as error:
        if isinstance(error, AttributeError | KeyError) and isinstance(output, Tensor) and isinstance(target, Tensor):
            raise  # of the loss's own code
        hint = f"it fails with {type(error).__name__}: {str(error).strip()[:300]}"
        if scores_of(output) is not output:
            hint = "which holds its scores as logits: give lambda output, target: loss(output.logits, target)"
        rule = f"(output, target) -> scalar for an output of type {_kind(output)} and a target of type {_kind(target)}"
        raise SettingError(owner, "loss", got=loss, rule=rule, hint=hint) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise SettingError(owner, "loss", got=got, rule="a function that returns a scalar tensor", hint="use reduction='mean'")
    return value


def _kind(value: Any) -> str:
    """Name the type of an output or a target, of a tensor with its dtype and shape."""
    return f"{type(value).__name__} ({value.dtype}, {tuple(value.shape)})" if isinstance(value, Tensor) else type(value).__name__


def batch_size_of(
    inputs: Any,
    given: int | None = None,
    *,
    target: Any = None,
    model: nn.Module | None = None,
    output: Any = None,
    unknown: int | None = None,
) -> int:
    """Return the number of examples: the one given, or the one on which the sizes of inputs, target and output agree.

    Args:
        inputs: of one batch.
        given: stated by the caller; None to find it.
        target: of the batch, where there is one.
        model: decides where sizes allow several answers: it runs once for its output, unless that is given, and once more where only
            its recurrent and attention layers can say, by ``batch_first``, which axis is the batch. Without a model the leading axis is
            taken where the sizes allow it.
        output: of the model for these inputs.
        unknown: returned where the tensors agree on no size, for costs of which only ratios matter; None for an error.

    Raises:
        SettingError: when the tensors agree on no size, or for a number below 1.

    Examples:
        >>> batch_size_of((torch.zeros(8, 3), torch.zeros(8)))
        8
        >>> batch_size_of(torch.zeros(50, 8, 3), target=torch.zeros(8))
        8
    """
    check_batch_size(inputs, given)
    if given is not None:
        return index(given)
    single = isinstance(inputs, list) and model is not None and _takes_list(model, inputs)
    arguments = (inputs,) if single else dict(inputs) if isinstance(inputs, Mapping) else inputs
    found = candidates(arguments, target)
    if (model is not None or output is not None) and not (len(found) == 1 and found[0].plain):
        if output is None and model is not None:
            with evaluating(model), unfused():
                output = call_model(model, _send(inputs, model))
        found = agreeing(arguments, output) or found
        sizes = {layout.size for layout in found} | sizes_in_both(arguments, output)
        if model is not None and len(sizes) > 1 and (size := _stated_by_layers(model, inputs, sizes)):
            return size
    if not found and (counts := hints_of(target)):
        return counts[0]
    if not found or found[0].size < 1:
        if unknown is None:
            raise _unknown_batch(inputs)
        return unknown
    return found[0].size


def check_batch_size(inputs: Any, given: int | None) -> None:
    """Raise a SettingError for a stated batch size below 1, and for inputs without any axis."""
    if given is not None:
        check("measure", batch_size=given)
    else:
        args, kwargs = _arguments(inputs)
        leaves = tree_leaves((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, PackedSequence))
        if not any(isinstance(leaf, PackedSequence) or (isinstance(leaf, Tensor) and leaf.dim() and len(leaf)) for leaf in leaves):
            raise _unknown_batch(inputs)


def _unknown_batch(inputs: Any) -> SettingError:
    hint = f"it cannot be derived from {described(inputs)}: state it (batch_size= or batch_dims=)"
    return SettingError("measure", "batch_size", got=None, rule="an integer of at least 1", hint=hint)


def _stated_by_layers(model: nn.Module, inputs: Any, sizes: set[int]) -> int | None:
    """Return that one of `sizes` which a layer with ``batch_first`` takes for the batch: the model runs; None where none does."""
    seen: list[int] = []

    def note(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor) and x.dim() == 3:
            seen.append(x.size(0 if layer.batch_first else 1))

    stating = [module for module in model.modules() if isinstance(getattr(module, "batch_first", None), bool)]
    if not stating:
        return None
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in stating]
    try:
        with evaluating(model), unfused():
            call_model(model, _send(inputs, model))
    finally:
        for handle in handles:
            handle.remove()
    return next((size for size in seen if size in sizes), None)


def one_example(
    batches: Iterable[Any], model: nn.Module | None = None, *, dims: BatchDims | None = None, owner: str = "one_example"
) -> Any:
    """Return the inputs of the first batch, cut to one example.

    Only axes along which the examples lie are cut: where the caller states them, or where sizes agree with those of the target or among
    the inputs. With a model the cut is tried: of several possible ones that is taken for which the output is that of the whole batch.

    Args:
        batches: ``(inputs, target)``; the first one is read.
        model: what the inputs are for.
        dims: states the batch axes: one for all tensors, or by argument, see `BatchDims`.
        owner: the verb that was called, for errors.

    Raises:
        SettingError: when the batch axis cannot be determined, or the model fails on the cut inputs.

    Examples:
        >>> one_example([({"x": torch.zeros(8, 3)}, torch.zeros(8))])["x"].shape
        torch.Size([1, 3])
        >>> one_example([(torch.zeros(50, 8, 3), torch.zeros(8))]).shape  # time first
        torch.Size([50, 1, 3])
    """
    inputs, target = pair_of(first_batch(batches, owner), owner)
    if isinstance(inputs, list) and model is not None and _takes_list(model, inputs):
        inputs = (inputs,)
    elif isinstance(inputs, Mapping):
        inputs = dict(inputs)
    layouts = candidates(inputs, target) if dims is None else [stated(inputs, dims, owner)]
    if not layouts:
        hint = "give example_inputs=(inputs of one example), or batch_dims=, the batch axis of each argument"
        shapes = f"{described(inputs)} with target {described(target).removeprefix('inputs ')}"
        raise SettingError(owner, "data", got=shapes, rule="batches whose sizes determine the batch axis", hint=hint)
    return take(inputs, layouts[0]) if model is None else _tried(inputs, layouts, model, owner)


def _tried(inputs: Any, layouts: Sequence[Layout], model: nn.Module, owner: str) -> Any:
    """Return one example by the first layout that the model's outputs confirm; else by one that they cannot refute."""
    cut, failure = inputs, None
    unsure: list[tuple[int, Layout]] = []
    whole: Any = None
    with evaluating(model), unfused(), torch.random.fork_rng(devices=[]):
        for layout in layouts:
            last = layout.size - 1
            try:
                cut = take(inputs, layout, last)
                one = call_model(model, _send(cut, model))
            except Exception as error:
                failure = error
                continue
            if layout.plain and len(layouts) == 1:
                return take(inputs, layout)
            whole = call_model(model, _send(inputs, model)) if whole is None else whole
            verdict = same_example(whole, one, layout, last)
            if verdict:
                return take(inputs, layout)
            if verdict is None or layout.plain:
                unsure.append((verdict is not None, layout))
    if unsure:
        return take(inputs, min(unsure, key=lambda entry: entry[0])[1])
    hint = "give example_inputs=(inputs that the model takes), or batch_dims=, the batch axis of each argument"
    what = "computes something else" if failure is None else f"fails: {type(failure).__name__}: {str(failure).strip()[:300]}"
    rule = f"given, since on one example ({described(cut)}) cut from a batch ({described(inputs)}) the model {what}"
    raise SettingError(owner, "example_inputs", got=None, rule=rule, hint=hint) from failure


def length_of(data: Iterable[Any], owner: str) -> int:
    """Return the number of batches; data without a length are read once to count them.

    Args:
        data: can be iterated again.
        owner: the verb that was called, for errors.

    Raises:
        SettingError: when there is no batch.

    Examples:
        >>> length_of([1, 2], "fit")
        2
    """
    try:
        length = len(data)  # type: ignore[arg-type]
    except TypeError:
        length = sum(1 for _ in data)
    if not length:
        raise SettingError(owner, "data", got=f"nothing from {type(data).__name__}", rule="at least one batch", hint=READ_ONCE)
    return length


def first_batch(data: Iterable[Any], owner: str) -> Any:
    """Return the first batch of data.

    Raises:
        SettingError: when there is none.
    """
    for batch in data:
        return batch
    raise SettingError(owner, "data", got=f"nothing from {type(data).__name__}", rule="at least one batch", hint=READ_ONCE)


def pair_of(batch: Any, owner: str) -> tuple[Any, Any]:
    """Return ``(inputs, target)`` of a batch; `owner` is named in the error for any other."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return ordinary(batch[0]), ordinary(batch[1])
    hint = "for a dict that holds its labels: spectrim.integrations.batches.pairs(data)" if isinstance(batch, Mapping) else ""
    raise SettingError(owner, "data", got=type(batch), rule="batches (inputs, target)", hint=hint)


def inputs_of(batch: Any) -> Any:
    """Return the inputs of a batch ``(inputs, target)``, or of bare inputs."""
    return batch[0] if isinstance(batch, tuple | list) and len(batch) == 2 else batch


def first_examples(data: Iterable[Any], count: int, *, dims: BatchDims | None = None) -> list[Any]:
    """Return the first batches until they hold `count` examples; the last one is whole.

    Args:
        data: batches ``(inputs, target)``, or bare inputs.
        count: examples wanted.
        dims: states the batch axes of the inputs, see `BatchDims`; they are found by agreement of sizes when omitted.
    """
    taken, seen = [], 0
    for batch in data:
        taken.append(batch)
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        inputs = inputs_of(batch)
        seen += batch_size_of(inputs, target=batch[1] if pair else None) if dims is None else stated(inputs, dims, "first_examples").size
        if seen >= count:
            break
    return taken


def _arguments(inputs: Any, model: Any = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs as positional and keyword arguments; a list is one argument where the model cannot be called with its entries."""
    if isinstance(inputs, Tensor | PackedSequence):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, list) and model is not None and _takes_list(model, inputs):
        return (inputs,), {}
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    raise SettingError("measure", "inputs", got=type(inputs), rule="a tensor, a tuple of arguments or a dict of keyword arguments")


def _takes_list(model: Any, inputs: list[Any]) -> bool:
    """Whether a model takes a list as its one argument, as those for images of different sizes do: by its signature."""
    inner = unwrapped(model) if isinstance(model, nn.Module) else model
    try:
        signature = inspect.signature(inner.forward if isinstance(inner, nn.Module) else inner)
    except (TypeError, ValueError):
        return False
    return not _binds(signature, *inputs) and _binds(signature, inputs)


def _binds(signature: inspect.Signature, *args: Any) -> bool:
    try:
        signature.bind(*args)
    except TypeError:
        return False
    return True


def _send(value: Any, model: nn.Module) -> Any:
    """Move tensors, in whatever they are nested, to the model's device; those made in inference mode become ordinary ones."""
    first = next((tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors), None)
    value = ordinary(value)
    tensors = tensors_of(value)
    if first is None or all(tensor.device == first.device for tensor in tensors):
        return value
    from accelerate.utils import send_to_device

    if dataclasses.is_dataclass(value) and not isinstance(value, type | Mapping):
        moved = {entry.name: _send(getattr(value, entry.name), model) for entry in dataclasses.fields(value) if entry.init}
        return dataclasses.replace(value, **moved)
    return send_to_device(value, first.device)


def ordinary(value: Any) -> Any:
    """Return inputs or targets in which tensors made in inference mode are ordinary ones, which training may use."""
    if torch.is_inference_mode_enabled() or not any(tensor.is_inference() for tensor in tensors_of(value)):
        return value
    return tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, value)


def tensors_of(value: Any) -> list[Tensor]:
    """Return all tensors in an output or a target: a tensor, or tuples, lists, dicts and dataclasses of them.

    Examples:
        >>> [tensor.item() for tensor in tensors_of({"a": torch.tensor(1), "b": (torch.tensor(2), "text")})]
        [1, 2]
    """
    found = []
    for leaf in tree_leaves(dict(value) if isinstance(value, Mapping) else value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += [tensor for entry in dataclasses.fields(leaf) for tensor in tensors_of(getattr(leaf, entry.name))]
        elif isinstance(leaf, Mapping):
            found += tensors_of(leaf)
    return found
