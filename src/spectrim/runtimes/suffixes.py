"""The formats of other runtimes by the suffix of their files; apart, so that the command line can list them without importing torch."""

from typing import Literal

Format = Literal["pt2", "onnx", "executorch", "openvino"]

SUFFIXES: dict[str, Format] = {".pt2": "pt2", ".onnx": "onnx", ".pte": "executorch", ".xml": "openvino"}
