"""Layers by rows or columns of their weight: the dense function, every kind of layer, every way to ship them."""

import copy
import io
import subprocess
import sys
import warnings
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectrim import linalg
from spectrim.linalg.interpolative import interpolate
from spectrim.plain.interpolative import PlainColumns, PlainRows
from spectrim.plain.writing import interpolative_layer

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 20), (3, 5, 24)),
    "linear without bias": (lambda: nn.Linear(20, 24, bias=False), (20,)),
    "conv1d of transformers": (lambda: Conv1D(20, 24), (2, 3, 24)),
    "embedding": (lambda: nn.Embedding(50, 20, padding_idx=3), (4, 5)),
    "pointwise": (lambda: nn.Conv2d(12, 16, 1, stride=2), (2, 12, 6, 7)),
    "conv1d": (lambda: nn.Conv1d(12, 16, 3, stride=2, padding=1), (12, 9)),
    "conv2d": (
        lambda: nn.Conv2d(12, 16, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, bias=False),
        (2, 12, 9, 11),
    ),
    "conv2d same": (lambda: nn.Conv2d(12, 16, 3, padding="same", padding_mode="reflect"), (2, 12, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(12, 16, 3), (1, 12, 4, 5, 6)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(12, 16, 3, stride=2), (2, 12, 5)),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(12, 16, (3, 5), stride=(2, 3), padding=1, output_padding=1, groups=2),
        (2, 12, 4, 5),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(12, 16, 3, 2), (1, 12, 3, 3, 3)),
}
SIDES = ["rows", "columns"]
CASES = [(name, side) for name in LAYERS for side in SIDES if (name, side) != ("embedding", "rows")]


def matrix_of(layer: Any, side: str) -> Tensor:
    """Return the weight as the matrix whose rows or columns are kept: ``out x (in * taps)``, or ``(out * taps) x in``."""
    weight = layer.weight.detach()
    if not hasattr(layer, "kernel_size"):
        return weight.T if hasattr(layer, "nf") else weight
    groups = layer.groups
    if side == "rows":
        return linalg.to_matrix(weight, "channel", groups, layer.transposed)
    blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    blocks = blocks.transpose(1, 2) if layer.transposed else blocks
    matrix = blocks.movedim(2, -1).flatten(1, -2)
    return matrix if groups > 1 else matrix[0]


def weight_of(layer: Any, side: str, matrix: Tensor) -> Tensor:
    """The inverse of `matrix_of`."""
    if not hasattr(layer, "kernel_size"):
        return matrix.T if hasattr(layer, "nf") else matrix
    groups = layer.groups
    if side == "rows":
        return linalg.from_matrix(matrix, layer.weight.shape, "channel", groups, layer.transposed)
    blocks = matrix.reshape(groups, -1, *layer.kernel_size, matrix.shape[-1]).movedim(-1, 2)
    return (blocks.transpose(1, 2) if layer.transposed else blocks).reshape(layer.weight.shape)


def made(name: str, side: str, where: str = "start", rank: int = 3) -> tuple[Any, Any, Tensor]:
    """Return a dense layer of rank 3, the layer that writes it, and inputs; in fp64."""
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    dense: Any = build().double()
    matrix = matrix_of(dense, side)
    U, S, Vh = (part[..., :rank] if k < 2 else part[..., :rank, :] for k, part in enumerate(linalg.svd(matrix)))
    low = (U * S.unsqueeze(-2)) @ Vh
    with torch.no_grad():
        dense.weight.copy_(weight_of(dense, side, low))
        if getattr(dense, "bias", None) is not None:
            dense.bias.normal_()
    form = interpolate(U, Vh, S, side=side, pivots=where == "pivots")  # type: ignore[arg-type]
    kept, mix, start = form.kept, form.mix, form.start
    if where in ("middle", "wrapped", "end"):
        start, kept, mix = window_at(low, side, rank, where)
    layer = interpolative_layer(dense, side, kept, mix, start=start, order=form.order)  # type: ignore[arg-type]
    x = torch.randint(50, shape) if name == "embedding" else torch.randn(shape, dtype=torch.float64)
    return dense, layer, x


