"""Files for other runtimes compute what the model computes, at any batch; what cannot be written says which operator and layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import ExportError, SettingError
from spectrim.layers import named_layers
from spectrim.plain.attention import PlainAttention
from spectrim.plain.chain import PlainPair
from spectrim.plain.recurrent import PlainRecurrent
from spectrim.runtimes import run_exported
from spectrim.runtimes.export import Exported, export
from spectrim.surgery.tensor_train import tensor_train
from spectrim.tables import SUFFIXES

PACKAGES = {".pt2": (), ".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pte": ("executorch",), ".xml": ("openvino", "onnx", "onnxscript")}
PACKAGES[".tflite"] = ("litert_torch", "ai_edge_litert")


def need(suffix: str) -> None:
    for package in PACKAGES[suffix]:
        pytest.importorskip(package)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(20, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(self.lstm(self.embedding(tokens))[0])
        return output


class Attending(nn.Module):
    """Tensors and what is none as keyword arguments; a dict, with something that is no tensor, as output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.attention, self.head = nn.Embedding(20, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 20)

    def forward(self, tokens: Tensor, hidden: Tensor | None = None, scale: float = 1.0, extra: Any = None) -> dict[str, Any]:
        x = self.embedding(tokens)
        mixed = self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
        return {"logits": scale * self.head(mixed), "nothing": extra, "mean": mixed.mean(1)}


def conv(batch: int) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


def tokens(batch: int) -> Tensor:
    return torch.randint(0, 20, (batch, 3))


def keywords(batch: int) -> dict[str, Any]:
    hidden = torch.zeros(batch, 3, dtype=torch.bool)
    hidden[:, 2] = torch.arange(batch) % 2 == 0
    return {"hidden": hidden, "tokens": tokens(batch), "scale": 2.0, "extra": None}


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(256, 5))
    model[1].running_mean.normal_()
    return model


def language_model() -> nn.Module:
    return nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 20))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "convolution": (convolutional, conv),
    "recurrent": (Recurrent, tokens),
    "attention": (Attending, keywords),
    "embedding": (language_model, tokens),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_file_computes_what_the_model_computes(network: str, suffix: str, tmp_path: Path) -> None:
    need(suffix)
    make, inputs = NETWORKS[network]
    low = sp.factorize(make(), rank=2).train()
    before = {name: value.clone() for name, value in low.state_dict().items()}
    kind = {"recurrent": PlainRecurrent, "attention": PlainAttention}.get(network, PlainPair)
    assert any(isinstance(module, kind) for module in sp.merge(low).modules())

    made = export(low, inputs(3), tmp_path / f"file{suffix}")
    assert made.format == SUFFIXES[suffix]
    assert made.batches == {".pte": (1, 3, 8), ".tflite": (3,)}.get(suffix, (1, 3, 4))
    assert made.difference <= made.tolerance == 1e-4
    assert made.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert sorted(file.suffix for file in tmp_path.iterdir()) == ([".bin", ".xml"] if suffix == ".xml" else [suffix])
    if suffix == ".onnx":
        check_names(made, network)
    if suffix == ".pte":
        assert made.delegated is not None
        assert 0 < made.delegated <= 1

    assert all(module.training for module in low.modules())
    assert next(named_layers(low), None) is not None
    torch.testing.assert_close(low.state_dict(), before, rtol=0, atol=0)
    low.eval()
    for batch in (3,) if suffix == ".tflite" else (1, 2, 5):
        given = inputs(batch)
        if isinstance(given, dict):
            expected = low(**given)
            found = run_exported(made.path, dict(reversed(given.items())) if suffix != ".pt2" else given)
            torch.testing.assert_close(found, (expected["logits"], expected["mean"]))
        else:
            torch.testing.assert_close(run_exported(made.path, given), low(given))


