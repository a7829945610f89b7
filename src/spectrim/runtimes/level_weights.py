"""Weights on levels in an ONNX file: int8 and their step in place of float32, with the same values to the bit."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spectrim.runtimes.onnx_digest import seal, unseal
from spectrim.storage.coded.levels import found

MOST = 127
"""Largest level that int8 holds on both sides."""


def put_levels(file: Path) -> list[str]:
    """Hold the float32 weights of an ONNX file that lie on at most 127 levels on each side of zero as int8, in place.

    Each is behind a ``DequantizeLinear`` with its step, or the step of each row, and nothing else changes: the values are the same.

    Args:
        file: an ONNX file that holds its weights itself.

    Returns:
        The names of the weights.
    """
    onnx: Any = import_module("onnx")
    proto = onnx.load(str(file))
    unseal(proto)
    changed, nodes = [], []
    for tensor in list(proto.graph.initializer):
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        held = found(torch.from_numpy(values.copy()) + 0.0)
        if held is None or held.steps is None or np.abs(held.numbers).max() > MOST:
            continue
        name, rows = tensor.name, len(held.steps) > 1
        numbers = held.numbers.reshape(values.shape).astype(np.int8)
        steps = held.steps.astype(np.float32) if rows else np.array(held.steps[0], np.float32)
        if not np.array_equal(numbers.astype(np.float32) * (steps.reshape(-1, *[1] * (values.ndim - 1)) if rows else steps), values):
            continue
        proto.graph.initializer.remove(tensor)
        proto.graph.initializer.extend(
            [onnx.numpy_helper.from_array(numbers, f"{name}_levels"), onnx.numpy_helper.from_array(steps, f"{name}_step")]
        )
        axis = {"axis": 0} if rows else {}
        nodes.append(onnx.helper.make_node("DequantizeLinear", [f"{name}_levels", f"{name}_step"], [name], name=f"{name}_levels", **axis))
        changed.append(name)
    for place, node in enumerate(nodes):
        proto.graph.node.insert(place, node)
    file.write_bytes(proto.SerializeToString())
    seal(file)
    return changed