def window_at(low: Tensor, side: str, rank: int, where: str) -> tuple[int, Tensor, Tensor]:
    """Write a matrix by one given window."""
    tall = low if side == "rows" else low.mT
    size = tall.shape[-2]
    start = {"middle": 1, "wrapped": size - 1, "end": size - rank}[where]
    order = linalg.interpolative.window_order(size, rank, start)
    kept, others = tall[..., order[:rank], :], tall[..., order[rank:], :]
    mix = others @ torch.linalg.pinv(kept)
    return (start, kept, mix) if side == "rows" else (start, kept.mT, mix.mT)


@pytest.mark.parametrize("where", ["start", "middle", "wrapped", "end", "pivots"])
@pytest.mark.parametrize(("name", "side"), CASES)
def test_it_is_the_dense_layer(name: str, side: str, where: str) -> None:
    dense, layer, x = made(name, side, where)
    assert type(layer) is (PlainRows if side == "rows" or name == "embedding" else PlainColumns)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.weight + 0, dense.weight, rtol=1e-9, atol=1e-9)
    if getattr(dense, "bias", None) is not None:
        torch.testing.assert_close(layer.bias + 0, dense.bias.data, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "side"), CASES)
def test_parameters_are_as_many_as_counted(name: str, side: str) -> None:
    dense, layer, _ = made(name, side)
    *blocks, out, in_ = matrix_of(dense, side).shape
    bias = dense.bias.numel() if getattr(dense, "bias", None) is not None else 0
    assert sum(p.numel() for p in layer.parameters()) == torch.Size(blocks).numel() * 3 * (out + in_ - 3) + bias
    assert not list(layer.buffers())
    names = {"kept.weight", "mix.weight"} | ({"kept.bias"} if bias else set()) | ({"mix.bias"} if bias and side == "rows" else set())
    assert set(layer.state_dict()) == names
    pivoted = made(name, side, "pivots")[1]
    assert set(pivoted.state_dict()) == names | {"gather"}
    assert pivoted.gather.dtype == torch.int32


@pytest.mark.parametrize(("name", "side"), CASES)
def test_it_answers_as_the_dense_layer_does(name: str, side: str) -> None:
    dense, layer, _ = made(name, side)
    settings = {key: value for key, value in vars(dense).items() if not key.startswith("_")}
    assert settings.items() <= vars(layer).items()
    assert hasattr(layer, "bias") == hasattr(dense, "bias")
    if hasattr(dense, "bias"):
        assert (layer.bias is None) == (dense.bias is None)
    for key in ("dtype", "device", "shape", "ndim", "requires_grad", "is_meta", "layout", "itemsize", "nbytes", "is_cuda", "grad"):
        assert getattr(layer.weight, key) == getattr(dense.weight, key), key
    assert isinstance(layer.weight, Tensor)
    assert not isinstance(layer.weight, nn.Parameter), "so that nobody trains or counts it"


def test_metadata_cost_no_product_and_anything_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = made("linear", "rows")[1]
    composed = []
    original = PlainRows._composed
    monkeypatch.setattr(PlainRows, "_composed", lambda self: composed.append(self) or original(self))
    weight = layer.weight
    assert (weight.dtype, weight.shape, len(weight)) == (torch.float64, (20, 24), 20)
    assert not composed
    weight.sum()
    assert len(composed) == 1


