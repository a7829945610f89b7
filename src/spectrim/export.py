"""Files for other runtimes: `torch.export`, ONNX, ExecuTorch and OpenVINO, each proved equal to the model before it is written.

What one format needs stands in three functions side by side: one that writes it, one that opens it, one row in `_WRITERS` and `_READERS`.
"""

import inspect
import io
import linecache
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from spectrim.errors import ExportError, FormatError, SettingError
from spectrim.factorize import merge
from spectrim.layers import named_layers
from spectrim.measure import Latency, batch_size_of, call_model, compare_latency, markdown_table
from spectrim.surgery import duplicate

Format = Literal["pt2", "onnx", "executorch", "openvino"]
SUFFIXES: dict[str, Format] = {".pt2": "pt2", ".onnx": "onnx", ".pte": "executorch", ".xml": "openvino"}
TITLES = {"pt2": "torch.export", "onnx": "ONNX", "executorch": "ExecuTorch", "openvino": "OpenVINO"}

TOLERANCE = 1e-4
"""Largest difference allowed in float32, as a fraction of the output's largest magnitude: other kernels add in another order."""

Runner = Callable[[Any], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what it was proved by.

    Attributes:
        path: of the file; OpenVINO writes its weights beside it, ``.bin``, and ONNX those above 2 GB, ``.onnx.data``.
        format: ``pt2``, ``onnx``, ``executorch`` or ``openvino``.
        size_bytes: of all files together.
        difference: largest difference to the model's outputs, over all outputs and `batches`, as a fraction of the output's largest
            magnitude.
        tolerance: what was allowed.
        batches: batch sizes that were compared.
        operators: how often each operator stands in the file; for ExecuTorch, in what XNNPACK does not run.
        delegated: for ExecuTorch, share of the operators that XNNPACK runs, in [0, 1].
        latency: of the file in its own runtime, where asked for.
        eager: of the model in torch, timed in turns with it.
    """

    path: Path
    format: Format
    size_bytes: int
    difference: float
    tolerance: float
    batches: tuple[int, ...]
    operators: dict[str, int] = field(default_factory=dict)
    delegated: float | None = None
    latency: Latency | None = None
    eager: Latency | None = None

    def summary(self) -> str:
        """Return a table of the file, as text."""
        rows = [
            ["file", str(self.path)],
            ["format", TITLES[self.format]],
            ["size", f"{self.size_bytes:,} B"],
            ["largest difference", f"{self.difference:.2g} (tolerance {self.tolerance:.2g}, batch {', '.join(map(str, self.batches))})"],
        ]
        if self.delegated is not None:
            outside = ", ".join(sorted(self.operators))
            rows.append(["run by XNNPACK", f"{100 * self.delegated:.0f} % of the operators" + (f"; not: {outside}" if outside else "")])
        for name, timed in (("latency", self.latency), ("latency in torch", self.eager)):
            if timed is not None:
                spread = f"IQR {1e3 * timed.iqr_s:,.3f}, batch {timed.batch}, {timed.threads} thread{'' if timed.threads == 1 else 's'}"
                rows.append([name, f"{1e3 * timed.median_s:,.3f} ms ({spread})"])
        return markdown_table(rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that `json.dumps` takes."""
        return asdict(self) | {"path": str(self.path)}


def export(
    model: nn.Module,
    inputs: Any,
    path: str | Path,
    format: Format | None = None,
    *,
    dynamic_batch: bool = True,
    max_batch: int = 8,
    tolerance: float | None = None,
    half_weights: bool = False,
    latency: bool = False,
    threads: int = 1,
) -> Exported:
    """Write a model for another runtime; the file is loaded there and compared with the model before it gets its name.

    What is written is a copy in eval mode, on the CPU; a factorized model is merged first. Compared are the outputs on `inputs`, on one
    example, and on a batch of another size made of the same examples. Outputs are the tensors among what the model returns, in order; a
    dict of arguments keeps its keys as the names of the inputs. A recurrent layer with low-rank hidden projections is a loop over time, so
    the file is for sequences as long as those of `inputs`.

    Args:
        model: any module; it is left untouched. Its dtype is kept.
        inputs: one batch: a tensor, a tuple of arguments or a dict of keyword arguments. Values that are not tensors become part of the
            file, and so does every size but the batch.
        path: of the file, in a folder that exists or can be made.
        format: ``pt2`` (`torch.export`), ``onnx``, ``executorch`` (with XNNPACK) or ``openvino``; by the suffix when omitted: ``.pt2``,
            ``.onnx``, ``.pte``, ``.xml``.
        dynamic_batch: let the leading dimension of each tensor that holds the batch be of any size, else the one of `inputs`.
        max_batch: largest batch that an ExecuTorch file takes, at least the one of `inputs`: its memory is laid out for it. Other formats
            have no limit.
        tolerance: largest difference allowed, as a fraction of the output's largest magnitude, above 0; when omitted `TOLERANCE`, and
            8 steps of the outputs' dtype where that is half precision.
        half_weights: store OpenVINO's weights in float16: half the size; the default tolerance is then 8 steps of float16.
        latency: time the file and the model in turns (about two seconds), on `inputs`.
        threads: CPU threads of that timing, at least 1.

    Returns:
        What was written, and how far it is from the model.

    Raises:
        ExportError: the model cannot be written in this format, refuses a dynamic batch, or its file computes something else; it names
            the operator and the layer where they are known.
        SettingError: an argument is outside its range.
        ImportError: the format's package is not installed.

    Examples:
        >>> made = export(nn.Linear(4, 2), torch.randn(3, 4), Path(tempfile.mkdtemp()) / "linear.pt2")
        >>> made.batches, made.difference <= made.tolerance
        ((1, 3, 4), True)
        >>> run_exported(made.path, torch.zeros(5, 4)).shape
        torch.Size([5, 2])
    """
    path = Path(path)
    format = _format_of(path, format)
    batch = batch_size_of(inputs)
    if max_batch < 1 or (format == "executorch" and dynamic_batch and max_batch < batch):
        raise SettingError("export", "max_batch", got=max_batch, rule=f"at least the batch of the inputs ({batch})")
    if tolerance is not None and not tolerance > 0:
        raise SettingError("export", "tolerance", got=tolerance, rule="above 0")
    if threads < 1:
        raise SettingError("export", "threads", got=threads, rule="at least 1")
    _require(format)
    reference = duplicate(model).to("cpu").eval().requires_grad_(False)
    network = merge(reference) if next(named_layers(reference), None) else reference
    inputs = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().contiguous(), inputs)
    outputs = _outputs(format, reference, inputs)
    limit = max_batch if format == "executorch" else None
    batches = _batches(batch, limit) if dynamic_batch else (batch,)
    allowed = tolerance or _tolerance(outputs, half_weights and format == "openvino")

    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as folder, _quiet():
        file = Path(folder) / path.name
        traced = max(batch, 2) if dynamic_batch and limit != 1 else None
        example = _resized(inputs, batch, traced or batch)
        program, names = _trace(format, network, example, traced, limit)
        content = _WRITERS[format](program, file, names, half_weights)
        difference = _proved(format, file, reference, inputs, batch, batches, allowed)
        written = sorted(Path(folder).iterdir(), key=lambda part: part == file)  # the weights first
        size = sum(part.stat().st_size for part in written)
        for part in written:
            os.replace(part, path.parent / part.name)
        if format == "onnx" and len(written) == 1:
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)  # of a larger model that was here before
    timed = _timed(path, network, inputs, threads) if latency else {}
    return Exported(path, format, size, difference, allowed, batches, content.operators, content.delegated, **timed)


