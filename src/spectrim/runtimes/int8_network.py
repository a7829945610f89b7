"""The float network that becomes int8: optimized, its layers named, pairs equalized, run on the calibration data."""

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spectrim.errors import ExportError, FormatError, SettingError
from spectrim.metrics.inputs import first_examples, inputs_of
from spectrim.runtimes.blame import first_line
from spectrim.runtimes.equalize import _session, equalize_pairs
from spectrim.runtimes.export import export
from spectrim.runtimes.int8_settings import Int8
from spectrim.runtimes.onnx_digest import unseal, verify
from spectrim.runtimes.readers import array_of, in_order
from spectrim.runtimes.tensors import compare_outputs

WEIGHTS = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "LSTM": 1, "GRU": 1, "RNN": 1, "Gather": 0}
"""Which input of an operator is the weight of a layer."""


SEQUENTIAL = frozenset({"LSTM", "GRU", "RNN", "Loop", "Scan", "Softmax", "LayerNormalization", "Attention", "MultiHeadAttention"})
"""Operators of recurrent networks and transformers, whose ranges differ too much between examples to be fixed."""


@dataclass(frozen=True)
class _Layer:
    """The nodes of a layer that hold weights, by name, and their operator."""

    operator: str
    nodes: list[str]


@dataclass(frozen=True)
class _Network:
    """A float network ready for the toolkit: optimized, shapes inferred, pairs equalized; with its calibration data and outputs."""

    file: Path
    method: str
    layers: dict[str, _Layer]
    names: dict[str, str]
    feeds: list[dict[str, NDArray[Any]]]
    expected: list[list[Tensor]]
    equalized: list[str]

    def compare(self, file: Path) -> tuple[float, float]:
        """Return the largest difference and the root mean square error of an int8 file on the calibration data."""
        try:
            found = _run(file, self.feeds)
        except Exception as error:  # of the runtime
            raise self.blame(error, "ONNX Runtime does not run the int8 file") from error
        worst, squares, power = 0.0, 0.0, 0.0
        for ours, theirs in zip(found, self.expected, strict=True):
            worst = max(worst, compare_outputs(ours, theirs))
            squares += sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs, strict=True))
            power += sum(float(b.double().square().sum()) for b in theirs)
        return worst, (squares / max(power, torch.finfo(torch.float64).tiny)) ** 0.5

    def blame(self, error: BaseException, problem: str) -> ExportError:
        """Name the operator and the layer whose node or tensor an error speaks of."""
        text = str(error)
        operators = {node.name: str(node.op_type) for node in _load(self.file).graph.node}
        named = [name for name in self.names if name in text]
        place = max(named, key=len, default="")
        hint = "keep that layer in float: keep=match(NAME)" if place else ""
        return ExportError(
            "int8", f"{problem}: {first_line(error)}", operator=operators.get(place, ""), layer=self.names.get(place, ""), hint=hint
        )


def _prepare(model: nn.Module | str | Path, data: Iterable[Any], folder: Path, how: Int8) -> _Network:
    """Export, optimize, name the layers, choose the method, equalize, and run the float network once."""
    _require()
    batches = [inputs_of(batch) for batch in first_examples(data, how.examples)]
    if not batches:
        raise SettingError("quantize", "data", got=f"nothing from {type(data).__name__}", rule="at least one batch")
    source = Path(model) if isinstance(model, str | Path) else export(model, batches[0], folder / "exported.onnx").path
    if not source.is_file():
        raise FormatError(source, "no such file")
    verify(source)
    proto = _load(source)
    names = _names(proto.graph)
    _check_weights(proto.graph, names)
    file = folder / "float.onnx"
    _optimize(source, file)
    proto = _load(file)
    names |= _names(proto.graph)  # nodes changed by the optimizer keep their notes
    _strip(proto)
    layers = _layers(proto.graph, names)
    feeds = _feeds(source, batches)
    equalized = equalize_pairs(proto, feeds) if how.equalize else []
    _save(proto, file)
    method = how.method if how.method != "auto" else _method(proto.graph)
    expected = _run(file, feeds)
    if not all(part.isfinite().all() for parts in expected for part in parts if part.is_floating_point()):
        raise ExportError("int8", "the float network gives NaN or infinite values on the calibration data")
    return _Network(file, method, layers, names, feeds, expected, [names.get(node, node) for node in equalized])


