"""How a model is called with a batch, and what it puts out."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from spectrim.checks import unwrapped
from spectrim.errors import SettingError, SpectrimError
from spectrim.layers.taps import After, Before, tap


class _Seen(Exception):  # noqa: N818 it is no error
    """Ends a pass through a network early."""


def seen_calls(model: nn.Module, module: nn.Module, inputs: Any, count: int = 1) -> list[tuple[tuple[Any, ...], dict[str, Any], Any]]:
    """Run a model to the end of so many calls of one of its modules; return arguments, keyword arguments and output of each.

    Args:
        model: runs up to there, in its present mode.
        module: inside it.
        inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        count: calls to wait for; fewer come back where there are fewer.
    """
    found: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found.append((args, kwargs, output))
        if len(found) == count:
            raise _Seen

    handle = tap(module, after=keep)
    try:
        call_model(model, inputs)
    except _Seen:
        pass
    finally:
        handle.remove()
    return found


@contextmanager
def evaluating(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Eval mode inside, without gradients unless they are asked for; training flags are restored afterwards."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def unfused() -> Iterator[None]:
    """Let torch's transformer layers call their children inside, instead of one fused kernel that calls none of them."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def watched(model: nn.Module, inputs: Any, modules: Iterable[nn.Module], before: Before | None = None, after: After | None = None) -> None:
    """Run a model once, in eval mode without gradients and with all its children called, and watch some of its modules, see `tap`.

    Args:
        model: any module.
        inputs: as for `call_model`.
        modules: in the model.
        before: called before each run of one of them.
        after: called with the module, its arguments and its output.

    Examples:
        >>> model, seen = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)), []
        >>> watched(model, torch.ones(5, 2), model, lambda module, args, kwargs: seen.append(tuple(args[0].shape)))
        >>> seen
        [(5, 2), (5, 3)]
    """
    handles = [tap(module, before, after) for module in modules]
    try:
        with unfused(), evaluating(model):
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


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
    args, kwargs = arguments(inputs, model)
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


def arguments(inputs: Any, model: Any = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs as positional and keyword arguments; a list is one argument where the model cannot be called with its entries."""
    if isinstance(inputs, Tensor | PackedSequence):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, list) and model is not None and takes_list(model, inputs):
        return (inputs,), {}
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    raise SettingError("measure", "inputs", got=type(inputs), rule="a tensor, a tuple of arguments or a dict of keyword arguments")


def takes_list(model: Any, inputs: list[Any]) -> bool:
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
