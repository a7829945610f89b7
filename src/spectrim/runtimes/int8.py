"""int8 on top of low rank: a float network becomes an ONNX file with 8-bit weights and activations, by ONNX Runtime's own toolkit.

Added to the toolkit are: names of layers, a report of what became int8 and what did not, one exact change of scale inside low-rank pairs,
and a check that the written file runs.
"""

import ast
import io
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spectrim.checks import check, unwrapped
from spectrim.errors import ExportError, FormatError, LayerError, SettingError
from spectrim.files import new_files
from spectrim.metrics.evaluate import evaluate
from spectrim.metrics.inputs import first_examples, inputs_of
from spectrim.metrics.table import markdown_table
from spectrim.protocols import LayerFilter
from spectrim.runtimes.blame import first_line
from spectrim.runtimes.equalize import _session, equalize_pairs
from spectrim.runtimes.export import export
from spectrim.runtimes.formats import array_of, in_order, open_exported
from spectrim.runtimes.onnx_digest import seal, unseal, verify
from spectrim.runtimes.quiet import quietly
from spectrim.runtimes.tensors import compare_outputs

Method = Literal["auto", "static", "dynamic"]


Ranges = Literal["minmax", "percentile", "entropy"]


KEPT = "kept in float as asked"


WEIGHTS = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "LSTM": 1, "GRU": 1, "RNN": 1, "Gather": 0}
"""Which input of an operator is the weight of a layer."""


DYNAMIC = ("MatMul", "Gemm", "LSTM", "Gather", "Attention")
"""What becomes int8 when ranges are taken at run time; for convolutions there is ``static``."""


SEQUENTIAL = frozenset({"LSTM", "GRU", "RNN", "Loop", "Scan", "Softmax", "LayerNormalization", "Attention", "MultiHeadAttention"})
"""Operators of recurrent networks and transformers, whose ranges differ too much between examples to be fixed."""


@dataclass(frozen=True)
class Int8:
    """How a network becomes int8.

    Attributes:
        method: ``static`` fixes the range of each activation on calibration data; ``dynamic`` computes it in each call, for linear
            layers, LSTMs and embeddings only. ``auto`` is static for convolutional networks, and dynamic where nothing convolves or where
            recurrence or attention is in the graph.
        ranges: of activations, for ``static``: ``minmax`` covers all observed values, ``percentile`` all but the rarest, ``entropy``
            minimizes the loss of information. The last two keep the observed values in memory.
        percentile: share of the values that is kept, in percent, in (50, 100).
        weight_bits: 7 or 8. x86 processors without VNNI add two products of an 8-bit weight in 16 bits, which can overflow: there 7 bits
            are more accurate than 8. Weights take a byte each in both.
        equalize: give all channels between the two layers of a low-rank pair the same range, see `equalize_pairs`.
        examples: number of calibration examples, >= 1.

    Raises:
        SettingError: a setting is outside its range.

    Examples:
        >>> Int8(ranges="percentile", weight_bits=8).percentile
        99.999
    """

    method: Method = "auto"
    ranges: Ranges = "minmax"
    percentile: float = 99.999
    weight_bits: Literal[7, 8] = 7
    equalize: bool = True
    examples: int = 256

    def __post_init__(self) -> None:
        for name, allowed in (("method", get_args(Method)), ("ranges", get_args(Ranges)), ("weight_bits", (7, 8))):
            if getattr(self, name) not in allowed:
                raise SettingError("Int8", name, got=getattr(self, name), rule=f"one of {', '.join(map(str, allowed))}")
        if not 50 < self.percentile < 100:
            raise SettingError("Int8", "percentile", got=self.percentile, rule="in (50, 100)", hint="for all values write ranges='minmax'")
        if self.examples < 1:
            raise SettingError("Int8", "examples", got=self.examples, rule=">= 1")


