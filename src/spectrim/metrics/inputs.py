"""Batches: how a model is called with them, their size, their first examples."""

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from spectrim.checks import READ_ONCE, check
from spectrim.errors import SettingError
from spectrim.metrics.batch import BatchDims, Layout, agreeing, candidates, described, hints_of, same_example, sizes_in_both, stated, take
from spectrim.metrics.calls import arguments, call_model, evaluating, takes_list, unfused
from spectrim.metrics.tensors import ordinary, send

# Models and inputs, also for training and costs


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
    single = isinstance(inputs, list) and model is not None and takes_list(model, inputs)
    arguments = (inputs,) if single else dict(inputs) if isinstance(inputs, Mapping) else inputs
    found = candidates(arguments, target)
    if (model is not None or output is not None) and not (len(found) == 1 and found[0].plain):
        if output is None and model is not None:
            with evaluating(model), unfused():
                output = call_model(model, send(inputs, model))
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
        args, kwargs = arguments(inputs)
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
            call_model(model, send(inputs, model))
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
    if isinstance(inputs, list) and model is not None and takes_list(model, inputs):
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
                one = call_model(model, send(cut, model))
            except Exception as error:
                failure = error
                continue
            if layout.plain and len(layouts) == 1:
                return take(inputs, layout)
            whole = call_model(model, send(inputs, model)) if whole is None else whole
            verdict = same_example(whole, one, layout, last)
            if verdict:
                return take(inputs, layout)
            if verdict is None or layout.plain:
                unsure.append((verdict is not None, layout))
    if unsure:
        return take(inputs, min(unsure, key=lambda entry: entry[0])[1])
    if failure is not None and whole is None:
        _run_whole(inputs, model, owner)
    hint = "give example_inputs=(inputs that the model takes), or batch_dims=, the batch axis of each argument"
    what = "computes something else" if failure is None else f"fails: {type(failure).__name__}: {str(failure).strip()[:300]}"
    rule = f"given, since on one example ({described(cut)}) cut from a batch ({described(inputs)}) the model {what}"
    raise SettingError(owner, "example_inputs", got=None, rule=rule, hint=hint) from failure


def _run_whole(inputs: Any, model: nn.Module, owner: str) -> None:
    """Raise a SettingError where the model fails on a batch as it comes, so that no cut of it is to blame."""
    with evaluating(model), unfused(), torch.random.fork_rng(devices=[]):
        try:
            call_model(model, send(inputs, model))
        except Exception as error:  # whatever the model's own code raises
            hint = f"on the first one it fails: {type(error).__name__}: {str(error).strip()[:300]}"
            raise SettingError(owner, "data", got=described(inputs), rule="batches that the model takes", hint=hint) from error


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
