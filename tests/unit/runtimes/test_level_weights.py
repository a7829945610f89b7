"""Rounded networks in other runtimes: the same function, with int8 weights."""

from pathlib import Path

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.errors import LayerError
from spectrim.runtimes.level_weights import put_levels
from spectrim.surgery.constrain import constrain

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")


class Doubled(nn.Linear):
    """A layer that reads its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * 2).T


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    return sp.merge(constrain(sp.factorize(model, "dense", where="*"), bits=4, keep=0.5))


def test_int8_weights_in_an_onnx_file_are_the_levels_themselves(tmp_path: Path) -> None:
    model, x = network(), torch.randn(5, 1, 8, 8)
    plain = sp.export(model, x, tmp_path / "plain.onnx", progress=False)
    small = sp.export(model, x, tmp_path / "small.onnx", int8_weights=True, progress=False)
    assert small.size_bytes < 0.45 * plain.size_bytes
    held = {entry.name: onnx.numpy_helper.to_array(entry) for entry in onnx.load(str(small.path)).graph.initializer}
    levels = [values for values in held.values() if values.dtype == "int8"]
    weights = [parameter.detach() for parameter in model.parameters() if parameter.dim() > 1]
    assert sorted(values.size for values in levels) == sorted(weight.numel() for weight in weights)
    for name, values in held.items():
        if name.endswith("_levels"):
            dequantized = torch.from_numpy(values.copy()).float() * float(held[name.replace("_levels", "_step")])
            assert any(dequantized.numel() == weight.numel() and torch.equal(dequantized.flatten(), weight.flatten()) for weight in weights)
    sessions = [runtime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"]) for made in (plain, small)]
    outputs = [session.run(None, {session.get_inputs()[0].name: x.numpy()})[0] for session in sessions]
    torch.testing.assert_close(*map(torch.from_numpy, outputs))  # another kernel may add in another order


def test_weights_that_lie_on_no_levels_stay_as_they_are(tmp_path: Path) -> None:
    file = sp.export(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8), tmp_path / "net.onnx", progress=False).path
    before = onnx.load(str(file)).graph
    assert put_levels(file) == []
    assert onnx.load(str(file)).graph == before


def test_linear_layers_on_levels_are_int8_in_torchao_with_the_same_values() -> None:
    pytest.importorskip("torchao")
    from spectrim.runtimes.torchao_levels import int8_linears

    model, x = network(), torch.randn(5, 1, 8, 8)
    model.add_module("last", nn.Linear(4, 4))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    held = int8_linears(model)
    kinds = {name: type(module.weight).__name__ for name, module in held.named_modules() if hasattr(module, "weight")}
    assert kinds == {"0": "Parameter", "3": "Int8Tensor", "5": "Int8Tensor", "last": "Parameter"}
    for name in ("3", "5"):
        weight = held.get_submodule(name).weight
        assert weight.qdata.dtype == torch.int8
        assert torch.equal(weight.dequantize(), before[f"{name}.weight"])
    torch.testing.assert_close(held(x), model(x))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    encoder, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(2, 5, 16)
    encoder.own = Doubled(16, 16)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_((parameter * 100).round() * 0.01 if parameter.dim() > 1 else parameter)
    held = int8_linears(encoder)
    torch.testing.assert_close(held(x), encoder(x))
    torch.testing.assert_close(held.own(x), encoder.own(x))
    assert {name for name, part in held.named_modules() if hasattr(getattr(part, "weight", None), "qdata")} == {"linear1", "linear2"}
    with pytest.raises(LayerError, match="lies on levels"):
        int8_linears(nn.Sequential(nn.Linear(64, 64)))
