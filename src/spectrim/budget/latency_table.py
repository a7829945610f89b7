"""`latency_table`: the measured seconds of every factorized weight of a model."""

import hashlib
import json
import math
import os
import platform
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.progress import track
from torch import nn

from spectrim.budget.costs import Call, calls
from spectrim.budget.onnx_layer import _NoFormError, _onnx_model
from spectrim.budget.timing import Backend, Timing, _example, _forms, _onnxruntime, _Operation, _shape, time_layer
from spectrim.budget.whole_network import time_network
from spectrim.checks import check, unwrapped
from spectrim.errors import FormatError, LayerError, SettingError
from spectrim.files import read_json, write_json
from spectrim.forms.svd import Factors
from spectrim.layers import FactorizedLayer, factor_name, named_layers
from spectrim.layers.embedding import FactorizedEmbedding
from spectrim.layers.recurrent import FactorizedRecurrent, weight_shape

MARGIN = 0.05
"""A pair is written where it takes at least this share less time than the dense layer: less than that may be noise."""


POINTS = {"eager": 6, "compile": 3, "onnx": 6}
"""Ranks timed for each layer; a compiler takes seconds for each."""


@dataclass(frozen=True)
class TimedWeight:
    """One factorized weight in a `LatencyTable`.

    Attributes:
        layer: describes the layer, its sizes and its weight, to tell whether a table fits a model.
        calls: the key in `LatencyTable.timings` of each time it runs; empty where it was not timed.
        multiple: ranks are multiples of this.
        most: the largest rank at which a pair takes fewer multiply-accumulates than the dense operation.
        share: part of the dense seconds that is this weight's own; the rest belongs to other weights of the layer.
        untimed: why there are no seconds; multiply-accumulates decide then.
    """

    layer: str
    calls: tuple[str, ...]
    multiple: int
    most: int
    share: float = 1.0
    untimed: str = ""


