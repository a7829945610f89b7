"""Opening the file formats of other runtimes, one function for each; running what was opened."""

import zipfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectrim.errors import FormatError, SettingError
from spectrim.metrics.calls import call_model
from spectrim.runtimes.blame import first_line
from spectrim.runtimes.file_digest import verify_file
from spectrim.runtimes.formats import INPUT_NAMES, TITLES, Runner, _executorch, _format_of, _require
from spectrim.runtimes.onnx_digest import verify
from spectrim.runtimes.quiet import _quiet, _quiet_stderr
from spectrim.runtimes.tensors import _arguments, _tensors
from spectrim.tables import Format


def run_exported(path: str | Path, inputs: Any) -> Any:
    """Load a file in its own runtime, on the CPU, and call it once.

    A ``.pt2`` is read by `torch.export.load`, which may run code from the file: open only files that you trust.

    Args:
        path: a ``.pt2``, ``.onnx``, ``.pte``, ``.xml`` or ``.tflite``.
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
        path: a ``.pt2``, ``.onnx``, ``.pte``, ``.xml`` or ``.tflite``.
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


def _open_executorch(path: Path, threads: int | None) -> Runner:
    verify_file(path)
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
    verify_file(path, [path.with_suffix(".bin")])
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


def _open_litert(path: Path, threads: int | None) -> Runner:
    with _quiet_stderr():
        interpreter = import_module("ai_edge_litert.interpreter").Interpreter(str(path), num_threads=threads)
        runner = interpreter.get_signature_runner()
    order = [detail["index"] for detail in interpreter.get_input_details()]
    wanted = runner.get_input_details()
    names = sorted(wanted, key=lambda name: order.index(wanted[name]["index"]))

    def run(inputs: Any) -> list[Tensor]:
        given = dict(zip(names, in_order(path, inputs, names), strict=True))
        for name, tensor in given.items():
            if tensor.shape != (shape := tuple(map(int, wanted[name]["shape"]))):
                rule = f"of the shape {shape} that {path.name} was written for"
                raise SettingError("run_exported", f"input {name!r}", got=tuple(tensor.shape), rule=rule)
        found = runner(**{name: array_of(tensor).astype(wanted[name]["dtype"]) for name, tensor in given.items()})
        return [torch.from_numpy(found[name].copy()) for name in sorted(found, key=lambda name: int(name.rpartition("_")[2]))]

    return run


_READERS: dict[Format, Callable[[Path, int | None], Runner]] = {
    "pt2": _open_pt2,
    "onnx": _open_onnx,
    "executorch": _open_executorch,
    "openvino": _open_openvino,
    "litert": _open_litert,
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
