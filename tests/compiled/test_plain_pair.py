"""A network that reads the weights of its layers, merged: compiled, exported and in ONNX Runtime it computes the same."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.plain.chain import PlainPair


class Reads(nn.Module):
    """Asks for dtype and shape, as models of transformers do, and uses a weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 16, 4, stride=4)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.to(self.conv.weight.dtype)).flatten(2).transpose(1, 2)
        scale = self.out.weight.square().mean() * self.conv.stride[0] / self.conv.weight.shape[0]
        return self.out(x) * scale


@pytest.fixture
def merged() -> Any:
    model = sp.merge(sp.factorize(Reads().eval(), "channel", sp.match("*"), rank=2))
    assert all(isinstance(layer, PlainPair) for layer in (model.conv, model.out))
    return model


def test_compile(merged: Any) -> None:
    x = torch.randn(2, 6, 8, 8)
    compiled = torch.compile(merged, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), merged(x))


def test_export(merged: Any) -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(merged, (torch.randn(3, 6, 8, 8),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 6, 8, 8)
    torch.testing.assert_close(program.module()(x), merged(x))


@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
def test_onnx(merged: Any) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x = torch.randn(3, 6, 8, 8)
    program = torch.onnx.export(merged, (x,), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), merged(x).detach())
