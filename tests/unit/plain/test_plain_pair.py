"""Two layers in the place of one answer for it: its weight, its settings, and everything that models ask of a layer without calling it."""

import copy
import io
from typing import Any

import jaxtyping
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import spectrim as sp
from spectrim.plain.chain import PlainPair

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
EVERYTHING = sp.match("*")
LAYERS = {
    "linear": lambda: nn.Linear(24, 20),
    "conv1d of transformers": lambda: Conv1D(20, 24),
    "embedding": lambda: nn.Embedding(50, 20, padding_idx=3),
    "conv1d": lambda: nn.Conv1d(12, 16, 3, stride=2),
    "conv2d": lambda: nn.Conv2d(12, 16, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, bias=False),
    "conv2d same": lambda: nn.Conv2d(12, 16, 3, padding="same", padding_mode="reflect"),
    "conv3d": lambda: nn.Conv3d(12, 16, 3),
    "transposed 1d": lambda: nn.ConvTranspose1d(12, 16, 3, stride=2),
    "transposed 2d": lambda: nn.ConvTranspose2d(12, 16, (3, 5), stride=(2, 3), padding=1, output_padding=1, groups=2),
    "transposed 3d": lambda: nn.ConvTranspose3d(12, 16, 3, 2),
}


def made(name: str, scheme: Any = "channel") -> tuple[Any, Any, Any]:
    """Return a dense layer, its factors at rank 2, and the pair that they merge to; in fp64."""
    dense = LAYERS[name]().double()
    low = sp.factorize(dense, scheme, EVERYTHING, rank=2)
    pair = sp.merge(low)
    assert isinstance(pair, PlainPair)
    assert isinstance(pair, type(dense))
    return dense, low, pair


@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_pair_answers_as_the_dense_layer_does(name: str, scheme: str) -> None:
    dense, low, pair = made(name, scheme)
    torch.testing.assert_close(pair.weight + 0, low.weight)
    settings = {key: value for key, value in vars(dense).items() if not key.startswith("_")}
    assert settings.items() <= vars(pair).items()
    assert hasattr(pair, "bias") == hasattr(dense, "bias")
    if hasattr(dense, "bias"):
        assert (pair.bias is None) == (dense.bias is None)
        assert pair.bias is pair[1].bias
    asked = ("dtype", "device", "shape", "ndim", "requires_grad", "is_meta", "layout", "itemsize", "nbytes", "is_cuda", "grad")
    for key in asked:
        assert getattr(pair.weight, key) == getattr(dense.weight, key), key
    for method in ("size", "dim", "numel", "element_size", "is_floating_point", "is_complex", "get_device", "__len__"):
        assert getattr(pair.weight, method)() == getattr(dense.weight, method)(), method
    assert isinstance(pair.weight, torch.Tensor)
    assert not isinstance(pair.weight, nn.Parameter), "so that nobody trains or counts it"
    assert {key for key, _ in pair.named_parameters()} <= {"0.weight", "1.weight", "1.bias"}


def test_metadata_cost_no_product_and_anything_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, pair = made("linear")
    composed = []
    original = PlainPair._composed
    monkeypatch.setattr(PlainPair, "_composed", lambda self: composed.append(self) or original(self))
    weight = pair.weight
    assert weight.dtype == torch.float64
    assert (weight.shape, weight.size(0), weight.ndim, len(weight)) == ((20, 24), 20, 2, 20)
    torch.zeros(3).to(weight.dtype)
    torch.is_floating_point(weight)
    assert not composed
    weight.sum()
    assert len(composed) == 1


def test_gradients_reach_both_layers() -> None:
    _, _, pair = made("linear")
    x = torch.randn(3, 24, dtype=torch.float64)
    gradients = [
        torch.autograd.grad(output.square().sum(), [pair[0].weight, pair[1].weight])
        for output in (F.linear(x, pair.weight), pair(x) - pair.bias)
    ]
    torch.testing.assert_close(gradients[0], gradients[1])
    assert pair.weight.requires_grad
    assert not pair.weight.detach().requires_grad
    assert not pair.requires_grad_(False).weight.requires_grad


def test_a_weight_cannot_be_changed_behind_the_layers() -> None:
    _, _, pair = made("linear")
    with pytest.raises(AttributeError, match="cannot be set"):
        pair.weight = nn.Parameter(torch.zeros(20, 24))
    for change in (
        lambda: nn.init.zeros_(pair.weight),
        lambda: pair.weight.data.zero_(),
        lambda: pair.weight.detach().mul_(2),
        lambda: pair.weight.__setitem__(0, 1.0),
        lambda: pair.weight.requires_grad_(False),
    ):
        with pytest.raises(RuntimeError, match="would change a copy, so change those"):
            change()
    pair.bias = nn.Parameter(torch.zeros(20, dtype=torch.float64))
    assert pair[1].bias is pair.bias


@pytest.mark.parametrize("name", LAYERS)
def test_a_pair_is_copied_moved_and_pickled_as_any_module(name: str) -> None:
    _, low, pair = made(name, "spatial")
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    for again in (copy.deepcopy(pair), torch.load(file, weights_only=False)):
        torch.testing.assert_close(again.weight + 0, low.weight)
    assert copy.deepcopy(pair).half().weight.dtype == torch.float16
    assert copy.deepcopy(pair).to("meta").weight.is_meta
    assert repr(pair).startswith("PlainPair(")
    assert type(pair[:1]) is nn.Sequential
    assert [*pair] == [pair[0], pair[1]]


@pytest.fixture
def unchecked() -> Any:
    """A trace hands proxies to functions whose annotations say Tensor."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_a_trace_of_torch_fx_follows_the_layers_of_a_weight(unchecked: Any) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = made("transposed 2d", "spatial")[2]

        def forward(self, x: Any) -> Any:
            return self.conv(x) * self.conv.weight.sum()

    model, x = Reads(), torch.randn(2, 12, 4, 4, dtype=torch.float64)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))
    with torch.no_grad():
        model.conv[0].weight.zero_()
    assert not traced(x).any(), "the trace must hold no copy of the weight"


def test_a_detached_weight_may_be_differentiated_by_and_the_weight_itself_not_frozen() -> None:
    low = sp.factorize(nn.Linear(7, 5), rank=2)
    weight = low.weight.detach().requires_grad_()
    weight.square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * low.dense_weight("weight").detach())
    for frozen in (low.weight, low.weight.detach()):
        with pytest.raises(RuntimeError, match="would change a copy"):
            frozen.add_(1)
    with pytest.raises(RuntimeError, match="requires_grad_ would change a copy"):
        low.weight.requires_grad_(False)
