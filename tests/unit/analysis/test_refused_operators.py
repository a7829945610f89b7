"""What the tools of analysis are given by others: right, or refused with a reason; never a wrong number without a word."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.analysis.bayes import bayes_svd
from spectrim.analysis.collapse import neural_collapse
from spectrim.analysis.conv_spectra import conv_singular_values, operator_norm, spectral_norm_bound
from spectrim.analysis.convex_program import NeuronGL1, convex_optimum
from spectrim.analysis.duality import alignment, certificate, linear_optimum, suggest_rank, suggest_ranks
from spectrim.analysis.images import compress_image
from spectrim.analysis.lipschitz import lipschitz_bound, lipschitz_lower
from spectrim.analysis.norm_limits import clip_norm, limit_norm
from spectrim.errors import LayerError, SettingError
from spectrim.linalg.quaternion import Quaternions, qsvd
from spectrim.plain.quaternion import QConv1d, QConv2d, QConv3d, QLinear

EVERYTHING = sp.match("*")
NAN = float("nan")


class Doubled(nn.Linear):
    """More than its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Scaled(nn.Linear):
    """Its forward reads the weight."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, 2 * self.weight, self.bias)


class Tripled(nn.Conv2d):
    """More than its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


class Renamed(nn.Linear):
    """No more than its weight."""


def replaced() -> nn.Module:
    layer: Any = nn.Linear(4, 4)
    layer.forward = lambda x: 5 * x
    return layer  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "make",
    [lambda: Doubled(4, 4), lambda: Scaled(4, 4), lambda: Tripled(4, 4, 3), replaced],
    ids=["linear", "of its weight", "convolution", "on the layer"],
)
def test_a_layer_that_does_more_than_its_weight_has_no_certificate(make: Callable[[], nn.Module]) -> None:
    layer = make()
    x = torch.randn(1, 4, 6, 6) if isinstance(layer, nn.Conv2d) else torch.randn(1, 4)
    size = 6 if isinstance(layer, nn.Conv2d) else ()
    for measure in (lambda one: conv_singular_values(one, size), spectral_norm_bound, lambda one: operator_norm(one, size)):
        with pytest.raises(LayerError):
            measure(layer)
    with pytest.raises(LayerError):
        lipschitz_bound(nn.Sequential(layer), x)
    if "forward" not in vars(layer):
        low = sp.factorize(nn.Sequential(layer), where=EVERYTHING, rank=1)
        for model in (low, sp.merge(low)):
            with pytest.raises(LayerError):
                spectral_norm_bound(model[0])
            shape = tuple(x.shape[1:])
            try:  # of a merged pair the trace sees both layers and the factor
                bound = lipschitz_bound(model, x).bound
            except LayerError:
                continue
            assert bound >= float(written_out(copy.deepcopy(model).double(), shape)[0]) * (1 - 1e-6)


def test_a_class_of_another_name_is_taken() -> None:
    layer = Renamed(4, 4)
    low = sp.factorize(nn.Sequential(layer), where=EVERYTHING)
    expected = float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
    for one in (layer, low[0], sp.merge(low)[0]):
        assert spectral_norm_bound(one) == pytest.approx(expected, rel=1e-5)
    assert lipschitz_bound(nn.Sequential(layer), torch.zeros(1, 4)).bound == pytest.approx(expected)


def written_out(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    units = torch.eye(int(torch.tensor(shape).prod()), dtype=torch.float64).reshape(-1, *shape)
    with torch.no_grad():
        return torch.linalg.svdvals((layer(units) - layer(torch.zeros_like(units[:1]))).flatten(1))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: QLinear(12, 8), (12,)),
        (lambda: QConv1d(8, 8, 3, padding=1), (8, 6)),
        (lambda: QConv2d(8, 12, 3, 2, 1), (8, 5, 6)),
        (lambda: QConv3d(4, 8, 2), (4, 3, 3, 3)),
    ],
    ids=["linear", "1d", "2d", "3d"],
)
def test_quaternion_layers_have_the_operator_of_their_real_weight(make: Callable[[], Any], shape: tuple[int, ...]) -> None:
    dense = nn.Sequential(make().double())
    low = sp.factorize(dense, where=EVERYTHING, rank=1)
    for model in (dense, low, sp.merge(low)):
        true = written_out(model[0], shape)
        values = conv_singular_values(model[0], shape[1:])
        torch.testing.assert_close(values[: len(true)], true[: len(values)], rtol=0, atol=1e-10)
        certificate_of = lipschitz_bound(model, torch.zeros(2, *shape, dtype=torch.float64))
        assert certificate_of.bound >= float(true[0]) * (1 - 1e-12)


