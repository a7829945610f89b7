"""The singular values are those of the operator; the bound is above them; factors give the same as their product."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.analysis.conv_spectra import conv_singular_values, operator_norm, spectral_norm_bound
from spectrim.analysis.operators import Convolution, operators_of
from spectrim.errors import LayerError, SettingError

GEOMETRIES: list[dict[str, Any]] = [
    {"padding": 1},
    {"padding": "same"},
    {"padding": "valid"},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": 1},
    {"stride": 3, "padding": 1},
    {"padding": 1, "groups": 2},
    {"stride": 2, "padding": 1, "groups": 2},
    {"padding": 2, "dilation": 2},
    {"padding": (2, 1), "dilation": (2, 1), "stride": (3, 2)},
]
KINDS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]


def written_out(layer: nn.Module, channels: int, size: tuple[int, ...]) -> Tensor:
    """Return the operator's singular values, by the layer itself on unit vectors."""
    units = torch.eye(channels * math.prod(size), dtype=torch.float64).reshape(-1, channels, *size)
    bias = getattr(layer, "bias", None)
    with torch.no_grad():
        output = layer(units) - (layer(torch.zeros_like(units[:1])) if bias is not None else 0)
        return torch.linalg.svdvals(output.flatten(1))


@pytest.mark.parametrize("settings", GEOMETRIES, ids=str)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_values_are_those_of_the_operator_and_the_bound_is_above(settings: dict[str, Any], mode: str) -> None:
    layer = nn.Conv2d(4, 6, 3, padding_mode=mode, **settings).double()
    for size in ((12, 6),) if mode == "circular" else ((12, 6), (5, 7)):  # circular sizes are divisible by the strides
        true = written_out(layer, 4, size)
        values = conv_singular_values(layer, size)
        torch.testing.assert_close(values, true, rtol=0, atol=1e-10)
        for method in ("symbol", "unfoldings", "taps"):
            assert spectral_norm_bound(layer, method) >= float(true[0]) * (1 - 1e-12)


@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"groups": 2}, {"dilation": 3}], ids=str)
def test_circular_padding_is_exact_by_the_symbol(settings: dict[str, Any]) -> None:
    dilation = settings.get("dilation", 1)
    layer = nn.Conv2d(4, 4, (3, 5), padding=(dilation, 2 * dilation), padding_mode="circular", **settings).double()
    size = (6, 12)
    torch.testing.assert_close(conv_singular_values(layer, size, "circular"), written_out(layer, 4, size), rtol=0, atol=1e-10)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_every_number_of_axes(axes: int) -> None:
    layer = KINDS[axes - 1](2, 3, 3, padding=1, padding_mode="circular", stride=2).double()
    torch.testing.assert_close(conv_singular_values(layer, 4), written_out(layer, 2, (4,) * axes), rtol=0, atol=1e-10)


@pytest.mark.parametrize("settings", [{"padding": 1}, {"stride": 2, "padding": 1}, {"stride": (1, 2), "padding": 1, "groups": 2}], ids=str)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
def test_factors_and_merged_pairs_have_the_values_of_their_product(settings: dict[str, Any], mode: str, scheme: Any) -> None:
    low = sp.factorize(nn.Sequential(nn.Conv2d(8, 6, 3, padding_mode=mode, **settings).double()), scheme, sp.match("*"))
    low = sp.prune(low, {"0": 2})
    merged = sp.merge(low)
    assert len(operators_of(low[0])) == len(operators_of(merged[0])) == 2
    true = written_out(merged[0], 8, (6, 6))
    for layer in (low[0], merged[0]):
        torch.testing.assert_close(conv_singular_values(layer, 6), true, rtol=0, atol=1e-10)
        if mode == "circular":
            torch.testing.assert_close(conv_singular_values(layer, 6, "circular"), true, rtol=0, atol=1e-10)
        assert spectral_norm_bound(layer) >= float(true[0]) * (1 - 1e-12)
        composed = Convolution(low[0].weight.detach() + 0, low[0].stride, low[0].padding, 1, low[0].groups, mode)
        assert spectral_norm_bound(layer) == pytest.approx(spectral_norm_bound(composed), rel=1e-9)


def test_linear_layers_have_the_values_of_their_matrix() -> None:
    layer = nn.Linear(7, 5).double()
    true = torch.linalg.svdvals(layer.weight.detach())
    low = sp.factorize(nn.Sequential(layer), where=sp.match("*"))
    for one in (layer, low[0]):
        torch.testing.assert_close(conv_singular_values(one), true, rtol=0, atol=1e-12)
        assert spectral_norm_bound(one) == pytest.approx(float(true[0]))
        assert operator_norm(one) == pytest.approx(float(true[0]))