def test_a_file_of_tensor_formats_has_plain_operators_and_computes_what_the_model_computes(tmp_path: Path) -> None:
    """CP and a tensor train in one network, and a TT-matrix: convolutions, one of them depthwise, and products."""
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(72, 12)).eval()
    for index, scheme in ((0, "cp"), (2, "tt")):
        model[index] = sp.merge(sp.factorize(nn.Sequential(model[index]), scheme, "*", rank=3))[0]
    model[4] = tensor_train(model[4], 4)
    made = export(model, torch.randn(3, 3, 8, 8), tmp_path / "file.onnx")
    graph = onnx.load(made.path).graph
    groups = [attribute.i for node in graph.node if node.op_type == "Conv" for attribute in node.attribute if attribute.name == "group"]
    assert groups == [1, 3, 1, 1, 1, 1, 1]
    assert {node.op_type for node in graph.node} <= {"Conv", "Relu", "Reshape", "Transpose", "MatMul", "Add"}
    torch.testing.assert_close(run_exported(made.path, torch.ones(5, 3, 8, 8)), model(torch.ones(5, 3, 8, 8)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_the_input_fold_computes_what_the_model_computes(suffix: str, tmp_path: Path) -> None:
    need(suffix)
    low = sp.factorize(convolutional(), "input", rank=2).eval()
    assert [layer.scheme for _, layer in named_layers(low)][:2] == ["input", "input"]
    made = export(low, conv(3), tmp_path / f"file{suffix}")
    assert made.difference <= made.tolerance == 1e-4
    if suffix == ".tflite":
        with pytest.raises(SettingError, match=r"must be of the shape \(3, 3, 8, 8\) that file.tflite was written for, got \(5, 3, 8, 8\)"):
            run_exported(made.path, conv(5))
    for batch in (3,) if suffix == ".tflite" else (1, 2, 5):
        given = conv(batch)
        torch.testing.assert_close(run_exported(made.path, given), low(given))


def check_names(made: Exported, network: str) -> None:
    graph = __import__("onnx").load(made.path).graph
    batches = {entry.name: entry.type.tensor_type.shape.dim[0].dim_param for entry in (*graph.input, *graph.output)}
    names = (
        ("hidden", "tokens", "logits", "mean") if network == "attention" else ("tokens" if network == "recurrent" else "input", "output")
    )
    assert batches == dict.fromkeys(names, "batch")
    assert sum(made.operators.values()) == len(graph.node)


class Reshaping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(3, -1)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Eigenvalues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x[:, :, None] * x[:, None, :]).real


def around(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), layer))


def test_a_dynamic_batch_that_is_refused_names_operator_and_layer(tmp_path: Path) -> None:
    model, x = around(Reshaping()), torch.randn(3, 4)
    with pytest.raises(
        ExportError, match=r"layer '1.1'.*refuses a dynamic batch at `return x.reshape\(3, -1\)`.*dynamic_batch=False"
    ) as caught:
        export(model, x, tmp_path / "file.pt2")
    assert (caught.value.format, caught.value.layer, caught.value.operator) == ("pt2", "1.1", "TensorBase.reshape")
    assert not list(tmp_path.iterdir())
    made = export(model, x, tmp_path / "file.pt2", dynamic_batch=False)
    assert made.batches == (3,)
    torch.testing.assert_close(run_exported(made.path, x), model(x))


def test_a_branch_on_values_names_the_layer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ExportError, match=r"layer '1.1'.*`return x if x.sum\(\) > 0 else -x` \(test_export.py:\d+\).*torch.where"
    ) as caught:
        export(around(Branching()), torch.randn(3, 4), tmp_path / "file.onnx", progress=False)
    assert (caught.value.format, caught.value.layer) == ("onnx", "1.1")
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".onnx", ".pte", ".xml"])
def test_an_operator_that_a_format_lacks_is_named_with_its_layer(suffix: str, tmp_path: Path) -> None:
    need(suffix)
    with pytest.raises(ExportError) as caught:
        export(around(Eigenvalues()), torch.randn(3, 4), tmp_path / f"file{suffix}")
    assert caught.value.format == SUFFIXES[suffix]
    assert caught.value.layer == "1.1"
    assert "linalg_eig" in caught.value.operator
    assert not list(tmp_path.iterdir())


class Drawing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_a_file_that_differs_is_not_left_behind_and_an_older_one_stays(tmp_path: Path) -> None:
    path, x = tmp_path / "file.pt2", torch.randn(3, 4)
    export(nn.Linear(4, 4), x, path)
    before = path.read_bytes()
    with pytest.raises(ExportError, match=r"at batch 1 the file differs from the model by .* random numbers in eval mode"):
        export(Drawing(), x, path)
    assert [file.name for file in tmp_path.iterdir()] == ["file.pt2"]
    assert path.read_bytes() == before


@pytest.mark.parametrize(("suffix", "dtype"), [(".pt2", torch.bfloat16), (".pt2", torch.float16), (".onnx", torch.float16)])
def test_half_precision_stays(suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    need(suffix)
    model, x = language_model().to(dtype), tokens(3)
    made = export(model, x, tmp_path / f"file{suffix}")
    assert made.tolerance == 8 * torch.finfo(dtype).eps
    assert run_exported(made.path, x).dtype == dtype


def test_half_weights_of_openvino(tmp_path: Path) -> None:
    need(".xml")
    made = export(nn.Linear(64, 64), torch.randn(3, 64), tmp_path / "half.xml", half_weights=True)
    assert (tmp_path / "half.bin").stat().st_size < 64 * 66 * 2 + 64  # bytes of the weights in float16; a few for sizes
    assert 1e-6 < made.difference <= made.tolerance == 8 * torch.finfo(torch.float16).eps


def test_latency_is_measured_beside_torch(tmp_path: Path) -> None:
    made = export(nn.Linear(8, 8), torch.randn(2, 8), tmp_path / "file.pt2", latency=True)
    assert made.latency is not None
    assert made.eager is not None
    assert (made.latency.batch, made.latency.threads) == (made.eager.batch, made.eager.threads) == (2, 1)
    assert 0 < made.latency.median_s < 60
    assert 0 < made.eager.median_s < 60
    assert "latency in torch" in made.summary()
