"""`latency_table`: the measured seconds of every factorized weight of a model."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from torch import nn

from spectrim.budget.costs import calls
from spectrim.budget.latency_cache import cache_path, describe_machine, read_timings, write_timings
from spectrim.budget.onnx_layer import _NoFormError, _onnx_model
from spectrim.budget.timed import MARGIN, LatencyTable, TimedWeight, describe
from spectrim.budget.timing import Backend, _example, _forms, _Operation, _shape, time_layer
from spectrim.budget.whole_network import time_network
from spectrim.checks import check, unwrapped
from spectrim.checks.words import worded
from spectrim.errors import LayerError
from spectrim.forms.form import Form
from spectrim.layers import FactorizedLayer, factor_name, named_layers, sites
from spectrim.layers.uses import Call

POINTS = {"eager": 6, "compile": 3, "onnx": 6}
"""Ranks timed for each layer; a compiler takes seconds for each."""


@worded
def latency_table(
    model: nn.Module,
    inputs: Any,
    *,
    backend: Backend = "eager",
    threads: int = 1,
    multiple: int | None = None,
    margin: float = MARGIN,
    time_box: float = 2.0,
    cache: str | Path | None = None,
    progress: bool = False,
) -> LatencyTable:
    """Time every distinct layer of a factorized model on this machine, dense and as a pair at a handful of ranks, and the dense network.

    The forms of a layer run in turns, forwards and backwards, after a warm-up. What counts is the lower quartile over the rounds: other
    work on the machine only adds time, and a median still includes some of it. Between the ranks timed, seconds are
    interpolated. Layers equal in kind, sizes, scheme and input are timed once.

    Not timed, so that multiply-accumulates decide: embeddings (a look-up is never faster as a pair; parameters decide), a packed attention
    projection of a query and a key that differ, hidden projections of recurrent layers but for ``eager`` (ONNX and compilers would unroll
    their loop), and layers without an ONNX form here. The projections of an attention are timed as linear layers. A packed sequence
    is timed as if all its sequences were of full length.

    Args:
        model: factorized, on the device where it is to be timed; ranks may have been cut.
        inputs: one batch as in use: a tensor, a tuple of arguments or a dict of keyword arguments. Batch and sizes matter.
        backend: ``eager`` torch, ``compile`` (torch.compile, which takes seconds for each rank) or ``onnx`` (ONNX Runtime on the CPU).
        threads: CPU threads, at least 1.
        multiple: ranks are timed and preferred at multiples of this, at least 1; when omitted 8, for full ranks below 64 4, below 16 1.
        margin: share of the dense seconds that a pair must save, in [0, 1).
        time_box: seconds for each distinct layer, above 0, compilation not included; every form runs a few times at least.
        cache: a folder for timings, made when missing, see `default_cache`; one file for each kind of machine, backend and threads.
        progress: show a progress bar.

    Returns:
        The table.

    Raises:
        SettingError: for an argument outside its range, or when ONNX Runtime is not installed.
        LayerError: when nothing is factorized.

    Examples:
        >>> import torch
        >>> from spectrim.surgery.factorize import factorize
        >>> low = factorize(nn.Linear(64, 64))
        >>> table = latency_table(low, torch.zeros(1, 64), time_box=0.01)
        >>> table.timings[table.weights[""].calls[0]].ranks
        (8, 16, 24)
        >>> 0 <= table.break_even("") <= 24
        True
    """
    model = checked("latency_table", model, inputs, backend, threads=threads, multiple=multiple, margin=margin, time_box=time_box)
    machine = describe_machine(backend)
    path = None if cache is None else cache_path(Path(cache), machine, backend, threads)
    stored = {} if path is None else read_timings(path)
    work, weights = operations_of(model, inputs, backend, multiple)
    timings = {key: stored[key] for key, operation in work.items() if key in stored and stored[key].ranks == operation.ranks}
    missing = [key for key in work if key not in timings]
    for key in track(missing, f"timing layers ({backend})", disable=not progress):
        timings[key] = time_layer(work[key], backend, threads, time_box)
        if path is not None:
            stored[key] = timings[key]
            write_timings(path, machine, stored)  # after each one: a stopped run has lost nothing
    dense_s, untimed = time_network(model, inputs, backend, threads, time_box)
    return LatencyTable(backend, threads, machine, timings, weights, margin, dense_s, untimed)


def checked(
    verb: str, model: nn.Module, inputs: Any, backend: str, *, threads: int, multiple: int | None, margin: float, time_box: float
) -> nn.Module:
    """Check what a latency table is made of; return the model without what wraps it.

    Raises:
        SettingError: for an argument outside its range.
        LayerError: when nothing is factorized.
    """
    check(verb, model=model, inputs=inputs, threads=threads, multiple=multiple, margin=margin, time_box=time_box)
    model = unwrapped(model)
    if next(sites(model), None) is None:
        raise LayerError(type(model).__name__, "has no factorized layer", hint="call factorize(model) first")
    return model


def operations_of(
    model: nn.Module, inputs: Any, backend: Backend, multiple: int | None
) -> tuple[dict[str, _Operation], dict[str, TimedWeight]]:
    """Return what has to be timed, by its description, and for each weight which of that it runs.

    Args:
        model: factorized.
        inputs: as for `latency_table`.
        backend: as for `latency_table`.
        multiple: as for `latency_table`.
    """
    used: dict[tuple[FactorizedLayer, str], list[Call]] = defaultdict(list)
    for call in calls(model, inputs):
        used[call.layer, call.weight].append(call)
    work: dict[str, _Operation] = {}
    weights: dict[str, TimedWeight] = {}
    for layer_name, layer in named_layers(model):
        for weight, factors in layer.named_factors():
            step = multiple or (8 if factors.full_rank >= 64 else 4 if factors.full_rank >= 16 else 1)
            own = used[layer, weight]
            most = _most(own, factors) if own else layer.break_even(weight)
            reason = _untimed(layer, weight, own, backend)
            operations = {} if reason else {_key(call): _Operation(call, _grid(most, step, POINTS[backend])) for call in own}
            keys = tuple(_key(call) for call in own) if operations else ()
            most = layer.break_even(weight) if reason else most
            share = layer.share_timed(weight) if operations else 1.0
            weights[factor_name(layer_name, weight)] = TimedWeight(describe(layer, weight), keys, step, most, share, reason)
            work |= operations
    return work, weights


def _key(call: Call) -> str:
    memory = str(call.memory_format).removeprefix("torch.")
    shape = "x".join(map(str, _shape(call)))
    return f"{describe(call.layer, call.weight)} on {shape} {str(call.dtype).removeprefix('torch.')} {memory}"


def _grid(most: int, step: int, points: int) -> tuple[int, ...]:
    """Return about `points` multiples of `step` up to `most`, evenly spaced on a logarithmic scale."""
    steps = most // step
    if not steps:
        return ()
    return tuple(sorted({step * round(n) for n in np.geomspace(1, steps, min(points, steps))}))


def _most(own: Sequence[Call], factors: Form) -> int:
    """Return the largest rank at which two operations take fewer multiply-accumulates than the dense one, over all calls."""
    if not factors.is_matrix:
        return 0
    dense, single = (sum(call.macs(rank) for call in own) for rank in (None, 1))
    return min(factors.full_rank, math.ceil(dense / single) - 1) if single else 0


def _untimed(layer: FactorizedLayer, weight: str, own: Sequence[Call], backend: Backend) -> str:
    if not own:
        return "it does not run on these inputs"
    if reason := layer.why_untimed(weight, backend == "eager"):
        return reason
    if any(call.shape is None for call in own):
        return "query and key differ"
    if backend == "onnx":
        try:
            _onnx_model(_forms(own[0], 1)[1], _example(own[0], "meta"))
        except _NoFormError as error:
            return str(error)
    return ""