def test_a_mean_of_three_by_hand() -> None:
    """``|1 + 2 cos w| / 3`` at six frequencies: 1, 2/3 twice, 0 twice, 1/3."""
    average = Convolution(torch.full((1, 1, 3), 1 / 3, dtype=torch.float64), padding_mode="circular")
    expected = torch.tensor([1, 2 / 3, 2 / 3, 1 / 3, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(conv_singular_values(average, 6), expected, rtol=0, atol=1e-12)


def test_a_tridiagonal_toeplitz_matrix_by_hand() -> None:
    """Zero padding: the eigenvalues of ``tridiag(1, 2, 1)`` of size n are ``2 + 2 cos(pi k / (n + 1))``."""
    kernel = torch.tensor([[[1.0, 2.0, 1.0]]])
    expected = 2 + 2 * torch.cos(math.pi * torch.arange(1, 6, dtype=torch.float64) / 6)
    torch.testing.assert_close(conv_singular_values(kernel, 5), expected, rtol=0, atol=1e-12)


def test_approximations_have_as_many_values_and_approach_the_exact_ones() -> None:
    kernel = torch.randn(4, 3, 3, 3)
    errors: dict[str, list[float]] = {"circular": [], "symbol": []}
    for size in (4, 8, 12):
        exact = conv_singular_values(kernel, size)
        for method, found in errors.items():
            values = conv_singular_values(kernel, size, method)  # type: ignore[arg-type]
            assert len(values) == len(exact)
            found.append(float((values - exact).norm() / exact.norm()))
    assert all(found == sorted(found, reverse=True) for found in errors.values())
    assert max(errors["circular"][-1], errors["symbol"][-1]) < 0.1


def test_the_bound_is_tight_and_a_finer_grid_tightens_it() -> None:
    kernel = torch.randn(4, 3, 3, 3)
    bounds = [spectral_norm_bound(kernel, grid=grid) for grid in (8, 32, 256)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[1] / bounds[2] < 1.01
    assert operator_norm(kernel, 16) <= bounds[2] <= 1.05 * operator_norm(kernel, 16)
    assert operator_norm(kernel, 9) == pytest.approx(float(conv_singular_values(kernel, 9)[0]), rel=1e-8)


def test_the_bound_holds_between_coarse_frequencies() -> None:
    """A kernel whose symbol peaks between the points of the grid: ``|1 - e^{5 i w}|`` is 0 on a grid of five, at most 2."""
    kernel = torch.zeros(1, 1, 6)
    kernel[..., 0], kernel[..., -1] = 1, -1
    for grid in range(6, 40):
        assert spectral_norm_bound(kernel, grid=grid) >= 2 - 1e-12
    with pytest.raises(SettingError, match="grid must be an integer above the degree 5"):
        spectral_norm_bound(kernel, grid=5)


def test_circular_padding_wider_than_the_kernel_repeats_outputs_and_has_no_bound() -> None:
    layer = nn.Conv1d(1, 1, 1, padding=1, padding_mode="circular", bias=False).double()
    nn.init.ones_(layer.weight)
    assert float(conv_singular_values(layer, 2)[0]) == pytest.approx(math.sqrt(2))  # each of the two inputs is written twice
    with pytest.raises(SettingError, match="padding must be no wider than the kernel"):
        spectral_norm_bound(layer)


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (4, 6, 3, 5)])
def test_circular_spectra_and_norms_agree_with_orthogonium(shape: tuple[int, ...]) -> None:
    """It has the extremes of circular spectra, and bounds of norms by Gram iterations: the circular one converges to the norm itself."""
    fast = pytest.importorskip("orthogonium.layers.conv.AOC.fast_block_ortho_conv")
    bounds = pytest.importorskip("orthogonium.layers.conv.singular_values.delattre24")
    kernel = torch.randn(shape).double()
    values = conv_singular_values(Convolution(kernel, padding_mode="circular"), 8)
    least, largest, _ = fast.conv_singular_values_numpy(kernel[None].numpy(), (8, 8))
    assert (float(values[0]), float(values[-1])) == pytest.approx((largest, least), rel=1e-10)
    assert float(bounds.compute_delattre2023(kernel.clone(), 8, n_iter=12)) == pytest.approx(float(values[0]), rel=1e-3)
    if shape[2] == shape[3]:
        theirs = float(bounds.compute_delattre2024(kernel, n_iter=3))  # for zero padding and images of every size
        assert operator_norm(kernel, 16) <= spectral_norm_bound(kernel, grid=64) <= theirs


def test_what_has_no_operator_here_is_refused() -> None:
    with pytest.raises(LayerError, match="has no operator that is known here"):
        conv_singular_values(nn.ConvTranspose2d(2, 2, 3), 4)
    with pytest.raises(LayerError, match="pads by 'reflect'"):
        spectral_norm_bound(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(LayerError):
        operators_of(sp.factorize(nn.Sequential(nn.Embedding(5, 4)), where=sp.match("*"))[0])
    with pytest.raises(SettingError, match="divisible by the stride"):
        conv_singular_values(nn.Conv2d(2, 2, 3, 2, 1), 5, "circular")
    with pytest.raises(SettingError, match="entries"):
        conv_singular_values(nn.Conv2d(16, 16, 3, padding=1), 64)
    with pytest.raises(SettingError, match="size must be 2 integers >= 1"):
        conv_singular_values(nn.Conv2d(2, 2, 3), (4, 4, 4))
