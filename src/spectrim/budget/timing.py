"""Seconds of one layer on this machine, dense and as two operations of each rank."""

import importlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from spectrim.budget.onnx_layer import _onnx_model
from spectrim.errors import SettingError
from spectrim.layers.uses import Call

Backend = Literal["eager", "compile", "onnx"]


ROUNDS = 200
"""Rounds over all forms of a layer, at most; the lower quartile over rounds counts."""


BLOCK_S = 1e-3
"""Seconds of calls timed together: shorter than the slices that a busy system cuts time into, so that most blocks run undisturbed."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one layer on one input, see `latency_table`.

    Attributes:
        dense_s: as one dense operation.
        ranks: that were timed, ascending.
        pair_s: as two operations, for each of `ranks`.
    """

    dense_s: float
    ranks: tuple[int, ...]
    pair_s: tuple[float, ...]

    def at(self, rank: int) -> float:
        """Return the seconds of a pair: interpolated between the ranks timed, and never less than at a smaller rank.

        Examples:
            >>> timing = Timing(1.0, (8, 16, 24), (0.5, 0.4, 1.2))
            >>> [round(timing.at(rank), 6) for rank in (1, 8, 16, 20, 24, 99)]
            [0.5, 0.5, 0.5, 0.85, 1.2, 1.2]
        """
        return float(np.interp(rank, self.ranks, np.maximum.accumulate(self.pair_s))) if self.ranks else math.inf


@dataclass(frozen=True)
class _Operation:
    """What is timed: one call of a layer, at these ranks."""

    call: Call
    ranks: tuple[int, ...]


# Building what is timed


def _example(call: Call, device: str | torch.device | None = None) -> Tensor:
    device = device or call.layer.factors_of(call.weight).device
    return torch.empty(_shape(call), dtype=call.dtype, device=device).contiguous(memory_format=call.memory_format)


def _shape(call: Call) -> tuple[int, ...]:
    """Return the shape of the input of what is timed."""
    assert call.shape is not None
    return call.layer.timed_shape(call.weight, call.shape)


def _forms(call: Call, rank: int) -> tuple[nn.Module, nn.Module]:
    """Return a layer dense and as the pair that `merge` writes, with arbitrary weights."""
    return call.layer.timed_forms(call.weight, rank)


# Timing


def time_layer(operation: _Operation, backend: Backend, threads: int, time_box: float) -> Timing:
    """Time one layer, dense and as a pair at each rank, in about `time_box` seconds.

    Returns:
        The lower quartile of each form over the rounds.
    """
    call = operation.call
    x = torch.randn_like(_example(call))
    modules = [_forms(call, 1)[0], *(_forms(call, rank)[1] for rank in operation.ranks)]
    with torch.no_grad(), _threads(threads):
        run = [_runner(module, x, backend, threads) for module in modules]
        timers = [Timer("call()", globals={"call": one}, num_threads=threads) for one in run]
        once = []
        for one, timer in zip(run, timers, strict=True):
            one()  # compiles, allocates, packs weights
            once.append(timer.timeit(1).median)  # after two more calls
        numbers = [max(1, int(BLOCK_S / max(seconds, 1e-9))) for seconds in once]
        rounds: list[list[float]] = []
        start = time.perf_counter()
        while len(rounds) < 3 or (len(rounds) < ROUNDS and time.perf_counter() - start < time_box):
            places = list(range(len(timers)))[:: -1 if len(rounds) % 2 else 1]
            times = {place: timers[place].timeit(numbers[place]).median for place in places}
            rounds.append([times[place] for place in sorted(places)])
    dense, *pairs = np.quantile(np.asarray(rounds), 0.25, axis=0).tolist()
    return Timing(dense, operation.ranks, tuple(pairs))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch's thread count inside: a compiler writes it into its code."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _runner(module: nn.Module, x: Tensor, backend: Backend, threads: int) -> Callable[[], Any]:
    if backend == "eager":
        return partial(module, x)
    if backend == "onnx":
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = ort.InferenceSession(_onnx_model(module, x), options, providers=["CPUExecutionProvider"])
        return partial(session.run, None, {"x": x.cpu().numpy()})

    def call(x: Tensor) -> Any:
        return module(x)

    call.__code__ = call.__code__.replace()  # compiled programs are cached by code object: a new one, or the eighth falls back to eager
    return partial(torch.compile(call, dynamic=False), x)


def _onnxruntime() -> Any:
    try:
        importlib.import_module("onnx")
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise SettingError(
            "latency_table",
            "backend",
            got="onnx",
            rule="installed",
            hint="pip install onnx onnxscript onnxruntime, or install the extra 'onnx'",
        ) from error