def _require() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(f"int8 needs {', '.join(missing)}: pip install {' '.join(missing)}, or install the extra 'onnx'")


def _load(path: Path) -> Any:
    try:
        return import_module("onnx").load(str(path))
    except Exception as error:  # of protobuf
        raise FormatError(path, f"is not an ONNX file: {first_line(error)}") from error


def _save(proto: Any, path: Path) -> None:
    unseal(proto)
    import_module("onnx").save(proto, str(path))


def _optimize(source: Path, file: Path) -> None:
    """Fold constants and BatchNorm, and infer shapes; symbolic ones where the toolkit can."""
    process = import_module("onnxruntime.quantization.shape_inference").quant_pre_process
    try:
        process(str(source), str(file))
    except Exception:  # its symbolic inference does not know every operator, and raises various errors
        try:
            process(str(source), str(file), skip_symbolic_shape=True)
        except Exception as error:
            raise ExportError("int8", f"ONNX Runtime cannot optimize the float network: {first_line(error)}") from error


def _check_weights(graph: Any, names: Mapping[str, str]) -> None:
    """Refuse half precision and values that are not finite, by the layer that holds them."""
    onnx = import_module("onnx")
    half = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for tensor in (tensors[name] for name in node.input if name in tensors):
            place = {"operator": node.op_type, "layer": names.get(node.name, "")}
            if tensor.data_type in half:
                raise ExportError("int8", "its weights are in half precision", **place, hint="quantize model.float()")
            real = node.op_type in WEIGHTS and tensor.data_type == onnx.TensorProto.FLOAT
            if real and not np.isfinite(onnx.numpy_helper.to_array(tensor)).all():
                raise ExportError("int8", "its weights hold NaN or infinite values", **place, hint="load an undamaged checkpoint")


def _names(graph: Any) -> dict[str, str]:
    """Return the layer of each node, by the node's name and by those of its outputs, from the notes of torch's exporter."""
    found: dict[str, str] = {}
    for node in graph.node:
        notes = {entry.key.rpartition(".")[2]: entry.value for entry in node.metadata_props}
        scopes = ast.literal_eval(notes.get("name_scopes", "[]"))
        layer = scopes[-2] if len(scopes) > 1 else ""
        if "batch_norm" in "".join(scopes[-1:]) and node.op_type in WEIGHTS:  # folded: the notes are BatchNorm's, the weight the layer's
            layer = node.input[1].removesuffix(".weight")
        if "spectrim.runtimes.trace._Flat" in notes.get("class_hierarchy", ""):
            layer = layer.removeprefix("model").removeprefix(".")
        if layer and not layer.startswith("_"):
            found |= dict.fromkeys([node.name, *(name for name in node.output if name)], layer)
    return found


def _strip(proto: Any) -> None:
    """Drop the exporter's notes: names of layers, and lines and paths of the source code."""
    graph = proto.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph):
        del part.metadata_props[:]
        part.ClearField("doc_string")


def _layers(graph: Any, names: Mapping[str, str]) -> dict[str, _Layer]:
    """Return the layers that hold matrices or kernels; one without a name goes by its node's."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    layers: dict[str, _Layer] = {}
    for node in graph.node:
        index = WEIGHTS.get(node.op_type)
        weight = None if index is None or len(node.input) <= index else node.input[index]
        if weight is None or len(shapes.get(weight, ())) < 2:
            continue
        name = next((names[key] for key in (node.name, *node.output) if key in names), node.name)
        layers.setdefault(name, _Layer(node.op_type, [])).nodes.append(node.name)
    return layers


def _method(graph: Any) -> str:
    operators = {node.op_type for node in graph.node}
    return "static" if operators & {"Conv", "ConvTranspose"} and not operators & SEQUENTIAL else "dynamic"


def _feeds(file: Path, batches: Sequence[Any]) -> list[dict[str, NDArray[Any]]]:
    graph = _load(file).graph
    initial = {tensor.name for tensor in graph.initializer}
    names = [entry.name for entry in graph.input if entry.name not in initial]
    return [{name: array_of(tensor) for name, tensor in zip(names, in_order(file, inputs, names), strict=True)} for inputs in batches]


def _run(file: Path, feeds: Iterable[Mapping[str, NDArray[Any]]]) -> list[list[Tensor]]:
    session = _session(str(file))
    return [[torch.from_numpy(array) for array in session.run(None, dict(feed))] for feed in feeds]
