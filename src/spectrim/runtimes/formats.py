"""File formats of other runtimes: their names, suffixes and packages; `writers` and `readers` have one function for each."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from spectrim.errors import SettingError
from spectrim.runtimes.quiet import quietly
from spectrim.tables import SUFFIXES, Format

TITLES = {"pt2": "torch.export", "onnx": "ONNX", "executorch": "ExecuTorch", "openvino": "OpenVINO", "litert": "LiteRT"}


Runner = Callable[[Any], list[Tensor]]


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
        "litert": ("litert_torch", "ai_edge_litert"),
    }
    missing = [name for name in needed[format] if find_spec(name) is None]
    if missing:
        raise ImportError(f"{TITLES[format]} needs {', '.join(missing)}: pip install {' '.join(missing)}, or install the extra '{format}'")


INPUT_NAMES = "input_names"
"""Method of an ExecuTorch file that returns the names of its inputs, with commas between."""


DIGEST = "spectrim_digest"
"""Method of an ExecuTorch file that returns what `file_digest` wrote."""


def _executorch() -> Any:
    with quietly():
        return import_module("executorch.runtime").Runtime.get()