@dataclass(frozen=True)
class LatencyTable:
    """Measured seconds of every factorized weight of a model; what `merge`, `allocate` and `coverage` take as ``latency``.

    Args:
        backend: what ran the layers.
        threads: CPU threads.
        machine: what they ran on.
        timings: by operation, as text: the layer, its sizes, its input.
        weights: by the names of `coverage`.
        margin: share of the dense seconds that a pair must save, in [0, 1).
        dense_s: seconds of one call of the whole dense network; None where it was not timed.
        dense_untimed: why not.

    Raises:
        SettingError: for a `margin` outside its range.
    """

    backend: Backend
    threads: int
    machine: Mapping[str, str]
    timings: Mapping[str, Timing]
    weights: Mapping[str, TimedWeight]
    margin: float = MARGIN
    dense_s: float | None = None
    dense_untimed: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 1:
            raise SettingError("LatencyTable", "margin", got=self.margin, rule="in [0, 1)")

    def break_even(self, name: str) -> int:
        """Return the largest rank, a multiple, up to which the pair is faster than dense by the margin; 0 when there is none.

        A pair that takes as many multiply-accumulates as the dense operation is never written, however fast.

        Raises:
            LayerError: for a weight that is not in the table.
        """
        weight = self._weight(name)
        if not weight.calls:
            return weight.most
        most, dense = 0, self._dense(weight)
        for rank in range(weight.multiple, weight.most + 1, weight.multiple):
            if self._pair(weight, rank) > (1 - self.margin) * dense:
                break
            most = rank
        return most

    def seconds(self, name: str, rank: int | None) -> float | None:
        """Return the seconds of one weight for a call of the model: as a pair of `rank`, or dense for None; None if it was not timed."""
        weight = self._weight(name)
        if not weight.calls:
            return None
        dense = self._dense(weight)
        return weight.share * dense + (0.0 if rank is None else self._pair(weight, rank) - dense)

    def multiple(self, name: str) -> int:
        """Return the number that a rank of one weight should be a multiple of."""
        return self._weight(name).multiple

    def limits(self, model: nn.Module) -> dict[tuple[int, str], int]:
        """Return the break-even rank of each factorized weight of a model, by the ``id`` of its layer and the weight's name.

        Raises:
            LayerError: when the table was made of another model.
        """
        found: dict[tuple[int, str], int] = {}
        for layer_name, layer in named_layers(model):
            for weight, _ in layer.named_factors():
                name = factor_name(layer_name, weight)
                timed, present = self._weight(name).layer, describe(layer, weight)
                if timed != present:
                    raise LayerError(name, f"was timed as {timed} and is {present}", hint=AGAIN)
                found[id(layer), weight] = self.break_even(name)
        return found

    def verdict(self, name: str, rank: int) -> str:
        """Say what `merge` writes for one weight of `rank`, and why."""
        weight, limit = self._weight(name), self.break_even(name)
        form, sign = ("two layers", "<=") if rank <= limit else ("one dense layer", ">")
        if not weight.calls:
            return f"merges to {form} (rank {rank} {sign} {limit}, by multiply-accumulates: {weight.untimed})"
        dense = self._dense(weight)
        ranks = sorted({rank for call in weight.calls for rank in self.timings[call].ranks if rank <= weight.most})
        if limit == 0:
            best = max(ranks, key=lambda r: dense / self._pair(weight, r), default=None)
            why = f" ({dense / self._pair(weight, best):.2f}x at rank {best})" if best else ""
            return f"dense: no rank is faster than dense on this machine{why}"
        ratio = f"; as two {dense / self._pair(weight, rank):.2f}x as fast" if rank <= weight.most else ""
        return f"merges to {form} (rank {rank} {sign} {limit}{ratio})"

    def to_dict(self) -> dict[str, Any]:
        """Return the table as a dict that `json.dumps` takes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LatencyTable":
        """Return the table that `to_dict` described.

        Raises:
            FormatError: when it is not such a dict.
        """
        try:
            timings = {key: _timing(entry) for key, entry in fields["timings"].items()}
            weights = {name: TimedWeight(**{**entry, "calls": tuple(entry["calls"])}) for name, entry in fields["weights"].items()}
            table = cls(**{**fields, "timings": timings, "weights": weights})
            missing = [call for weight in weights.values() for call in weight.calls if call not in timings]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError("LatencyTable", f"is not what to_dict wrote ({error!r})") from error
        if missing:
            raise FormatError("LatencyTable", f"holds no timing of {missing[0]!r}")
        return table

    def _weight(self, name: str) -> TimedWeight:
        if name not in self.weights:
            raise LayerError(name, "is not in the latency table", hint=AGAIN)
        return self.weights[name]

    def _dense(self, weight: TimedWeight) -> float:
        return sum(self.timings[call].dense_s for call in weight.calls)

    def _pair(self, weight: TimedWeight, rank: int) -> float:
        return sum(self.timings[call].at(rank) for call in weight.calls)


AGAIN = "make the table of this model: latency_table(model, inputs)"


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
    work on the machine only ever adds time, and a median still holds some of it. Between the ranks timed, seconds are
    interpolated. Layers equal in kind, sizes, scheme and input are timed once.

    Not timed, so that multiply-accumulates decide: embeddings (a look-up is never faster as a pair; parameters decide), a packed attention
    projection of a query and a key that differ, hidden projections of recurrent layers but for ``eager`` (ONNX and compilers would unroll
    their loop), and what the ONNX backend has no form for. The projections of an attention are timed as linear layers. A packed sequence
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
        >>> from spectrim.surgery.factorize import factorize
        >>> low = factorize(nn.Linear(64, 64))
        >>> table = latency_table(low, torch.zeros(1, 64), time_box=0.01)
        >>> table.timings[table.weights[""].calls[0]].ranks
        (8, 16, 24)
        >>> 0 <= table.break_even("") <= 24
        True
    """
    check("latency_table", model=model, inputs=inputs, threads=threads, multiple=multiple, margin=margin, time_box=time_box)
    model = unwrapped(model)
    for name, value, fits, rule in (
        ("backend", backend, backend in get_args(Backend), f"one of {get_args(Backend)}"),
        ("threads", threads, threads >= 1, "at least 1"),
        ("multiple", multiple, multiple is None or multiple >= 1, "at least 1"),
        ("margin", margin, 0 <= margin < 1, "in [0, 1)"),
        ("time_box", time_box, time_box > 0, "above 0"),
    ):
        if not fits:
            raise SettingError("latency_table", name, got=value, rule=rule)
    names = {(id(layer), weight): factor_name(name, weight) for name, layer in named_layers(model) for weight in layer.factors}
    if not names:
        raise LayerError(type(model).__name__, "has no factorized layer", hint="call factorize(model) first")
    used: dict[tuple[int, str], list[Call]] = defaultdict(list)
    for call in calls(model, inputs):
        used[id(call.layer), call.weight].append(call)

    machine = describe_machine(backend)
    path = None if cache is None else _cache_path(Path(cache), machine, backend, threads)
    stored = {} if path is None else _read(path)
    work: dict[str, _Operation] = {}
    weights: dict[str, TimedWeight] = {}
    for layer_name, layer in named_layers(model):
        for weight, factors in layer.named_factors():
            step = multiple or (8 if factors.full_rank >= 64 else 4 if factors.full_rank >= 16 else 1)
            own = used[id(layer), weight]
            most = _most(own, factors) if own else layer.break_even(weight)
            reason = _untimed(layer, weight, own, backend)
            operations = {} if reason else {_key(call): _Operation(call, _grid(most, step, POINTS[backend])) for call in own}
            keys = tuple(_key(call) for call in own) if operations else ()
            most = layer.break_even(weight) if reason else most
            share = _share(layer, weight) if operations else 1.0
            weights[factor_name(layer_name, weight)] = TimedWeight(describe(layer, weight), keys, step, most, share, reason)
            work |= operations
    timings = {key: stored[key] for key, operation in work.items() if key in stored and stored[key].ranks == operation.ranks}
    missing = [key for key in work if key not in timings]
    for key in track(missing, f"timing layers ({backend})", disable=not progress):
        timings[key] = time_layer(work[key], backend, threads, time_box)
        if path is not None:
            stored[key] = timings[key]
            _write(path, machine, stored)  # after each one: a stopped run has lost nothing
    dense_s, untimed = time_network(model, inputs, backend, threads, time_box)
    return LatencyTable(backend, threads, machine, timings, weights, margin, dense_s, untimed)