@pytest.mark.parametrize("where", ["start", "middle", "pivots"])
@pytest.mark.parametrize(("name", "side"), CASES)
def test_gradients_reach_all_parts_and_are_those_of_the_dense_weight(name: str, side: str, where: str) -> None:
    dense, layer, x = made(name, side, where)
    layer(x).square().sum().backward()
    dense(x).square().sum().backward()
    parts = dict(layer.named_parameters())
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in parts.values())
    weights = [layer.kept.weight, layer.mix.weight]
    chained = torch.autograd.grad((layer.weight * dense.weight.grad).sum(), weights)
    free_of_bias = getattr(dense, "bias", None) is None or side == "columns"
    for own, through in zip(weights, chained, strict=True):
        if free_of_bias and name != "embedding":  # else the bias depends on mix, and padding stops some
            torch.testing.assert_close(own.grad, through, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", SIDES)
def test_fine_tuning_lowers_the_loss(side: str) -> None:
    _, layer, x = made("linear", side)
    target, optimizer = torch.randn(3, 5, 20, dtype=torch.float64), torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_frozen_layers_stay_frozen_and_modes_are_kept() -> None:
    layer = nn.Linear(6, 5).eval()
    layer.weight.requires_grad_(False)
    form = interpolate(*(torch.randn(*shape) for shape in ((5, 2), (2, 6))))
    written = interpolative_layer(layer, "rows", form.kept, form.mix, start=form.start)
    assert not written.training
    assert {name: p.requires_grad for name, p in written.named_parameters()} == {
        "kept.weight": False,
        "kept.bias": True,
        "mix.weight": False,
        "mix.bias": True,
    }
    assert written.weight.dtype == torch.float32
    columns = interpolate(*(torch.randn(*shape) for shape in ((5, 2), (2, 6))), side="columns")
    assert interpolative_layer(layer, "columns", columns.kept, columns.mix, start=columns.start).bias is layer.bias


@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed 2d"])
@pytest.mark.parametrize("side", SIDES)
def test_single_and_half_precision_are_near(name: str, side: str) -> None:
    dense, layer, x = made(name, side)
    expected = dense(x)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):  # 100 and 25 times the type's own rounding
        found = copy.deepcopy(layer).to(dtype)(x.to(dtype)).double()
        assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("where", ["middle", "wrapped", "pivots"])
@pytest.mark.parametrize(("name", "side"), CASES)
def test_it_is_traced_and_exported(name: str, side: str, where: str) -> None:
    dense, layer, x = made(name, side, where)
    expected = dense(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit announces its own end
        torch.testing.assert_close(torch.jit.trace(layer, (x,))(x), expected, rtol=1e-9, atol=1e-9)
    program = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-9, atol=1e-9)


SCRIPT = """
import warnings
import torch
from torch import nn
from spectrim.plain.interpolative import PlainColumns, PlainRows

warnings.simplefilter("ignore")
image = torch.randn(2, 8, 5, 5)
for layer, x in (
    (PlainRows(nn.Linear(8, 2), nn.Linear(2, 4), start=1), torch.randn(3, 8)),
    (PlainRows(nn.Linear(8, 2), nn.Linear(2, 4), start=5), torch.randn(3, 8)),
    (PlainRows(nn.Linear(8, 2), nn.Linear(2, 4), order=torch.randperm(6)), torch.randn(3, 8)),
    (PlainRows(nn.Embedding(9, 2), nn.Linear(2, 4, bias=False), start=4), torch.randint(9, (3, 8))),
    (PlainRows(nn.Conv2d(8, 4, 3, groups=2), nn.Conv2d(4, 6, 1, groups=2), start=1), image),
    (PlainRows(nn.ConvTranspose2d(8, 4, 3), nn.Conv2d(4, 6, 1), start=2), image),
    (PlainColumns(nn.Linear(2, 6), nn.Linear(6, 2, bias=False), start=3), torch.randn(3, 8)),
    (PlainColumns(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(4, 4, 1, groups=2, bias=False), start=3), image),
    (PlainColumns(nn.Conv2d(3, 6, 3), nn.Conv2d(5, 3, 1, bias=False), order=torch.randperm(8)), image),
):
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
print("scripted")
"""


