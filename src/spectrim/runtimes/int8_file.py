"""The int8 file that ONNX Runtime's toolkit writes of a float network, and what became int8 in it."""

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from spectrim.runtimes.equalize import _session
from spectrim.runtimes.int8_network import WEIGHTS, _load, _Network, _save, _strip
from spectrim.runtimes.int8_settings import Int8

KEPT = "kept in float as asked"


DYNAMIC = ("MatMul", "Gemm", "LSTM", "Gather", "Attention")
"""What becomes int8 when ranges are taken at run time; for convolutions there is ``static``."""


class _Reader:
    """Gives the toolkit one batch after the other."""

    def __init__(self, feeds: Iterable[dict[str, NDArray[Any]]]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self.feeds, None)


def _write(network: _Network, file: Path, how: Int8, without: Sequence[str], only: str | None = None) -> None:
    """Let the toolkit write an int8 file without some layers, or with nothing but one."""
    toolkit = import_module("onnxruntime.quantization")
    nodes = [name for layer in without for name in network.layers[layer].nodes]
    common: dict[str, Any] = {
        "per_channel": True,
        "reduce_range": how.weight_bits == 7,
        "weight_type": toolkit.QuantType.QInt8,
        "nodes_to_exclude": [*nodes, *(f"{name}_MatMul" for name in nodes)],  # the name of what the toolkit makes of a Gemm
    }
    if only is not None:
        own = network.layers[only].nodes
        common["nodes_to_quantize"] = [*own, *(f"{name}_MatMul" for name in own)]
    try:
        if network.method == "dynamic":
            operators = [name for name in DYNAMIC if name != "Gemm"]
            toolkit.quantize_dynamic(str(network.file), str(file), op_types_to_quantize=operators, **common)
        else:
            method = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}[how.ranges]
            with redirect_stdout(io.StringIO()):  # the toolkit prints what it collects
                toolkit.quantize_static(
                    str(network.file), str(file), _Reader(network.feeds), activation_type=toolkit.QuantType.QUInt8,
                    calibrate_method=getattr(toolkit.CalibrationMethod, method), extra_options={"CalibPercentile": how.percentile},
                    **common,
                )  # fmt: skip
    except Exception as error:  # the toolkit raises anything
        raise network.blame(error, "ONNX Runtime's toolkit cannot quantize it") from error
    proto = _load(file)
    _strip(proto)
    del proto.graph.value_info[:]
    _save(proto, file)


def _states(network: _Network, file: Path, kept: Sequence[str]) -> dict[str, str]:
    """Return ``int8`` for each layer whose weights are, else why not."""
    graph = _load(file).graph
    nodes = {node.name: node for node in graph.node}
    float32 = import_module("onnx").TensorProto.FLOAT
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == float32}

    def in_float(name: str, operator: str) -> bool:
        node = nodes.get(name) or nodes.get(f"{name}_MatMul")
        return node is not None and node.op_type in WEIGHTS and node.input[WEIGHTS[operator]] in floats

    states = {}
    for name, layer in network.layers.items():
        if not any(in_float(node, layer.operator) for node in layer.nodes):
            states[name] = "int8"
        elif name in kept:
            states[name] = KEPT
        elif network.method == "dynamic" and layer.operator not in DYNAMIC:
            states[name] = f"{layer.operator} stays in float where ranges are dynamic"
        elif not _known(layer.operator, network.method):
            states[name] = f"ONNX Runtime has no int8 {layer.operator}"
        else:
            states[name] = f"ONNX Runtime left its {layer.operator} in float: the shape or range of its tensors is not known"
    return states


def _known(operator: str, method: str) -> bool:
    registry = import_module("onnxruntime.quantization.registry")
    return operator in (DYNAMIC if method == "dynamic" else {*registry.QDQRegistry, *registry.QLinearOpsRegistry})


def _operators(file: Path, folder: Path) -> dict[str, int]:
    """Return the operators of the graph that is run on this machine."""
    optimized = folder / "optimized.onnx"
    _session(str(file), optimized)
    return dict(Counter(str(node.op_type) for node in _load(optimized).graph.node).most_common())