@dataclass(frozen=True)
class Quantized:
    """An int8 file, and its difference to the float network.

    Attributes:
        path: of the file.
        method: ``static`` or ``dynamic``.
        size_bytes: of the file.
        float_bytes: of the same network in float, as an ONNX file without the exporter's notes, as the int8 file is.
        difference: largest difference of the outputs on the calibration examples, as a fraction of the output's largest magnitude.
        error: root mean square of the difference over that of the outputs, over all calibration examples and outputs.
        layers: each layer that has a weight: ``int8``, or why it stayed in float.
        operators: how often each operator stands in the graph that ONNX Runtime makes of the file on this machine; names with ``Q`` or
            ``Integer`` in them compute in int8.
        equalized: the low-rank pairs whose middle was rescaled, by the name of their second layer.
    """

    path: Path
    method: str
    size_bytes: int
    float_bytes: int
    difference: float
    error: float
    layers: dict[str, str]
    operators: dict[str, int]
    equalized: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that `json.dumps` takes."""
        return asdict(self) | {"path": str(self.path)}

    def summary(self) -> str:
        """Return a table of what was written, as text; layers in float are listed with their reasons."""
        done = sum(state == "int8" for state in self.layers.values())
        rows = [
            ["method", self.method],
            ["size", f"{self.size_bytes:,} B ({self.float_bytes / self.size_bytes:.2f}x smaller than float)"],
            ["layers in int8", f"{done} of {len(self.layers)}"],
            ["error, root mean square", f"{100 * self.error:.2f} %"],
            ["error, largest", f"{100 * self.difference:.2f} %"],
        ]
        return markdown_table(rows + [[f"float: {name}", state] for name, state in self.layers.items() if state != "int8"])


def quantize(
    model: nn.Module | str | Path,
    data: Iterable[Any],
    path: str | Path,
    how: Int8 | None = None,
    *,
    keep: LayerFilter | None = None,
    tolerance: float | None = None,
) -> Quantized:
    """Write a network as an int8 ONNX file; it is run and compared with the float network before it is kept.

    Weights are symmetric with one scale per output channel, activations one scale and one zero point per tensor. BatchNorm is folded into
    the layer before it. A factorized model is merged first; both layers of a pair become int8, and so do the activations between them.

    Args:
        model: dense, factorized or merged, which is left untouched; or a float ONNX file.
        data: training batches, ``(inputs, target)`` or bare inputs. The first ones are for calibration and for the comparison of outputs.
        path: of the file, with the suffix ``.onnx``.
        how: see `Int8`; its defaults when omitted.
        keep: layers that stay in float, by name in the merged network; a pair's name selects both of its layers. See `sensitivity`.
        tolerance: largest `Quantized.error` allowed, above 0; None allows any.

    Returns:
        The file and its difference to float.

    Raises:
        ExportError: nothing in the network can become int8, the toolkit fails, or the error is above `tolerance`; it names the operator
            and the layer where they are known. No file is written then.
        LayerError: `keep` selects no layer.
        SettingError: an argument is outside its range, or `data` is empty.
        FormatError: `model` is a file that is not there or not ONNX.
        ImportError: onnx or onnxruntime is not installed.

    Source: Jacob et al., arXiv 1712.05877 (integer arithmetic); https://onnxruntime.ai, "Quantize ONNX models".
    """
    check("quantize", network=model, batches_again=data, path=path, keep=keep, tolerance=tolerance)
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    how, path = how or Int8(), Path(path)
    if path.suffix != ".onnx":
        raise SettingError("quantize", "path", got=str(path), rule="a file with the suffix .onnx")
    if tolerance is not None and not tolerance > 0:
        raise SettingError("quantize", "tolerance", got=tolerance, rule="above 0")
    with new_files(path) as made, quietly():
        folder, file = made / "between", made / path.name
        folder.mkdir()
        network = _prepare(model, data, folder, how)
        kept = _kept(model, network, keep)
        _write(network, file, how, without=kept)
        states = _states(network, file, kept)
        if "int8" not in states.values():
            raise ExportError("int8", "nothing became int8: " + "; ".join(f"'{name}' {state}" for name, state in states.items()))
        difference, error = network.compare(file)
        if tolerance is not None and not error <= tolerance:
            hint = "see sensitivity() for the layers to keep in float, or try other ranges"
            raise ExportError("int8", f"its error, {error:.3g}, is above the tolerance, {tolerance:.3g}", hint=hint)
        operators = _operators(file, folder)
        seal(file)
        size, plain = file.stat().st_size, network.file.stat().st_size
    return Quantized(path, network.method, size, plain, difference, error, states, operators, network.equalized)


def sensitivity(model: nn.Module | str | Path, data: Iterable[Any], how: Int8 | None = None) -> dict[str, float]:
    """Return for each layer the error of the network's outputs when that layer alone is int8, the largest first.

    Each layer takes one quantization and one pass over the calibration examples: some tenths of a second for a small network.

    Args:
        model: as for `quantize`.
        data: as for `quantize`; a few dozen examples suffice.
        how: see `Int8`; its defaults when omitted.

    Returns:
        Layer name to root mean square of the difference over that of the outputs. To keep the three worst in float:
        ``worst = list(sensitivity(model, data))[:3]``, then ``quantize(model, data, path, keep=match(*worst))``.

    Raises:
        ExportError, SettingError, FormatError, ImportError: as `quantize`.
    """
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory(suffix=".tmp") as folder, quietly():
        network = _prepare(model, data, Path(folder), how or Int8())
        for layer in network.layers:
            file = Path(folder) / "one.onnx"
            _write(network, file, how or Int8(), without=[other for other in network.layers if other != layer], only=layer)
            errors[layer] = network.compare(file)[1]
    return dict(sorted(errors.items(), key=lambda entry: -entry[1]))


def evaluate_exported(
    path: str | Path, data: Iterable[Any], loss: Callable[[Any, Any], Tensor], *, threads: int | None = None
) -> dict[str, float]:
    """Compute loss and accuracy of a file in its own runtime, as `evaluate` does for a model.

    Args:
        path: ONNX, int8 or float, or another format that `run_exported` reads.
        data: batches ``(inputs, target)``, see `evaluate`.
        loss: called as ``loss(output, target)``, gives the mean over the targets.
        threads: CPU threads of the runtime; its own choice when omitted.

    Raises:
        FormatError: the file is missing or cannot be read.
        SettingError: `data` does not hold such batches.
    """
    return evaluate(_Runtime(open_exported(path, threads)), data, loss)


class _Runtime(nn.Module):
    """A file in its own runtime, called like a model."""

    def __init__(self, run: Callable[[Any], list[Tensor]]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output, or a tuple of them."""
        outputs = self.run(kwargs or args)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


# The float network


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
        raise ImportError(f"int8 needs {', '.join(missing)}: pip install 'spectrim[onnx]'")


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


def _kept(model: nn.Module | str | Path, network: _Network, keep: LayerFilter | None) -> list[str]:
    """Return the layers that `keep` selects, by their own name or that of a module around them."""
    if keep is None:
        return []
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}

    def selected(layer: str) -> bool:
        parts = layer.split(".")
        return any(keep(name, modules.get(name, nn.Identity())) for name in (".".join(parts[:end]) for end in range(1, len(parts) + 1)))

    found = [layer for layer in network.layers if selected(layer)]
    if not found:
        raise LayerError("keep", "selects no layer", hint=f"layers are: {', '.join(list(network.layers)[:12])}")
    return found


# The int8 file


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
