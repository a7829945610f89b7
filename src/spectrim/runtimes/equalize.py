"""One exact change of scale inside low-rank pairs, so that 8 bits suffice."""

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def _session(model: Any, optimized: Path | None = None) -> Any:
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# Equal ranges inside low-rank pairs


def equalize_pairs(proto: Any, feeds: Sequence[Mapping[str, NDArray[Any]]]) -> list[str]:
    """Rescale, in place, the channels between two layers that follow each other, so that all of them span the same range.

    ``y = L R x = (L D) (D^-1 R) x`` with ``D`` the largest magnitude of each channel of ``R x``, over the largest of all. int8 gives the
    whole middle one scale, so that a channel of half the range would have half the levels. The scales of the rows of ``R`` follow by
    themselves, for each row has its own.

    Args:
        proto: an ONNX model; layers are ``Conv``, ``Gemm`` and ``MatMul`` with nothing between them, whose weights are their own.
        feeds: input name to array; the ranges are taken on them.

    Returns:
        Names of the second nodes of the pairs.

    Source: Nagel et al., arXiv 1906.04721, section 4.1 (cross-layer equalization). Deviation: the ranges that become equal are those of the
    activations between the layers, not of the two weights.
    """
    onnx = import_module("onnx")
    pairs = list(_pairs(proto.graph))
    if not pairs:
        return []
    probe = type(proto)()
    probe.CopyFrom(proto)
    middles = [first.output[0] for first, _ in pairs]
    probe.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in middles)
    session = _session(probe.SerializeToString())
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    largest = [np.zeros(1, np.float32) for _ in pairs]
    for feed in feeds:
        for index, middle in enumerate(session.run(middles, dict(feed))):
            axis = 1 if pairs[index][0].op_type == "Conv" else -1
            magnitude = np.abs(np.moveaxis(middle, axis, -1)).reshape(-1, middle.shape[axis]).max(0)
            largest[index] = np.maximum(largest[index], magnitude)
    for (first, second), ranges in zip(pairs, largest, strict=True):
        scale = np.where(ranges > 0, ranges / max(ranges.max(), np.finfo(np.float32).tiny), 1).astype(np.float32)
        _scale(weights[first.input[1]], _channels(first, of_output=True), (1 / scale).astype(np.float32), 1)
        if len(first.input) > 2 and first.input[2]:
            _scale(weights[first.input[2]], -1, (1 / scale).astype(np.float32), 1)
        _scale(weights[second.input[1]], _channels(second, of_output=False), scale, _attribute(second, "group", 1))
    return [second.name for _, second in pairs]


def _pairs(graph: Any) -> Iterator[tuple[Any, Any]]:
    """Yield two nodes of one kind whose weights are their own, the second of which alone reads the first."""
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    own = {tensor.name for tensor in graph.initializer if len(readers.get(tensor.name, [])) == 1 and len(tensor.dims) > 0}
    outputs = {entry.name for entry in graph.output}

    def linear(node: Any) -> bool:
        rest = [name for name in node.input[1:] if name]
        return node.op_type in ("Conv", "Gemm", "MatMul") and all(name in own for name in rest) and not _attribute(node, "transA", 0)

    for first in graph.node:
        users = readers.get(first.output[0], []) if first.output else []
        if len(users) == 1 and first.output[0] not in outputs and linear(first) and linear(users[0]) and len(users[0].input) > 1:
            second = users[0]
            if second.input[0] == first.output[0] and (first.op_type == "Conv") == (second.op_type == "Conv"):
                yield first, second


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(entry.i) for entry in node.attribute if entry.name == name), default)


def _channels(node: Any, of_output: bool) -> int:
    """Return the axis of a weight that belongs to the channels of the output, or of the input."""
    rows_first = node.op_type == "Conv" or bool(_attribute(node, "transB", 0))
    return int(of_output != rows_first)


def _scale(tensor: Any, axis: int, scale: NDArray[np.float32], groups: int) -> None:
    """Multiply a weight along an axis; with groups, the axis holds the channels of one group and axis 0 goes over the groups."""
    helper = import_module("onnx").numpy_helper
    weight = np.array(helper.to_array(tensor))
    shape = [1] * weight.ndim
    shape[axis] = -1
    blocks = weight.reshape(groups, -1, *weight.shape[1:]) * scale.reshape(groups, *shape)
    tensor.CopyFrom(helper.from_array(blocks.reshape(weight.shape).astype(weight.dtype), tensor.name))