def run_exported(path: str | Path, inputs: Any) -> Any:
    """Load a file in its own runtime, on the CPU, and call it once.

    A ``.pt2`` is read by `torch.export.load`, which may run what a hostile file tells it to: open only files that you trust.

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
    except Exception as error:  # each runtime has errors of its own
        raise FormatError(path, f"{TITLES[format]} cannot read it: {first_line(error)}") from error


def compare_outputs(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference over all outputs, each as a fraction of the largest finite magnitude expected.

    Infinite where shapes differ, or where one is NaN or infinite and the other is not the same.

    Examples:
        >>> compare_outputs([torch.tensor([1.0, 3.0])], [torch.tensor([1.0, 4.0])])
        0.25
    """
    if [part.shape for part in found] != [part.shape for part in expected]:
        return math.inf
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        a, b = a.double(), b.double()
        finite = b.isfinite()
        same = (a == b) | (a.isnan() & b.isnan())
        if not (same | (finite & a.isfinite())).all():
            return math.inf
        a, b = a[finite], b[finite]
        if b.numel():
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(torch.float32).tiny)))
    return worst


# What goes into a file


class _Flat(nn.Module):
    """A model called with the tensors among its arguments, which gives the tensors among its outputs: what other runtimes know."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        leaves, self.form = tree_flatten((args, kwargs))
        self.constants = [(not isinstance(leaf, Tensor), None if isinstance(leaf, Tensor) else leaf) for leaf in leaves]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Put the tensors back where they belong, and call."""
        given = iter(tensors)
        leaves = [value if constant else next(given) for constant, value in self.constants]
        args, kwargs = tree_unflatten(leaves, self.form)
        return tuple(tensor for _, tensor in _tensors(self.model(*args, **kwargs), "output"))