@pytest.mark.slow
def test_it_is_scripted() -> None:
    """In a process of its own, as the plugin that checks shapes here wraps what torch.jit would read."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "scripted", done.stderr


@pytest.fixture
def unchecked() -> Any:
    """A trace hands proxies to functions whose annotations say Tensor."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(("name", "side"), [("linear", "rows"), ("linear", "columns"), ("conv2d", "rows"), ("transposed 2d", "columns")])
def test_a_trace_of_torch_fx_follows_the_parts_of_a_weight(name: str, side: str, unchecked: Any) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = made(name, side)[1]

        def forward(self, x: Any) -> Any:
            return self.layer(x) * self.layer.weight.sum()

    model, x = Reads(), made(name, side)[2]
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))
    with torch.no_grad():
        model.layer.kept.weight.zero_()
        before = traced(x)
    assert not before.any(), "the trace must hold no copy of the weight"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["middle", "pivots"])
@pytest.mark.parametrize(("name", "side"), [("linear", "rows"), ("linear", "columns"), ("conv2d", "rows"), ("conv2d", "columns")])
def test_it_compiles_in_one_graph(name: str, side: str, where: str, unchecked: Any) -> None:
    dense, layer, x = made(name, side, where)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), dense(x), rtol=1e-9, atol=1e-9)
    reads = torch.compile(lambda x: layer(x) * layer.weight.sum() + layer.weight.shape[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(reads(x), dense(x) * dense.weight.sum() + dense.weight.shape[0], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["wrapped", "pivots"])
@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("linear", "rows"),
        ("linear", "columns"),
        ("conv2d", "rows"),
        ("conv2d", "columns"),
        ("embedding", "columns"),
        ("transposed 2d", "rows"),
    ],
)
def test_onnx_runtime_agrees(name: str, side: str, where: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    dense, layer, x = made(name, side, where)
    x = x.float() if x.is_floating_point() else x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(layer.float().eval(), (x,), dynamo=True, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(found, dense.float()(x), rtol=1e-4, atol=1e-4)  # coefficients up to 10, another library's sums


@pytest.mark.parametrize("side", SIDES)
def test_a_transposed_convolution_takes_an_output_size(side: str) -> None:
    dense, layer, x = made("transposed 2d", side)
    size = [7, 16]
    torch.testing.assert_close(layer(x, output_size=size), dense(x, output_size=size), rtol=1e-9, atol=1e-9)
    _, linear, x = made("linear", side)
    with pytest.raises(TypeError, match="only a transposed convolution takes an output_size"):
        linear(x, output_size=size)


@pytest.mark.parametrize("where", ["middle", "pivots"])
@pytest.mark.parametrize(("name", "side"), CASES)
def test_it_is_copied_moved_pickled_and_loaded_as_any_module(name: str, side: str, where: str) -> None:
    dense, layer, x = made(name, side, where)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for again in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        torch.testing.assert_close(again(x), dense(x), rtol=1e-9, atol=1e-9)
    assert copy.deepcopy(layer).half().weight.dtype == torch.float16
    assert copy.deepcopy(layer).to("meta").weight.is_meta
    size = layer.gather.numel() if layer.gather is not None else 0
    order = torch.arange(size) if size else None
    blank = type(layer)(copy.deepcopy(layer.kept), copy.deepcopy(layer.mix), start=layer.start, order=order, conv1d=hasattr(layer, "nf"))
    for part in blank.parameters():
        nn.init.zeros_(part)
    blank.load_state_dict(layer.state_dict())
    torch.testing.assert_close(blank(x), dense(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", SIDES)
def test_kernels_stay_in_their_memory_format(side: str) -> None:
    conv = nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last)
    form = interpolate(*(part[:, :3] if k == 0 else part[:3] for k, part in enumerate(linalg.svd(matrix_of(conv, side))[::2])), side=side)  # type: ignore[arg-type]
    layer = interpolative_layer(conv, side, form.kept, form.mix, start=form.start)  # type: ignore[arg-type]
    x = torch.randn(2, 6, 7, 7).contiguous(memory_format=torch.channels_last)
    assert layer.kept.weight.is_contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    conv.channels_last = False  # type: ignore[assignment]  # what a factorized layer notes
    layer = interpolative_layer(conv, side, form.kept, form.mix, start=form.start)  # type: ignore[arg-type]
    assert layer.kept.weight.is_contiguous()


@pytest.mark.parametrize("side", SIDES)
def test_a_weight_cannot_be_changed_behind_the_layers(side: str) -> None:
    layer = made("linear", side)[1]
    with pytest.raises(AttributeError, match="cannot be set"):
        layer.weight = nn.Parameter(torch.zeros(20, 24))
    with pytest.raises(RuntimeError, match="composed of the weights of its layers"):
        nn.init.zeros_(layer.weight)
    if side == "columns":
        layer.bias = nn.Parameter(torch.zeros(20, dtype=torch.float64))
        assert layer.kept.bias is layer.bias
        return
    with pytest.raises(AttributeError, match="bias is composed"):
        layer.bias = nn.Parameter(torch.zeros(20))
    with pytest.raises(RuntimeError, match="composed of the"):
        nn.init.zeros_(layer.bias)


def test_hooks_on_the_parts_see_every_call() -> None:
    for side in SIDES:
        _, layer, x = made("linear", side)
        seen: list[str] = []
        for name in ("kept", "mix"):
            getattr(layer, name).register_forward_hook(lambda *_, name=name, seen=seen: seen.append(name))
        layer(x)
        assert sorted(seen) == ["kept", "mix"]


def test_parts_that_do_not_fit_are_refused() -> None:
    linear = nn.Linear
    for build, problem in (
        (lambda: PlainRows(linear(8, 2), linear(3, 4), start=0), "same rank"),
        (lambda: PlainRows(linear(8, 2, bias=False), linear(2, 4), start=0), "both have a bias"),
        (lambda: PlainRows(linear(8, 2), linear(2, 4)), "exactly one of start and order"),
        (lambda: PlainRows(linear(8, 2), linear(2, 4), start=6), r"start must be in \[0, 5\]"),
        (lambda: PlainRows(linear(8, 2), linear(2, 4), order=torch.tensor([0, 1, 2, 3, 4, 4])), "each of 0 ... 5 once"),
        (lambda: PlainRows(nn.Conv2d(8, 2, 3), nn.Conv2d(2, 4, 3), start=0), "kernel size 1"),
        (lambda: PlainRows(nn.Conv2d(8, 2, 3), linear(2, 4), start=0), "kernel size 1"),
        (lambda: PlainColumns(linear(2, 6), linear(6, 2), start=0), "no bias"),
    ):
        with pytest.raises(ValueError, match=problem):
            build()
    with pytest.raises(TypeError, match="embedding has no input to mix"):
        PlainColumns(nn.Embedding(2, 6), linear(6, 2, bias=False), start=0)


def test_layers_that_have_no_such_writing_are_refused() -> None:
    kept, mix = torch.randn(2, 6), torch.randn(3, 2)
    for layer, side, problem in (
        (nn.BatchNorm1d(5), "rows", "must be a Linear, an Embedding or a convolution, got BatchNorm1d"),
        (nn.Embedding(5, 6), "rows", "write it by columns"),
        (nn.Embedding(5, 6, max_norm=1.0), "columns", "needs its dense table"),
        (nn.Embedding(5, 6, sparse=True), "columns", "needs its dense table"),
    ):
        with pytest.raises(ValueError, match=problem):
            interpolative_layer(layer, side, kept, mix, start=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing is left to mix"):
        interpolative_layer(nn.Linear(6, 2), "rows", kept, torch.zeros(0, 2), start=0)
    embedding = made("embedding", "columns")[1]
    with pytest.raises(AttributeError, match="bias"):
        _ = embedding.bias