def test_values_that_are_not_finite_are_refused() -> None:
    layer = nn.Linear(3, 3, bias=False)
    layer.weight.data[0, 0] = NAN
    net = nn.Sequential(layer, nn.ReLU(), nn.Linear(3, 2, bias=False))
    X, Y = torch.randn(5, 3), torch.randn(5, 2)
    data = [(X, torch.tensor([0, 1, 0, 1, 1]))]
    bad = torch.where(torch.eye(3) > 0, NAN, 1.0)
    calls: list[Callable[[], Any]] = [
        lambda: spectral_norm_bound(layer),
        lambda: conv_singular_values(bad),
        lambda: operator_norm(layer),
        lambda: clip_norm(layer, 1.0),
        lambda: lipschitz_bound(net, X),
        lambda: lipschitz_lower(net, X),
        lambda: lipschitz_lower(nn.Linear(3, 2), X[:0]),
        lambda: certificate(net, X, Y, 1.0),
        lambda: certificate(nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)), bad, Y[:3], 1.0),
        lambda: suggest_rank(X, bad[:2].T.repeat(2, 1)[:5], 1.0),
        lambda: suggest_rank(X[:0], Y[:0], 1.0),
        lambda: suggest_ranks({"a": torch.tensor([1.0, NAN])}, 0.1),
        lambda: alignment(nn.Sequential(layer, nn.Linear(3, 3))),
        lambda: convex_optimum(bad, torch.ones(3, 1), NeuronGL1(1.0)),
        lambda: neural_collapse(net, data),
        lambda: bayes_svd(bad),
        lambda: bayes_svd(torch.zeros(3, 4)),
        lambda: compress_image(torch.full((3, 4, 4), NAN), 64),
        lambda: qsvd(Quaternions.of_column(torch.full((4, 2), NAN))),
    ]
    for number, call in enumerate(calls):
        with pytest.raises((LayerError, SettingError)):
            raise AssertionError(f"call {number} gave {call()}")


def test_classes_and_other_sizes_are_no_targets_of_a_regression() -> None:
    X, classes = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    for call in (lambda: suggest_rank(X, classes, 1.0), lambda: linear_optimum(X, classes, 1.0), lambda: certificate(net, X, classes, 1.0)):
        with pytest.raises(SettingError, match="one_hot"):
            call()
    with pytest.raises(SettingError, match="as the network has them"):
        certificate(net, X, torch.randn(5, 3), 1.0)
    with pytest.raises(SettingError, match="as the network has them"):
        certificate(net, torch.randn(5, 4), torch.randn(5, 2), 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_precisions_and_layouts_give_what_their_values_give(dtype: torch.dtype) -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2).to(dtype).to(memory_format=torch.channels_last)
    kernel = layer.weight.detach().double()
    layer.weight.data = layer.weight.data.transpose(2, 3).contiguous().transpose(2, 3)
    same = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2).double()
    same.weight.data = kernel
    torch.testing.assert_close(conv_singular_values(layer, 6), conv_singular_values(same, 6), rtol=0, atol=1e-12)
    assert spectral_norm_bound(layer) == pytest.approx(spectral_norm_bound(same), rel=1e-12)
    X = torch.randn(12, 9).T.to(dtype)
    assert bayes_svd(X).values.tolist() == pytest.approx(bayes_svd(X.double().contiguous()).values.tolist())
    picture = torch.rand(8, 3, 8).permute(1, 0, 2).to(dtype)
    assert compress_image(picture, 128).psnr(picture) == pytest.approx(compress_image(picture.double(), 128).psnr(picture.double()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_limit_holds_for_weights_that_are_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = limit_norm(nn.Conv2d(4, 6, 3, padding=1).to(dtype), 0.5, grid=8)
    assert spectral_norm_bound(layer, grid=8) <= 0.5


def test_bytes_have_a_peak_of_255() -> None:
    picture = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    made = compress_image(picture, 128)
    assert made.psnr(picture) == pytest.approx(made.psnr(picture, peak=255.0))
    assert made.psnr(picture) > 5