@dataclass(frozen=True)
class _Names:
    """Names of a file's inputs and outputs, in order."""

    inputs: list[str]
    outputs: list[str]


def _format_of(path: Path, format: Format | None) -> Format:
    if format is None:
        if path.suffix not in SUFFIXES:
            hint = "or say which format it is" if path.suffix else "give the file a suffix"
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


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a value with their names: keys of dicts, else numbers."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, str(key))
    elif isinstance(value, tuple | list):
        for index, part in enumerate(value):
            yield from _tensors(part, f"{name}_{index}")
    elif value is not None and not isinstance(value, bool | int | float | str):
        leaves = tree_leaves(value)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise TypeError(f"holds a {type(value).__name__}, which is not made of tensors")
        for index, part in enumerate(leaves):
            yield f"{name}_{index}", part


def _named_inputs(model: nn.Module, inputs: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors among the inputs with the names that `forward` gives them."""
    args, kwargs = _arguments(inputs)
    parameters = list(inspect.signature(model.forward).parameters.values())
    plain = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = plain + [f"input_{index}" for index in range(len(plain), len(args))]
    found = [pair for name, value in zip(names, args, strict=False) for pair in _tensors(value, name)]
    return found + [pair for name, value in kwargs.items() for pair in _tensors(value, name)]


def _unique(names: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    result: list[str] = []
    for name in names:
        while name in result or name in taken:
            name += "_"
        result.append(name)
    return result


def _outputs(format: Format, model: nn.Module, inputs: Any) -> list[Tensor]:
    """Run the model in torch, and return the tensors that it gives."""
    with torch.no_grad():
        returned = call_model(model, inputs)
    try:
        outputs = [tensor for _, tensor in _tensors(returned, "output")]
    except TypeError as error:
        hint = "export a module that returns tensors only; of transformers, switch the cache off: config.use_cache = False"
        raise ExportError(format, f"what the model returns {error}", hint=hint) from error
    if not outputs:
        raise ExportError(format, "the model returns no tensor")
    return outputs


def _batches(batch: int, limit: int | None) -> tuple[int, ...]:
    """Return the batch sizes to compare at: one example, the batch given, and the limit or one more."""
    return tuple(sorted({1, batch, batch + 1 if limit is None else limit}))


def _resized(inputs: Any, batch: int, count: int) -> Any:
    """Return inputs with `count` examples, the given ones over and over; tensors whose leading dimension is not the batch stay."""
    order = torch.arange(count) % batch

    def resize(tensor: Tensor) -> Tensor:
        return tensor[order] if tensor.dim() and tensor.size(0) == batch and count != batch else tensor

    return tree_map_only(Tensor, resize, inputs)


def _tolerance(outputs: Sequence[Tensor], half: bool) -> float:
    steps = [torch.finfo(tensor.dtype).eps for tensor in outputs if tensor.dtype in (torch.float16, torch.bfloat16)]
    return max([TOLERANCE, *(8 * step for step in steps), *([8 * torch.finfo(torch.float16).eps] if half else [])])


# Tracing, and who is to blame


def _trace(format: Format, network: nn.Module, inputs: Any, batch: int | None, limit: int | None) -> tuple[ExportedProgram, _Names]:
    """Return the program of the network, and the names of what goes in and comes out.

    Args:
        format: `torch.export` keeps the call as it is; for the others tensors go in and tensors come out.
        network: in eval mode, on the CPU.
        inputs: with at least two examples where the batch is to be dynamic.
        batch: the leading dimension that is to be dynamic; None for none.
        limit: its largest value; None for no limit.
    """
    given = _named_inputs(network, inputs)
    names = _Names(_unique([name for name, _ in given]), [])
    args, kwargs = _arguments(inputs)
    module: nn.Module = network
    if format != "pt2":
        module, args, kwargs = _Flat(network, args, kwargs).eval(), tuple(tensor for _, tensor in given), {}
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    if batch is not None:
        # ExecuTorch's lowering excludes the largest value, so it is told one more; the file is compared at the limit itself
        dim = Dim("batch", min=1, max=None if limit is None else limit + 1)
        for _, tensor in given:
            if tensor.dim() and tensor.size(0) == batch:
                shapes[tensor] = {0: dim}

    def trace() -> ExportedProgram:
        return torch.export.export(
            module, args, kwargs, dynamic_shapes=None if batch is None else shapes.dynamic_shapes(module, args, kwargs)
        )

    printed = io.StringIO()  # torch prints the graph so far when it fails
    try:
        with torch.no_grad(), redirect_stderr(printed):
            program = trace()
    except Exception as error:  # of torch or of the model: all mean the same here
        raise _untraceable(format, error, trace, network) from error
    sys.stderr.write(printed.getvalue())
    with torch.no_grad():
        outputs = [name for name, _ in _tensors(call_model(network, inputs), "output")]
    return program, _Names(names.inputs, _unique(outputs, names.inputs))


@dataclass(frozen=True)
class _Place:
    """Where something went wrong; empty where unknown."""

    operator: str = ""
    layer: str = ""
    line: str = ""


def _untraceable(format: Format, error: Exception, trace: Callable[[], Any], network: nn.Module) -> ExportError:
    """Return the error that says what `torch.export` could not follow."""
    if "Constraints violated" in str(error) or "marked batch as dynamic" in str(error):
        place = _specialization(trace, network)
        text = " ".join(line.strip(" -") for line in str(error).splitlines() if "your code specialized" in line or "must" in line)
        problem = f"the model refuses a dynamic batch{place.line}: {text.split('. If')[0] or first_line(error)}"
        hint = "write the layer for any batch, or export for the batch of the inputs: dynamic_batch=False, on the command line --static"
        return ExportError(format, problem, operator=place.operator, layer=place.layer, hint=hint)
    place = _blame(error, network)
    hint = ""
    if "data-dependent" in str(error):
        hint = "a branch on values cannot be written: use torch.where, or torch.cond"
    problem = f"torch.export cannot follow it{place.line}: {first_line(error)}"
    return ExportError(format, problem, operator=place.operator, layer=place.layer, hint=hint)


def _blame(error: BaseException, network: nn.Module) -> _Place:
    """Find the operator and the layer in the frames that an error and its causes came through; the innermost ones count."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    places = [_place_in([(frame, number) for frame, number in _frames(part.__traceback__)], network) for part in chain]
    return next((place for place in reversed(places) if place.operator or place.layer), _Place())


def _frames(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def _place_in(frames: Sequence[tuple[FrameType, int]], network: nn.Module) -> _Place:
    """Read frames, outermost first: the last module of the network that runs, what it called, or the last node of a graph."""
    names = {id(module): name for name, module in network.named_modules()}
    operator = layer = line = ""
    for frame, number in frames:
        values, names_of_locals = frame.f_locals, frame.f_code.co_varnames
        owner = values.get(names_of_locals[0]) if names_of_locals else None
        node, called = values.get("node", values.get("n")), values.get("func")
        if isinstance(owner, nn.Module) and id(owner) in names:
            layer, operator = names[id(owner)] or type(owner).__name__, ""
            if frame.f_code.co_name == "forward":
                source = linecache.getline(frame.f_code.co_filename, number).strip()
                line = f" at `{source}` ({Path(frame.f_code.co_filename).name}:{number})" if source else ""
        elif isinstance(node, fx.Node) and node.op == "call_function":
            operator, layer, line = _operator_name(node.target), layer_of(node), ""
        elif callable(called) and not operator and layer:
            operator = _operator_name(called) if isinstance(called, torch._ops.OpOverload) else getattr(called, "__qualname__", "")
    return _Place(operator, layer, line)


def _operator_name(target: Any) -> str:
    found = re.search(r"\w+\.\w+(\.\w+)?", str(target))  # ExecuTorch's operators write their whole schema
    return found[0] if found else str(target)


def layer_of(node: fx.Node) -> str:
    """Return the name of the layer that a node of an exported graph belongs to; empty where unknown."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path, kind = map(str, stack[-1]) if stack else ("", "")
    if path.startswith("_"):
        return ""
    return kind.rpartition(".")[2] if path in ("", "model") else path.removeprefix("model.")


class _Witness(logging.Handler):
    """Remembers which layer was running when torch last said that it took a size for a constant."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.place = network, _Place()

    def emit(self, record: logging.LogRecord) -> None:
        """Look at the frames below the one that logs."""
        if not record.getMessage().startswith(("eval", "set_replacement", "runtime_assert")):
            return
        frames: list[tuple[FrameType, int]] = []
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            frames.append((frame, frame.f_lineno))
            frame = frame.f_back
        place = _place_in(frames[::-1], self.network)
        self.place = place if place.layer else self.place


def _specialization(trace: Callable[[], Any], network: nn.Module) -> _Place:
    """Trace once more, and listen to what torch logs about sizes."""
    log, witness = logging.getLogger("torch.fx.experimental.symbolic_shapes"), _Witness(network)
    level, handlers, log.handlers = log.level, log.handlers, [witness]
    log.setLevel(logging.INFO)
    try:
        with torch.no_grad(), redirect_stderr(io.StringIO()), suppress(Exception):  # the same one as before
            trace()
    finally:
        log.setLevel(level)
        log.handlers = handlers
    return witness.place


def _root(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _root(error.__cause__)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


# Formats: what writes each, and what opens it


@dataclass(frozen=True)
class _Content:
    """What a file holds."""

    operators: dict[str, int]
    delegated: float | None = None


def _write_pt2(program: ExportedProgram, file: Path, names: _Names, half: bool) -> _Content:
    program.example_inputs = None  # they would be written, too
    torch.export.save(program, file)
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
    return _Content(dict(Counter(str(node.op_type) for node in made.model.graph)))


def _write_executorch(program: ExportedProgram, file: Path, names: _Names, half: bool) -> _Content:
    with quietly():
        exir = import_module("executorch.exir")
        xnnpack = import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        debug = import_module("executorch.devtools.backend_debug")
    try:
        with quietly():
            # inputs have no names in the file, so it tells them as the result of a second method
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
            problem = "XNNPACK does not run it, and the runtime has no kernel of its own"
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
    with tempfile.TemporaryDirectory() as folder:
        between = Path(folder) / "model.onnx"
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
    program = torch.export.load(path).module()

    def run(inputs: Any) -> list[Tensor]:
        with torch.no_grad():
            return [tensor for _, tensor in _tensors(call_model(program, inputs), "output")]

    return run


def _open_onnx(path: Path, threads: int | None) -> Runner:
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


# Proof and time


def _proved(format: Format, file: Path, reference: nn.Module, inputs: Any, batch: int, batches: Sequence[int], allowed: float) -> float:
    """Return the largest difference between a file and the model.

    Raises:
        ExportError: the file cannot be run, or differs by more than is allowed.
    """
    try:
        run = open_exported(file, threads=1)
    except FormatError as error:
        raise _refused(format, file, error, "its own runtime cannot read the file") from error
    worst = 0.0
    for count in batches:
        given = _resized(inputs, batch, count)
        try:
            found = run(given)
        except SettingError as error:
            raise ExportError(format, str(error)) from error
        except Exception as error:  # each runtime has errors of its own
            raise _refused(format, file, error, f"its own runtime fails at batch {count}") from error
        difference = compare_outputs(found, _outputs(format, reference, given))
        if not difference <= allowed:
            problem = f"at batch {count} the file differs from the model by {difference:.2g} of the output's largest magnitude"
            hint = f"allowed is {allowed:.2g} (tolerance=); does the model draw random numbers in eval mode?"
            raise ExportError(format, problem, hint=hint)
        worst = max(worst, difference)
    return worst


def _refused(format: Format, file: Path, error: BaseException, problem: str) -> ExportError:
    """Return the error for a file that its own runtime does not run, with the operator and layer that the runtime's message names."""
    operator, layer = _onnx_node(file, str(error)) if format == "onnx" else ("", "")
    return ExportError(format, f"{problem}: {first_line(error)}", operator=operator, layer=layer, hint=_OTHER)


def _onnx_node(file: Path, message: str) -> tuple[str, str]:
    """Return operator and layer of the node that a message of ONNX Runtime names; torch's exporter writes the layers into the file."""
    model = import_module("onnx").load(file, load_external_data=False)
    for node in sorted(model.graph.node, key=lambda node: -len(node.name)):
        if node.name and node.name in message:
            told = {entry.key: entry.value for entry in node.metadata_props}
            scopes = re.findall(r"'([^']*)'", told.get("pkg.torch.onnx.name_scopes", ""))
            return node.op_type, (scopes[-2] if len(scopes) > 1 else "").removeprefix("model").removeprefix(".")
    return "", ""


class _Running(nn.Module):
    """A file as a module, for the clock."""

    def __init__(self, run: Runner) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Call the runtime."""
        return self.run(kwargs or args)


def _timed(path: Path, network: nn.Module, inputs: Any, threads: int) -> dict[str, Latency]:
    """Time a file and the network in torch, in turns."""
    with _quiet():
        models = {"latency": _Running(open_exported(path, threads)), "eager": network}
        return compare_latency(models, inputs, threads=threads)


# Other people's noise

_WARNINGS = (
    r"The tensor attributes? .*_flat_weights",  # of every nn.LSTM and nn.GRU: their list of weights is no buffer
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # torch copying its own programs
    r"This API is experimental and subject to change without notice",  # ExecuTorch
)
_LOGGERS = ("torch.onnx._internal.exporter._registration", "torch.fx.experimental.symbolic_shapes", "torch.export")


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch and the runtimes say of themselves: a few warnings, by their text, and what two loggers repeat."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings():
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message)
        try:
            for name in _LOGGERS:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextmanager
def quietly() -> Iterator[None]:
    """Run what only other packages do without their warnings and log lines, ExecuTorch's words, and handlers given to the root logger."""
    root = logging.getLogger()
    handlers, disabled = list(root.handlers), root.manager.disable
    with warnings.catch_warnings(), _quiet_stderr():
        warnings.simplefilter("ignore")
        logging.disable(max(disabled, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(disabled)
            root.handlers[:] = handlers


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hold back what is written to stderr; write it afterwards without the lines of C++, ``[cpuinfo_utils.cpp:71] ...``."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            for line in held:
                if not re.match(rb"\[\w+\.cpp:\d+\] ", line):
                    os.write(2, line)
