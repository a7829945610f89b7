"""Latency of whole models, side by side."""

import dataclasses
import functools
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from torch import nn
from torch.utils.benchmark import Timer

from spectrim.checks import check, unwrapped
from spectrim.metrics.calls import arguments, evaluating
from spectrim.metrics.inputs import batch_size_of
from spectrim.metrics.tensors import send


@dataclasses.dataclass(frozen=True)
class Latency:
    """Time of one call on a whole batch.

    Attributes:
        median_s: median, in seconds.
        iqr_s: interquartile range, in seconds.
        batch: examples in the batch.
        threads: CPU threads of torch.
        runs: how many timed runs the median is taken over.
    """

    median_s: float
    iqr_s: float
    batch: int
    threads: int
    runs: int


def latency(
    model: nn.Module, inputs: Any, *, threads: int = 1, repeats: int = 5, min_time: float = 0.2, batch_size: int | None = None
) -> Latency:
    """Time one call in eval mode, without gradients, after a warm-up, synchronized on accelerators; see `compare_latency`."""
    models = {"model": model}
    return compare_latency(models, inputs, threads=threads, repeats=repeats, min_time=min_time, batch_size=batch_size)["model"]


def compare_latency(
    models: Mapping[str, nn.Module],
    inputs: Any,
    *,
    threads: int = 1,
    repeats: int = 5,
    min_time: float = 0.2,
    batch_size: int | None = None,
) -> dict[str, Latency]:
    """Time several models in turns, so that other work on the machine affects all of them.

    Args:
        models: name to module; training flags and torch's thread count are as before afterwards.
        inputs: one batch for all of them: a tensor, a tuple of arguments or a dict of keyword arguments.
        threads: CPU threads of torch, at least 1.
        repeats: rounds, at least 1; in each every model is warmed up and timed.
        min_time: seconds that a model is timed in each round, above 0; it is called at least once.
        batch_size: examples in `inputs`; None to find it by agreement of sizes, see `batch_size_of`.

    Returns:
        Name to latency.

    Raises:
        SettingError: an argument is outside its range.

    Examples:
        >>> import torch
        >>> times = compare_latency({"a": nn.Linear(8, 8), "b": nn.Identity()}, torch.zeros(4, 8), repeats=2, min_time=0.01)
        >>> list(times), times["a"].batch, times["a"].median_s > 0
        (['a', 'b'], 4, True)
    """
    check("compare_latency", models=models, inputs=inputs, threads=threads, repeats=repeats, min_time=min_time, batch_size=batch_size)
    batch = batch_size_of(inputs, batch_size, model=next((unwrapped(model) for model in models.values()), None))
    timers, runs = {}, {}
    with ExitStack() as stack:
        for name, model in models.items():
            stack.enter_context(evaluating(model))
            args, kwargs = send(arguments(inputs, model), model)
            timers[name] = Timer("call()", globals={"call": functools.partial(model, *args, **kwargs)}, num_threads=threads)
            runs[name] = list[float]()
        for _ in range(repeats):
            for name, timer in timers.items():
                runs[name] += timer.blocked_autorange(min_run_time=min_time).times
    result = {}
    for name, times in runs.items():
        low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
        result[name] = Latency(float(median), float(high - low), batch, threads, len(times))
    return result
