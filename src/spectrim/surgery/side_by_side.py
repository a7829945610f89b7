"""Two networks run side by side, so that each layer is refitted on the inputs that the cut network gives it."""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from spectrim.layers.taps import tap
from spectrim.layers.uses import first_argument
from spectrim.layers.weights import OneWeight
from spectrim.metrics.calls import call_model, seen_calls

ALIVE = 8
"""Tensors as large as the largest input of a layer that a network may hold at once, for each batch, in both networks together."""


LEAST_ROOM = 2**31
"""Bytes that all batches may hold at once, or half of the memory that is free; with more, networks run again for each layer."""


def room(device: torch.device) -> int:
    """Return how many bytes may be held on a device at once: half of what is free, or `LEAST_ROOM`.

    Args:
        device: a processor, a CUDA GPU, or another, whose memory is not asked for.
    """
    free = 0
    if device.type == "cpu":
        free = psutil.virtual_memory().available
    elif device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    return max(LEAST_ROOM, free // 2)


@dataclass(frozen=True)
class _Both:
    """The network before the cut and the one that is corrected, the layers of each that are looked at, by name, and what both run on."""

    dense: nn.Module
    corrected: nn.Module
    originals: Mapping[str, nn.Module]
    layers: Mapping[str, OneWeight]
    batches: Sequence[Any]


_Met = tuple[Tensor, Tensor]
"""What a layer puts out in the dense network, and what reaches it in the network that is corrected."""


def _order(model: nn.Module, layers: dict[str, OneWeight], inputs: Any) -> tuple[Counter[str], int]:
    """Return how often each layer that is called is, in the order of first calls; and the bytes of the largest input."""
    names: list[str] = []
    sizes = [0]

    def note(name: str, args: Any, kwargs: Any) -> None:
        names.append(name)
        sizes.append(first_argument(args, kwargs).nbytes)

    def hook(name: str) -> Any:
        return lambda _, args, kwargs: note(name, args, kwargs)

    handles = [tap(layer, hook(name)) for name, layer in layers.items()]
    try:
        call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Counter(names), max(sizes)


def _layer_by_layer(both: _Both, order: Mapping[str, int]) -> Iterator[tuple[str, Iterator[_Met]]]:
    """Yield each layer with its inputs; both networks run again for each, up to the layer."""
    for name, calls in order.items():
        yield name, _met(both, name, calls)


def _met(both: _Both, name: str, calls: int) -> Iterator[_Met]:
    for x in both.batches:
        before = _inputs_of(both.originals[name], both.dense, x, calls)
        after = _inputs_of(both.layers[name], both.corrected, x, calls)
        if len(before) != len(after):
            raise Unpaired
        yield from ((y, now) for (_, y), (now, _) in zip(before, after, strict=True))


def _inputs_of(layer: nn.Module, model: nn.Module, inputs: Any, calls: int) -> list[tuple[Tensor, Tensor]]:
    """Run the model to the last of that many calls of a layer; return the input and the output of each."""
    found = seen_calls(model, layer, inputs, calls)
    return [(first_argument(args, kwargs).detach(), output.detach()) for args, kwargs, output in found]


class Unpaired(Exception):  # noqa: N818 it is no error
    """The networks give a layer different examples, as experts to which each token is routed: nothing can be fitted there."""


def paired(layer: OneWeight, met: Iterable[_Met]) -> Iterator[_Met]:
    """Yield what a layer meets, but for empty inputs.

    Raises:
        Unpaired: where outputs in one network and inputs in the other do not belong together, or where there is nothing.
    """
    kernel, empty = bool(getattr(layer, "kernel_size", ())), True
    for y, x in met:
        if (len(x) != len(y) or x.dim() != y.dim()) if kernel else x.shape[:-1] != y.shape[:-1]:
            raise Unpaired
        if y.numel() and x.numel():
            empty = False
            yield y, x
    if empty:
        raise Unpaired


class _Unsteady(Exception):  # noqa: N818 it is no error
    """The networks cannot be run side by side: they call layers in different orders, or inside modes of torch that would leak."""


def _in_one_pass(both: _Both, order: Iterable[str]) -> Generator[tuple[str, Iterator[_Met]], None, None]:
    """Yield each layer with its inputs; each network runs once through each batch and waits at the layer while that is refitted.

    Each run is a separate coroutine: the dense ones wait behind the layer, the corrected ones before it.
    """
    outside = getcurrent()

    def stop(name: str, tensor: Tensor) -> None:
        outside.switch((name, tensor.detach()))

    def behind(name: str) -> Any:
        return lambda _, args, kwargs, output: stop(name, output)

    def before(name: str) -> Any:
        return lambda _, args, kwargs: stop(name, first_argument(args, kwargs))

    handles = [tap(both.originals[name], after=behind(name)) for name in order]
    handles += [tap(both.layers[name], before(name)) for name in order]
    runs = [tuple(greenlet(partial(call_model, network, inputs)) for network in (both.dense, both.corrected)) for inputs in both.batches]

    def advance(run: greenlet, name: str) -> Tensor:
        modes = _modes()
        stopped = run.switch()
        if run.dead or stopped[0] != name or _modes() != modes:
            raise _Unsteady
        seen: Tensor = stopped[1]
        return seen

    try:
        for name in order:
            yield name, ((advance(first, name), advance(second, name)) for first, second in runs)
    finally:
        for run in (run for pair in runs for run in pair):
            if not run.dead:
                run.throw()
        for handle in handles:
            handle.remove()


def _modes() -> tuple[bool, ...]:
    """Return torch's modes, which belong to the thread and so to all coroutines in it."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
