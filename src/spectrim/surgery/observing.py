"""Running a model on batches to observe its layers."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import index
from typing import Any, SupportsIndex

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.forms.form import Form
from spectrim.layers import factor_name, named_factors, named_layers
from spectrim.layers.attention import make_observable_
from spectrim.layers.weights import OneWeight
from spectrim.metrics.batch import BatchDims, stated
from spectrim.metrics.calls import unfused
from spectrim.metrics.evaluate import is_divided
from spectrim.metrics.inputs import batch_size_of
from spectrim.metrics.tensors import send
from spectrim.surgery.exchange import duplicate


def absorbing(model: nn.Module) -> dict[str, OneWeight]:
    """Return the layers whose bias takes up whatever a cut of their weight does to the mean of their output, by the weight's name.

    Linear layers and convolutions with a bias and an untied weight. Not in the spatial and the input scheme, where each tap of the
    second operation is a separate output and the padding keeps some of them from reaching the bias; not packed or recurrent weights.

    Args:
        model: factorized.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
        >>> list(absorbing(factorize(model, where=lambda name, module: True)))
        ['0']
    """
    users = Counter(id(factors) for _, layer in named_layers(model) for _, factors in layer.named_factors())
    users += Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())

    def absorbs(layer: OneWeight) -> bool:
        factors, bias = layer.factors_of("weight"), getattr(layer, "bias", None)
        if not isinstance(bias, Tensor) or layer.scheme not in ("channel", "dense") or layer.looks_up:
            return False
        return bias.shape == (factors.blocks * factors.shape[0],) and users[id(factors)] == users[id(bias)] == 1

    layers = ((factor_name(name, "weight"), layer) for name, layer in named_layers(model) if isinstance(layer, OneWeight))
    return {name: layer for name, layer in layers if absorbs(layer)}


def observable(model: nn.Module) -> tuple[nn.Module, dict[str, Form]]:
    """Return a copy in eval mode, in which every factorized weight but embeddings' is a layer that is called, and its factors by name.

    Its parameters want no gradients.
    """
    clone = duplicate(model).eval().requires_grad_(False)
    held = dict(named_factors(clone))
    make_observable_(clone)
    return clone, held


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Leave torch's random generators as they are, and let transformers call their layers instead of one fused kernel."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with unfused(), torch.random.fork_rng(sorted(devices, key=str)):
        yield


def check_examples(owner: str, examples: int | None) -> None:
    """Raise a SettingError unless a number of examples is None or at least 1."""
    if examples is not None and (isinstance(examples, bool) or not isinstance(examples, SupportsIndex) or index(examples) < 1):
        raise SettingError(owner, "examples", got=examples, rule="an integer of at least 1, or None for all")


def batches_of(
    data: Iterable[Any],
    model: nn.Module,
    examples: int | None,
    *,
    targets: bool,
    progress: bool,
    title: str,
    dims: BatchDims | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Any, Any]]:
    """Yield ``(inputs, target)`` on the model's device until so many examples were seen; the target of bare inputs is None.

    Args:
        data: batches.
        model: gives the device.
        examples: None for all.
        targets: whether a target is needed.
        progress: whether to show a progress bar on a terminal.
        title: text of the progress bar.
        dims: states the batch axes, see `BatchDims`.
        share: ``(index, count)`` of this process: it gets every `count`-th batch; examples are counted in all of them. Of data that are
            divided already, see `is_divided`, it gets all batches, and its part of the examples.

    Raises:
        SettingError: for a batch without the target that is needed.
    """
    console, seen = Console(stderr=True), 0
    if share[1] > 1 and is_divided(data):
        examples, share = None if examples is None else -(-examples // share[1]), (0, 1)
    shown = track(data, title, console=console, transient=True, disable=not (progress and console.is_terminal))
    for number, batch in enumerate(shown):
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        if targets and not pair:
            raise SettingError(title, "data", got=type(batch), rule="batches (inputs, target) with a loss")
        inputs, target = tuple(batch) if pair else (batch, None)
        if number % share[1] == share[0]:
            inputs, target = send((inputs, target), model)
            yield inputs, target
        if examples is not None:
            seen += batch_size_of(inputs, target=target) if dims is None else stated(inputs, dims, title).size
            if seen >= examples:
                return
