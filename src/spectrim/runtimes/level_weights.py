"""Weights on levels in an ONNX file: int8 and their step in place of float32, with the same values to the bit."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from spectrim.runtimes.onnx_digest import seal, unseal

MOST = 127
"""Largest level that int8 holds on both sides."""


def put_levels(file: Path) -> list[str]:
    """Hold the float32 weights of an ONNX file that lie on at most 127 levels on each side of zero as int8, in place.

    Each is behind a ``DequantizeLinear`` with its step, and nothing else changes: the values are the same.

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
        step = step_of(np.unique(np.abs(values)))
        if step is None:
            continue
        name, numbers = tensor.name, np.rint(values / step).astype(np.int8)
        proto.graph.initializer.remove(tensor)
        proto.graph.initializer.extend(
            [onnx.numpy_helper.from_array(numbers, f"{name}_levels"), onnx.numpy_helper.from_array(np.array(step), f"{name}_step")]
        )
        nodes.append(onnx.helper.make_node("DequantizeLinear", [f"{name}_levels", f"{name}_step"], [name], name=f"{name}_levels"))
        changed.append(name)
    for place, node in enumerate(nodes):
        proto.graph.node.insert(place, node)
    file.write_bytes(proto.SerializeToString())
    seal(file)
    return changed


def step_of(sizes: np.ndarray) -> np.float32 | None:
    """Return the step whose multiples, up to `MOST`, are exactly these magnitudes in float32; None where there is none."""
    sizes = sizes[sizes > 0]
    if not 0 < len(sizes) <= MOST:
        return None
    gap = float(np.diff(sizes.astype(np.float64), prepend=0.0).min())
    for part in range(1, 9):
        top = round(float(sizes[-1]) / gap * part)
        guess = np.float32(float(sizes[-1]) / max(1, top))
        for step in (guess, np.nextafter(guess, np.float32(0)), np.nextafter(guess, np.float32(np.inf))):
            if top <= MOST and np.array_equal(np.rint(sizes / step).astype(np.float32) * step, sizes):
                return np.float32(step)
    return None
