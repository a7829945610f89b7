"""One layer as an ONNX model, for timing."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.plain.chain import PlainPair
from spectrim.plain.recurrent import PlainRecurrent

FEW = 16
"""Numbers that are written as they are."""


class _NoFormError(Exception):
    """A layer that the small ONNX writer below does not know."""


def _onnx_model(module: nn.Module, x: Tensor, *, filled: bool = False) -> bytes:
    """Return a layer, or a pair, as an ONNX model of one input ``x`` and one output ``y``, with the nodes that torch's exporter writes.

    Args:
        module: dense or a pair.
        x: its input.
        filled: write one value for each weight and not its numbers, for a small file; a runtime makes the constants when it loads.
    """
    from onnx import helper, numpy_helper

    if x.dtype not in (torch.float32, torch.float64, torch.float16):
        raise _NoFormError(f"ONNX Runtime has no kernels for {x.dtype}")
    element = helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=x.dtype).numpy().dtype)
    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(tensor: Tensor) -> str:
        if filled and tensor.numel() > FEW:
            shape = constant(torch.tensor(tensor.shape))
            value = numpy_helper.from_array(torch.full((1,), 1 / max(tensor.shape), dtype=tensor.dtype).numpy())
            return node("ConstantOfShape", [shape], value=value)
        constants.append(numpy_helper.from_array(tensor.detach().cpu().contiguous().numpy(), f"c{len(constants)}"))
        return str(constants[-1].name)

    def node(kind: str, inputs: Iterable[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [f"v{len(nodes)}"], **attributes))
        return f"v{len(nodes) - 1}"

    def write(layer: Any, source: str) -> str:
        kind = type(layer).__name__
        if isinstance(layer, nn.Sequential | PlainPair):
            for part in layer:
                source = write(part, source)
            return source
        if isinstance(layer, PlainRecurrent):
            (cell,) = layer.cells.values()
            return write(cell.kernel, source if cell.reduce is None else write(cell.reduce, source))
        if isinstance(layer, nn.LSTM | nn.GRU):
            return write_recurrent(layer, source)
        if isinstance(layer, nn.Linear) or kind == "Conv1D":
            weight = constant(layer.weight if kind == "Conv1D" else layer.weight.T)
            product = node("MatMul", [source, weight])
            return product if layer.bias is None else node("Add", [product, constant(layer.bias)])
        if hasattr(layer, "kernel_size"):
            return write_convolution(layer, source)
        raise _NoFormError(f"no ONNX form of {kind} is implemented")

    def write_convolution(layer: Any, source: str) -> str:
        if layer.padding_mode != "zeros":
            raise _NoFormError(f"no ONNX form of padding_mode={layer.padding_mode!r} is implemented")
        spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if isinstance(layer.padding, str):
            pads = [(s // 2, s - s // 2) if layer.padding == "same" else (0, 0) for s in spans]
        else:
            pads = [(p, p) for p in layer.padding]
        settings = {"kernel_shape": list(layer.kernel_size), "strides": list(layer.stride), "dilations": list(layer.dilation)}
        settings |= {"pads": [low for low, _ in pads] + [high for _, high in pads]}
        if layer.transposed:
            settings |= {"output_padding": list(layer.output_padding)}
        inputs = [source, constant(layer.weight), *([] if layer.bias is None else [constant(layer.bias)])]
        return node("ConvTranspose" if layer.transposed else "Conv", inputs, group=layer.groups, **settings)

    def write_recurrent(layer: Any, source: str) -> str:
        if layer.proj_size:
            raise _NoFormError("ONNX has no LSTM with projections")
        state = dict(layer.state_dict())
        weights = [constant(state[f"weight_{part}_l0"].unsqueeze(0)) for part in ("ih", "hh")]
        bias = [constant(torch.cat([state["bias_ih_l0"], state["bias_hh_l0"]]).unsqueeze(0))] if layer.bias else []
        more = {} if layer.mode == "LSTM" else {"linear_before_reset": 1}
        return node(layer.mode, [source, *weights, *bias], hidden_size=layer.hidden_size, **more)

    write(module, "x")
    nodes[-1].output[0] = "y"
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", element, list(x.shape))],
        [helper.make_tensor_value_info("y", element, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())
