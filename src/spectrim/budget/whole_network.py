"""Seconds of the whole dense network, as a latency table times its layers: in its backend, with its threads."""

import importlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spectrim.budget.stand_ins import Only
from spectrim.metrics.clock import compare_latency
from spectrim.surgery.merge import merge

ROUNDS = 5
"""Rounds of calls that a network is timed in."""


def time_network(model: nn.Module, inputs: Any, backend: str, threads: int, time_box: float) -> tuple[float | None, str]:
    """Time one call of the dense network.

    Args:
        model: factorized; what `merge` writes when no pair pays is timed.
        inputs: one batch.
        backend: of the table.
        threads: CPU threads.
        time_box: seconds for all calls, one second at most; compilation not included.

    Returns:
        The median in seconds and an empty text, or None and why the backend cannot run it.
    """
    network: Any = merge(model, latency=Only(()))
    for module in network.modules():
        module._forward_hooks.clear()  # observers of a model are neither timed nor called
    try:
        if backend == "onnx":
            network = _Exported(network, inputs, threads)
        elif backend == "compile":
            network = torch.compile(network, dynamic=False)
        times = compare_latency({"dense": network}, inputs, threads=threads, repeats=ROUNDS, min_time=min(1.0, time_box) / ROUNDS)
    except Exception as error:  # whatever an exporter or a compiler raises for a network that it cannot take
        if backend == "eager":
            raise
        lines = str(error).splitlines() or [""]
        return None, f"the dense network does not run in the backend {backend} ({type(error).__name__}: {lines[0]})"
    return times["dense"].median_s, ""


class _Exported(nn.Module):
    """A network in ONNX Runtime, for one batch."""

    def __init__(self, model: nn.Module, inputs: Any, threads: int) -> None:
        super().__init__()
        ort = importlib.import_module("onnxruntime")  # an extra; a table of this backend could not be made without it

        kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
        args = () if kwargs else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter
            program = torch.onnx.export(model.eval(), args, kwargs=kwargs, dynamo=True, verbose=False)
        assert program is not None
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        self.session = ort.InferenceSession(program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.feed = {given.name: tensor.cpu().numpy() for given, tensor in zip(self.session.get_inputs(), tensors, strict=True)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.session.run(None, self.feed)
