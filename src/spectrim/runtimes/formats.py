"""File formats of other runtimes: for each one function that writes it, one that opens it, one row in the tables."""

import io
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from spectrim.errors import ExportError, FormatError, SettingError
from spectrim.metrics.calls import call_model
from spectrim.runtimes.blame import _blame, _Place, _root, first_line, layer_of
from spectrim.runtimes.onnx_digest import seal, verify
from spectrim.runtimes.quiet import _quiet, _quiet_stderr, quietly
from spectrim.runtimes.tensors import _arguments, _tensors
from spectrim.tables import SUFFIXES, Format

TITLES = {"pt2": "torch.export", "onnx": "ONNX", "executorch": "ExecuTorch", "openvino": "OpenVINO"}


Runner = Callable[[Any], list[Tensor]]


def run_exported(path: str | Path, inputs: Any) -> Any:
    """Load a file in its own runtime, on the CPU, and call it once.

    A ``.pt2`` is read by `torch.export.load`, which may run code from the file: open only files that you trust.

    Args:
        path: a ``.pt2``, ``.onnx``, ``.pte`` or ``.xml``.
        inputs: as for `export`: a tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        The output: a tensor, or a tuple of them where there are several.

    Raises:
        FormatError: there is no such file, or its runtime cannot read it.
        SettingError: the file takes other inputs.
        ImportError: the format's package is not installed.
    """
    with _quiet():
        outputs = open_exported(path)(inputs)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def open_exported(path: str | Path, threads: int | None = None) -> Runner:
    """Load a file in its own runtime and return what calls it: inputs as for `run_exported`, a list of tensors as outputs.

    Args:
        path: a ``.pt2``, ``.onnx``, ``.pte`` or ``.xml``.
        threads: CPU threads; the runtime's own choice when omitted. A ``.pt2`` runs in torch and takes those of `torch.set_num_threads`;
            ExecuTorch has one pool for the process, which keeps its size.

    Raises:
        FormatError: there is no such file, or its runtime cannot read it.
        ImportError: the format's package is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(path, "no such file")
    format = _format_of(path, None)
    _require(format)
    try:
        with _quiet():
            return _READERS[format](path, threads)
    except ImportError:
        raise
    except Exception as error:  # each runtime has its own errors
        raise FormatError(path, f"{TITLES[format]} cannot read it: {first_line(error)}") from error


@dataclass(frozen=True)
class _Names:
    """Names of a file's inputs and outputs, in order."""

    inputs: list[str]
    outputs: list[str]


def _format_of(path: Path, format: Format | None) -> Format:
    if format is None:
        if path.suffix not in SUFFIXES:
            hint = "or pass format=" if path.suffix else "give the file a suffix"
            raise SettingError("export", "path", got=str(path), rule=f"a file with one of the suffixes {', '.join(SUFFIXES)}", hint=hint)
        return SUFFIXES[path.suffix]
    if format not in get_args(Format):
        raise SettingError("export", "format", got=format, rule=f"one of {', '.join(get_args(Format))}")
    if SUFFIXES.get(path.suffix) != format:
        suffix = next(suffix for suffix, known in SUFFIXES.items() if known == format)
        raise SettingError("export", "path", got=str(path), rule=f"a file with the suffix {suffix} for format={format!r}")
    return format


def _require(format: Format) -> None:
    """Raise an ImportError that names the extra to install."""
    needed: dict[Format, tuple[str, ...]] = {
        "pt2": (),
        "onnx": ("onnx", "onnxscript", "onnxruntime"),
        "executorch": ("executorch",),
        "openvino": ("openvino", "onnx", "onnxscript"),
    }
    missing = [name for name in needed[format] if find_spec(name) is None]
    if missing:
        raise ImportError(f"{TITLES[format]} needs {', '.join(missing)}: pip install 'spectrim[{format}]'")


# Formats: a writer and a reader for each


@dataclass(frozen=True)
class _Content:
    """What a file holds."""

    operators: dict[str, int]
    delegated: float | None = None


def _write_pt2(program: ExportedProgram, file: Path, names: _Names, half: bool) -> _Content:
    program.example_inputs = None  # they would be written, too
    content = io.BytesIO()  # a failed write to a file ends the interpreter
    torch.export.save(program, content)
    file.write_bytes(content.getbuffer())
    nodes = [node for node in program.graph.nodes if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)]
    return _Content(dict(Counter(str(node.target) for node in nodes)))


