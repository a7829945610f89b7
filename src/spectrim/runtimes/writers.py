"""Writing the file formats of other runtimes, one function for each."""

import io
import re
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from spectrim.errors import ExportError
from spectrim.runtimes.blame import _blame, _Place, _root, first_line, layer_of
from spectrim.runtimes.file_digest import EMPTY, seal_file
from spectrim.runtimes.formats import DIGEST, INPUT_NAMES, _executorch, _Names
from spectrim.runtimes.onnx_digest import seal
from spectrim.runtimes.quiet import quietly
from spectrim.tables import Format


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
            known = {INPUT_NAMES: ",".join(names.inputs), DIGEST: EMPTY}
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
    seal_file(file)
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
            made.set_rt_info(EMPTY, ["spectrim", "sha256"])
            openvino.save_model(made, file, compress_to_fp16=half)
    except Exception as error:  # of its front end
        operator, layer = _onnx_node(between, str(error))
        problem = f"cannot be converted: {_conversion_problem(error)}"
        raise ExportError("openvino", problem, operator=operator, layer=layer, hint=_OTHER) from error
    seal_file(file, [file.with_suffix(".bin")])
    return _Content(dict(Counter(operation.get_type_name() for operation in made.get_ops())))


class _Named(nn.Module):
    """A program that is called by the names of its inputs, which a LiteRT file then keeps."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.program = program.module(check_guards=False)

    def forward(self, **tensors: Tensor) -> Any:
        """Call by position."""
        return self.program(*tensors.values())


def _write_litert(program: ExportedProgram, file: Path, names: _Names, half: bool) -> _Content:
    """Convert for the batch of the inputs: the converter takes no other."""
    args, _ = program.example_inputs or ((), {})
    try:
        with quietly(), redirect_stdout(io.StringIO()):
            given = dict(zip(names.inputs, args, strict=True))
            import_module("litert_torch").convert(_Named(program), sample_kwargs=given).export(str(file))
    except Exception as error:  # of jax and MLIR
        place = _blame(error, nn.Module())
        problem = f"cannot be converted: {first_line(error)}"
        raise ExportError("litert", problem, operator=place.operator, layer=place.layer, hint=_OTHER) from error
    schema = import_module("ai_edge_litert.schema_py_generated")
    content = schema.ModelT.InitFromPackedBuf(file.read_bytes(), 0)
    titles = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
    used = [content.operatorCodes[operator.opcodeIndex].builtinCode for graph in content.subgraphs for operator in graph.operators]
    return _Content(dict(Counter(titles[code] for code in used)))


def _conversion_problem(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line.lstrip("- ") for line in lines if "not support" in line or "No conversion rule" in line), first_line(error))


_OTHER = "write it with other operators, or choose another format"


_WRITERS: dict[Format, Callable[[ExportedProgram, Path, _Names, bool], _Content]] = {
    "pt2": _write_pt2,
    "onnx": _write_onnx,
    "executorch": _write_executorch,
    "openvino": _write_openvino,
    "litert": _write_litert,
}


def _onnx_node(file: Path, message: str) -> tuple[str, str]:
    """Return operator and layer of the node that a message of ONNX Runtime names; torch's exporter writes the layers into the file."""
    model = import_module("onnx").load(file, load_external_data=False)
    for node in sorted(model.graph.node, key=lambda node: -len(node.name)):
        if node.name and node.name in message:
            told = {entry.key: entry.value for entry in node.metadata_props}
            scopes = re.findall(r"'([^']*)'", told.get("pkg.torch.onnx.name_scopes", ""))
            return node.op_type, (scopes[-2] if len(scopes) > 1 else "").removeprefix("model").removeprefix(".")
    return "", ""
