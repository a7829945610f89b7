"""Whether a layer composes its weight or runs two operations while it trains: by measured seconds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from spectrim.checks import check, unwrapped
from spectrim.layers import FactorizedLayer, named_layers
from spectrim.layers.taps import operate, tap
from spectrim.layers.weights import OneWeight
from spectrim.metrics.calls import call_model, evaluating

ROUNDS = 5
"""How often the two forms take turns."""


@dataclass(frozen=True)
class _Use:
    """One input of a layer, without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def example(self) -> Tensor:
        """Return an input like it, of normal noise; the global generators are not moved."""
        generator = torch.Generator(self.device).manual_seed(0)
        strides = self.stride if 0 not in self.stride else torch.empty(self.shape, device="meta").stride()  # an expanded input
        x = torch.empty_strided(self.shape, strides, dtype=self.dtype, device=self.device)
        return x.normal_(generator=generator).requires_grad_(self.requires_grad)


def choose_execution(model: nn.Module, inputs: Any, *, min_time: float = 0.01) -> dict[str, bool]:
    """Time both forms of each layer, forward and backward, and use the faster one from now on.

    Layers of one kind, shape and rank are timed once. A choice holds for one rank and one input size (the batch aside): after a cut,
    call it again; other sizes are decided by multiply-accumulates. Recurrent layers, attention and embeddings have one form only.

    Args:
        model: factorized; its layers' ``execution`` changes. Weights, gradients and random generators stay as they are.
        inputs: one batch as in training: a tensor, a tuple of arguments or a dict of keyword arguments.
        min_time: seconds that each form is timed in each of five rounds, > 0.

    Returns:
        For each layer that has a choice, whether it composes its weight.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> low = factorize(nn.Sequential(nn.Linear(64, 64)), rank=2)
        >>> list(choose_execution(low, torch.zeros(128, 64)))
        ['0']
    """
    check("choose_execution", model=model, inputs=inputs, min_time=min_time)
    model = unwrapped(model)
    uses, known, chosen = _uses(model, inputs), dict[Any, bool](), dict[str, bool]()
    for name, layer in named_layers(model):
        for use in uses.get(layer, []):
            key = ("weight", layer.factors_of("weight").rank, use.shape[1:])
            if key not in layer.execution:
                kind = (type(layer), str(layer), layer.scheme, layer.factors_of("weight").dtype, key, use)
                if kind not in known:
                    known[kind] = _composing_is_faster(layer, key, use, min_time)
                layer.execution[key] = known[kind]
            chosen[name] = layer.execution[key]
    return chosen


def _uses(model: nn.Module, inputs: Any) -> dict[nn.Module, list[_Use]]:
    """Run the model once and return how each layer with a choice is used, by the layer."""
    found: dict[nn.Module, list[_Use]] = {}

    def called(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        found.setdefault(layer, []).append(_Use(tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad))

    with_choice = [m for m in model.modules() if isinstance(m, OneWeight) and not m.looks_up]
    handles = [tap(layer, called) for layer in with_choice]
    try:
        with evaluating(model), torch.enable_grad():
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _composing_is_faster(layer: FactorizedLayer, key: tuple[str, int, tuple[int, ...]], use: _Use, min_time: float) -> bool:
    """Time both forms of one layer in turns; the layer is left as it was."""
    x = use.example()
    wanted: list[Tensor] = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    before = dict(layer.execution)

    def step(composes: bool) -> Callable[[], Any]:
        def run() -> None:
            layer.execution[key] = composes
            output = operate(layer, x)
            if wanted:
                torch.autograd.grad(output.sum(), wanted)

        return run

    timers = {composes: Timer("run()", globals={"run": step(composes)}, num_threads=torch.get_num_threads()) for composes in (True, False)}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    try:
        for _ in range(ROUNDS):
            for composes, timer in timers.items():
                seconds[composes] += timer.blocked_autorange(min_run_time=min_time).times
    finally:
        layer.execution.clear()
        layer.execution.update(before)
    return bool(np.median(seconds[True]) <= np.median(seconds[False]))