def _write_onnx(program: ExportedProgram, file: Path, names: _Names, half: bool) -> _Content:
    try:
        with quietly():
            made: Any = torch.onnx.export(
                program, dynamo=True, input_names=names.inputs, output_names=names.outputs, verbose=False, external_data=False
            )
    except torch.onnx.OnnxExporterError as error:
        place = _blame(error, nn.Module())
        problem = f"it has no ONNX form: {first_line(_root(error))}"
        raise ExportError("onnx", problem, operator=place.operator, layer=place.layer, hint=_OTHER) from error
    sizes = [size for node in program.graph.find_nodes(op="placeholder") for size in getattr(node.meta.get("val"), "shape", ())]
    if hasattr(made, "rename_axes"):  # older torch cannot, and leaves names like s77
        made.rename_axes({str(size): "batch" for size in sizes if isinstance(size, torch.SymInt)})
    made.save(file)
    seal(file)
    return _Content(dict(Counter(str(node.op_type) for node in made.model.graph)))


def _write_executorch(program: ExportedProgram, file: Path, names: _Names, half: bool) -> _Content:
    with quietly():
        exir = import_module("executorch.exir")
        xnnpack = import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        debug = import_module("executorch.devtools.backend_debug")
    try:
        with quietly():
            # inputs have no names in the file, so a second method returns them
            known = {INPUT_NAMES: ",".join(names.inputs)}
            edge = exir.to_edge_transform_and_lower(
                program,
                partitioner=[xnnpack.XnnpackPartitioner()],
                compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),  # what has a kernel is checked below
                constant_methods=known,
            )
            graph = edge.exported_program().graph
            delegation = debug.get_delegation_info(edge.exported_program().graph_module)
            made = edge.to_executorch()
    except Exception as error:  # its passes raise anything
        place = _blame(error, nn.Module())
        named = re.search(r"'(\w+::\w+)'", str(error))  # Missing out variants: {'mine::op'}
        if named and not place.operator:
            place = _Place(named[1], _layer_with(program.graph, named[1]))
        problem = f"cannot be lowered: {first_line(error)}"
        raise ExportError("executorch", problem, operator=place.operator, layer=place.layer, hint=_OTHER) from error
    kernels = _executorch().operator_registry.operator_names
    for entry in made.executorch_program.execution_plan[0].operators:
        operator = f"{entry.name}.{entry.overload}" if entry.overload else entry.name
        if operator not in kernels:
            problem = "XNNPACK does not run it, and the runtime has no portable kernel for it"
            raise ExportError("executorch", problem, operator=operator, layer=_layer_with(graph, entry.name), hint=_OTHER)
    with file.open("wb") as stream:
        made.write_to_file(stream)
    return _Content(*_delegated(delegation))


def _delegated(delegation: Any) -> tuple[dict[str, int], float]:
    """Return what XNNPACK leaves to the runtime's own kernels, and the share of the operators that it runs itself."""
    counts = {name: count for name, count in delegation.delegation_by_operator.items() if name not in ("getitem", "sym_size")}
    outside = {name: count.non_delegated for name, count in counts.items() if count.non_delegated}
    inside = sum(count.delegated for count in counts.values())
    return outside, inside / max(1, inside + sum(outside.values()))


def _layer_with(graph: fx.Graph, operator: str) -> str:
    """Return the layer of the first node whose operator has this name, without namespace and overload."""
    name = re.sub(r"^.*::", "", operator)
    nodes = (node for node in graph.nodes if node.op == "call_function" and name in str(node.target))
    return next((layer_of(node) for node in nodes), "")


def _write_openvino(program: ExportedProgram, file: Path, names: _Names, half: bool) -> _Content:
    """By way of ONNX, which keeps recurrent layers whole and the sizes known; OpenVINO's reader of exported programs does neither."""
    openvino = import_module("openvino")
    between = file.parent / "between" / "model.onnx"  # in the same folder of temporary files, which goes when this process dies, too
    between.parent.mkdir()
    try:
        _write_onnx(program, between, names, half)
    except ExportError as error:
        raise ExportError("openvino", error.problem, operator=error.operator, layer=error.layer, hint=error.hint) from error
    try:
        with quietly():
            made = openvino.convert_model(between)
            openvino.save_model(made, file, compress_to_fp16=half)
    except Exception as error:  # of its front end
        operator, layer = _onnx_node(between, str(error))
        problem = f"cannot be converted: {_conversion_problem(error)}"
        raise ExportError("openvino", problem, operator=operator, layer=layer, hint=_OTHER) from error
    return _Content(dict(Counter(operation.get_type_name() for operation in made.get_ops())))


def _conversion_problem(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line.lstrip("- ") for line in lines if "not support" in line or "No conversion rule" in line), first_line(error))


