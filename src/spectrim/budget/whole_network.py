"""Seconds of the whole dense network, as a latency table times its layers: in its backend, with its threads."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spectrim.budget.stand_ins import Only
from spectrim.metrics.clock import compare_latency
from spectrim.runtimes.quiet import quietly
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
    network: Any = unobserved(model)
    try:
        if backend == "onnx":
            network = Exported(network, inputs, threads)
        elif backend == "compile":
            network = torch.compile(network, dynamic=False)
        times = compare_latency({"dense": network}, inputs, threads=threads, repeats=ROUNDS, min_time=min(1.0, time_box) / ROUNDS)
    except Exception as error:  # whatever an exporter or a compiler raises for a network that it cannot take
        if backend == "eager":
            raise
        return None, why_untimed(backend, error)
    return times["dense"].median_s, ""


def unobserved(model: nn.Module) -> nn.Module:
    """Return the dense network of a factorized one, without hooks: observers of a model are neither timed nor called."""
    network = merge(model, latency=Only(()))
    for module in network.modules():
        module._forward_hooks.clear()
    return network


def why_untimed(backend: str, error: Exception) -> str:
    """Return in a sentence why the dense network has no seconds."""
    lines = str(error).splitlines() or [""]
    return f"the dense network does not run in the backend {backend} ({type(error).__name__}: {lines[0]})"


def as_onnx(model: nn.Module, inputs: Any) -> tuple[bytes, dict[str, Any]]:
    """Return a network as an ONNX model for one batch, and what it is fed: arrays by name."""
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    args = () if kwargs else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    with quietly():
        program = torch.onnx.export(model.eval(), args, kwargs=kwargs, dynamo=True, verbose=False)
    assert program is not None
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    names = [given.name for given in program.model_proto.graph.input]
    return program.model_proto.SerializeToString(), {name: one.cpu().numpy() for name, one in zip(names, tensors, strict=True)}


class Exported(nn.Module):
    """A network in ONNX Runtime, for one batch.

    Args:
        model: a network.
        inputs: the batch that it is always run on.
        threads: CPU threads.
    """

    def __init__(self, model: nn.Module, inputs: Any, threads: int) -> None:
        super().__init__()
        ort = importlib.import_module("onnxruntime")  # an extra; a table of this backend could not be made without it

        graph, self.feed = as_onnx(model, inputs)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the session; arguments are ignored."""
        return self.session.run(None, self.feed)
