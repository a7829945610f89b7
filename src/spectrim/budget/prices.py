"""What the network costs at each rank, in each unit that a budget can limit."""

import importlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spectrim.budget.costs import calls, rank_costs
from spectrim.budget.latency_table import LatencyTable, _key
from spectrim.errors import SettingError
from spectrim.layers import factor_name, named_factors, named_layers
from spectrim.metrics.clock import compare_latency
from spectrim.metrics.inputs import batch_size_of
from spectrim.metrics.macs import count_macs
from spectrim.metrics.measurement import measure
from spectrim.protocols import Latencies
from spectrim.surgery.merge import merge


@dataclass(frozen=True)
class _Cost:
    """What the network costs in one unit.

    Attributes:
        weights: of each factorized weight at every rank from 1.
        dense: of all of them, dense.
        fixed: of everything else.
    """

    weights: Mapping[str, Sequence[float]]
    dense: float
    fixed: float

    @property
    def whole(self) -> float:
        """Of the dense network."""
        return self.fixed + self.dense


def _costs(model: nn.Module, kinds: set[str], inputs: Any, latency: Latencies | None) -> dict[str, _Cost]:
    """Return costs by kind: ``macs`` of one example, ``params``, ``size`` in bytes, ``latency`` in seconds of a call."""
    if not kinds:
        return {}
    if "latency" in kinds:
        _check_table(model, inputs, latency)
    by_name, merged = rank_costs(model, inputs, latency), merge(model, latency=latency)
    bytes_each = {name: factors.dtype.itemsize for name, factors in named_factors(model)}
    found = {}
    if "macs" in kinds:
        batch = batch_size_of(inputs, model=model, unknown=1)
        macs = {name: cost.macs for name, cost in by_name.items()}
        found["macs"] = _counted(macs, sum(cost.dense_macs for cost in by_name.values()), count_macs(merged, inputs, batch_size=batch))
    if "params" in kinds:
        params = {name: [float(count) for count in cost.params] for name, cost in by_name.items()}
        dense = float(sum(cost.dense_params for cost in by_name.values()))
        found["params"] = _counted(params, dense, sum(p.numel() for p in merged.parameters()))
    if "size" in kinds:
        size = {name: [float(count * bytes_each[name]) for count in cost.params] for name, cost in by_name.items()}
        dense = float(sum(cost.dense_params * bytes_each[name] for name, cost in by_name.items()))
        found["size"] = _counted(size, dense, measure(merged, latency=False).size_bytes)
    if "latency" in kinds:
        seconds = {name: cost.seconds or (0.0,) * len(cost.macs) for name, cost in by_name.items()}  # untimed ones are of the rest
        dense = sum(cost.dense_seconds or 0.0 for cost in by_name.values() if cost.seconds)
        found["latency"] = _Cost(seconds, dense, max(0.0, _dense_seconds(model, inputs, latency) - dense))
    return found


def _counted(weights: Mapping[str, Sequence[float]], dense: float, present: int) -> _Cost:
    """Return a cost whose fixed part is what the present network has beyond its factorized weights."""
    return _Cost(weights, float(dense), present - sum(ranks[-1] for ranks in weights.values()))


def _check_table(model: nn.Module, inputs: Any, latency: Latencies | None) -> None:
    """Raise a SettingError unless there is a latency table, made with such inputs."""
    if latency is None:
        hint = "table = latency_table(model, inputs) makes one; give merge the same"
        raise SettingError(
            "allocate", "latency", got=None, rule="a latency table for Budget(latency=...) and Budget(latency_s=...)", hint=hint
        )
    if not isinstance(latency, LatencyTable):
        return
    names = {(id(layer), weight): factor_name(name, weight) for name, layer in named_layers(model) for weight in layer.factors}
    for call in calls(model, inputs):
        timed = latency.weights.get(names[id(call.layer), call.weight])
        if timed and timed.calls and _key(call) not in timed.calls:
            hint = f"it timed {timed.calls[0]}; here it is {_key(call)}"
            raise SettingError("allocate", "inputs", got="another batch", rule="the batch that the latency table was made with", hint=hint)


class _AllDense:
    """Stands for a latency table by which no pair is ever faster, so that `merge` writes the dense network."""

    def limits(self, model: nn.Module) -> dict[tuple[int, str], int]:
        return {(id(layer), weight): 0 for _, layer in named_layers(model) for weight in layer.factors}

    def seconds(self, name: str, rank: int | None) -> float | None:
        return None

    def multiple(self, name: str) -> int:
        return 1

    def verdict(self, name: str, rank: int) -> str:
        return "merges to one dense layer"


def _dense_seconds(model: nn.Module, inputs: Any, latency: Any) -> float:
    """Time one call of the dense network as the table timed its layers: in its backend, with its threads."""
    dense: Any = merge(model, latency=_AllDense())
    backend, threads = getattr(latency, "backend", "eager"), getattr(latency, "threads", 1)
    if backend == "onnx":
        dense = _Exported(dense, inputs, threads)
    elif backend == "compile":
        dense = torch.compile(dense, dynamic=False)
    return compare_latency({"dense": dense}, inputs, threads=threads)["dense"].median_s


class _Exported(nn.Module):
    """A network in ONNX Runtime, for one batch."""

    def __init__(self, model: nn.Module, inputs: Any, threads: int) -> None:
        super().__init__()
        ort = importlib.import_module("onnxruntime")  # an extra; a table of this backend could not have been made without it

        kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
        args = () if kwargs else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            program = torch.onnx.export(model.eval(), args, kwargs=kwargs, dynamo=True, verbose=False)
        assert program is not None
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        self.session = ort.InferenceSession(program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.feed = {given.name: tensor.cpu().numpy() for given, tensor in zip(self.session.get_inputs(), tensors, strict=True)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.session.run(None, self.feed)