def default_cache() -> Path:
    """Return the folder for cached timings: ``$XDG_CACHE_HOME/spectrim``, or ``~/.cache/spectrim``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectrim"


def describe_machine(backend: Backend) -> dict[str, str]:
    """Return what decides how fast a layer runs: processor, cores, accelerator, versions."""
    found = {"system": f"{platform.system()} {platform.machine()}", "cpu": _processor(), "cores": str(os.cpu_count())}
    found |= {"torch": torch.__version__}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name()}
    if backend == "onnx":
        found |= {"onnxruntime": str(_onnxruntime().__version__)}
    return found


def describe(layer: FactorizedLayer, weight: str) -> str:
    """Return a layer's kind, settings, sizes, dtype and device as text; its rank does not matter."""
    factors = layer.factors_of(weight)
    out, in_ = factors.shape
    sizes = f"{factors.blocks}x{out}x{in_} {factors.dtype} {factors.U.device.type}".replace("torch.", "")
    return f"{layer.dense_kind.__name__}({layer.extra_repr()}) {weight} {sizes}"


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


def _most(own: Sequence[Call], factors: Factors) -> int:
    """Return the largest rank at which two operations take fewer multiply-accumulates than the dense one, over all calls."""
    dense, single = (sum(call.macs(rank) for call in own) for rank in (None, 1))
    return min(factors.full_rank, math.ceil(dense / single) - 1) if single else 0


def _untimed(layer: FactorizedLayer, weight: str, own: Sequence[Call], backend: Backend) -> str:
    if not own:
        return "it does not run on these inputs"
    if isinstance(layer, FactorizedEmbedding):
        return "a look-up is never faster as a pair; by parameters"
    if any(call.shape is None for call in own):
        return "query and key differ"
    if isinstance(layer, FactorizedRecurrent) and not weight.startswith("weight_ih") and backend != "eager":
        return "a pair on the hidden state is a loop in Python"
    if backend == "onnx":
        try:
            _onnx_model(_forms(own[0], 1)[1], _example(own[0], "meta"))
        except _NoFormError as error:
            return str(error)
    return ""


def _share(layer: Any, weight: str) -> float:
    """Return what part of the layer that is timed one weight is: an LSTM of one layer has two matrices or three."""
    if not isinstance(layer, FactorizedRecurrent):
        return 1.0
    end = weight.split("_", 2)[2]
    sizes = {name: math.prod(weight_shape(layer, name)) for name in layer.factors if name.split("_", 2)[2] == end}
    return sizes[weight] / sum(sizes.values())


# The cache: one JSON file for each machine, backend and number of threads


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cache_path(folder: Path, machine: Mapping[str, str], backend: Backend, threads: int) -> Path:
    text = json.dumps([FORMAT, dict(machine), backend, threads], sort_keys=True)
    return folder / f"latency-{backend}-{threads}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


FORMAT = 1


def _read(path: Path) -> dict[str, Timing]:
    """Return the cached timings; a file that cannot be read gives a warning and none."""
    if not path.exists():
        return {}
    try:
        return {key: _timing(entry) for key, entry in read_json(path)["timings"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path}: damaged, its layers are timed anew ({error!r})", stacklevel=3)
        return {}


def _write(path: Path, machine: Mapping[str, str], timings: Mapping[str, Timing]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {key: asdict(timing) for key, timing in timings.items()}
    write_json(path, {"machine": dict(machine), "timings": entries})  # another process may write it, too: the last one wins


def _timing(entry: Mapping[str, Any]) -> Timing:
    """Return a timing from JSON; raises a TypeError or ValueError for what is none."""
    timing = Timing(float(entry["dense_s"]), tuple(map(int, entry["ranks"])), tuple(map(float, entry["pair_s"])))
    if len(timing.ranks) != len(timing.pair_s) or not all(s > 0 for s in (timing.dense_s, *timing.pair_s)):
        raise ValueError("not a timing: as many ranks as seconds, all above 0")
    return timing