_OTHER = "write it with other operators, or choose another format"


_WRITERS: dict[Format, Callable[[ExportedProgram, Path, _Names, bool], _Content]] = {
    "pt2": _write_pt2,
    "onnx": _write_onnx,
    "executorch": _write_executorch,
    "openvino": _write_openvino,
}


def _open_pt2(path: Path, threads: int | None) -> Runner:
    with zipfile.ZipFile(path) as archive:  # torch does not look at its checksums
        if (part := archive.testzip()) is not None:
            raise ValueError(f"its part {part} is damaged")
    program = torch.export.load(path).module()

    def run(inputs: Any) -> list[Tensor]:
        with torch.no_grad():
            return [tensor for _, tensor in _tensors(call_model(program, inputs), "output")]

    return run


def _open_onnx(path: Path, threads: int | None) -> Runner:
    verify(path)
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(inputs: Any) -> list[Tensor]:
        feed = {name: array_of(tensor) for name, tensor in zip(names, in_order(path, inputs, names), strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    return run


INPUT_NAMES = "input_names"
"""Method of an ExecuTorch file that returns the names of its inputs, with commas between."""


def _executorch() -> Any:
    with quietly():
        return import_module("executorch.runtime").Runtime.get()


def _open_executorch(path: Path, threads: int | None) -> Runner:
    runtime = _executorch()
    with _quiet_stderr():
        if threads is not None:
            import_module("executorch.extension.pybindings.portable_lib")._unsafe_reset_threadpool(threads)
        program = runtime.load_program(str(path))
        method = program.load_method("forward")
    names = None
    if INPUT_NAMES in program.method_names:
        names = [name for name in program.load_method(INPUT_NAMES).execute([])[0].split(",") if name]

    def run(inputs: Any) -> list[Tensor]:
        given = [tensor.detach().cpu().contiguous() for tensor in in_order(path, inputs, names)]
        return [tensor.clone() for tensor in method.execute(given)]

    return run


def _open_openvino(path: Path, threads: int | None) -> Runner:
    openvino = import_module("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32"} | ({} if threads is None else {"INFERENCE_NUM_THREADS": threads})
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    names = [port.get_any_name() for port in compiled.inputs]
    request = compiled.create_infer_request()

    def run(inputs: Any) -> list[Tensor]:
        given = {index: array_of(tensor) for index, tensor in enumerate(in_order(path, inputs, names))}
        found = request.infer(given)
        return [torch.from_numpy(found[port].copy()) for port in compiled.outputs]

    return run


_READERS: dict[Format, Callable[[Path, int | None], Runner]] = {
    "pt2": _open_pt2,
    "onnx": _open_onnx,
    "executorch": _open_executorch,
    "openvino": _open_openvino,
}


def in_order(path: Path, inputs: Any, names: Sequence[str] | None) -> list[Tensor]:
    """Return the tensors among the inputs as a file wants them: a dict's by name, others by position."""
    args, kwargs = _arguments(inputs)
    given = [pair for value in args for pair in _tensors(value, "")] + [pair for k, v in kwargs.items() for pair in _tensors(v, k)]
    if names is None:
        return [tensor for _, tensor in given]
    if kwargs and {name for name, _ in given} >= set(names):
        return [dict(given)[name] for name in names]
    if len(given) != len(names):
        raise SettingError(
            "run_exported", "inputs", got=f"{len(given)} tensors", rule=f"the {len(names)} of {path.name}: {', '.join(names)}"
        )
    return [tensor for _, tensor in given]


def array_of(tensor: Tensor) -> Any:
    """Return a tensor as a NumPy array."""
    if tensor.dtype is torch.bfloat16:
        hint = "NumPy, which this runtime takes its inputs from, has no bfloat16: export model.float() or model.half()"
        raise SettingError("run_exported", "inputs", got=tensor.dtype, rule="of a dtype that NumPy has", hint=hint)
    return tensor.detach().cpu().contiguous().numpy()


def _onnx_node(file: Path, message: str) -> tuple[str, str]:
    """Return operator and layer of the node that a message of ONNX Runtime names; torch's exporter writes the layers into the file."""
    model = import_module("onnx").load(file, load_external_data=False)
    for node in sorted(model.graph.node, key=lambda node: -len(node.name)):
        if node.name and node.name in message:
            told = {entry.key: entry.value for entry in node.metadata_props}
            scopes = re.findall(r"'([^']*)'", told.get("pkg.torch.onnx.name_scopes", ""))
            return node.op_type, (scopes[-2] if len(scopes) > 1 else "").removeprefix("model").removeprefix(".")
    return "", ""
