"""Limits hold, cost nothing below, and the clipped kernel is nearer than a scaled one."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import spectrim as sp
from spectrim.analysis.conv_spectra import conv_singular_values, spectral_norm_bound
from spectrim.analysis.norm_limits import OperatorNorm, clip_norm, limit_norm, taps_of
from spectrim.analysis.operators import Convolution
from spectrim.analysis.symbols import sampled_norm, symbol
from spectrim.errors import LayerError, SettingError
from spectrim.protocols import Penalty


def parts() -> list[Convolution]:
    random = torch.randn
    return [
        Convolution(random(4, 3, 3, 3).double()),
        Convolution(random(4, 3, 3, 2).double(), stride=(2, 1)),
        Convolution(random(4, 2, 3, 1).double(), groups=2),
        Convolution(random(4, 3, 3).double(), stride=3),
        Convolution(random(4, 3).double()),
    ]


@pytest.mark.parametrize("index", range(5))
def test_a_clipped_kernel_is_within_the_limit_nearer_than_a_scaled_one_and_stays(index: int) -> None:
    part = parts()[index]
    limit = spectral_norm_bound(part) / 2
    clipped = replace(part, kernel=clip_norm(part, limit))
    assert spectral_norm_bound(clipped) <= limit * (1 + 1e-12)
    if part.axes < 2:
        assert float(conv_singular_values(clipped, 6 if part.axes else ())[0]) <= limit * (1 + 1e-12)
    assert float((clipped.kernel - part.kernel).norm()) < float(part.kernel.norm()) / 2
    torch.testing.assert_close(clip_norm(clipped, limit * (1 + 1e-12)), clipped.kernel)  # the last digit of the last scaling
    assert torch.equal(clip_norm(part, 2 * limit + 1e-9), part.kernel)


def test_no_feasible_kernel_nearby_is_much_nearer() -> None:
    part = parts()[3]
    limit = spectral_norm_bound(part) / 2
    distance = float((clip_norm(part, limit, rounds=200) - part.kernel).norm())
    for scale in (0.01, 0.1, 0.5):
        for _ in range(5):
            other = part.kernel + distance * scale * torch.randn_like(part.kernel) / part.kernel.numel() ** 0.5
            feasible = clip_norm(replace(part, kernel=other), limit, rounds=5)
            assert float((feasible - part.kernel).norm()) >= 0.99 * distance  # 200 rounds have converged to 1 %


@pytest.mark.parametrize("index", range(5))
def test_the_kernel_of_its_own_symbol_is_itself(index: int) -> None:
    part = parts()[index]
    for count in (7, 8):
        grid = [count] * part.axes
        torch.testing.assert_close(taps_of(part, symbol(part, grid, (1,) * part.axes), grid), part.kernel)


def test_of_a_matrix_the_projection_clips_singular_values() -> None:
    matrix = torch.randn(5, 7).double()
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(clip_norm(matrix, 1.5), (U * S.clamp(max=1.5)) @ Vh)


def test_the_penalty_is_the_excess_and_its_gradient_that_of_finite_differences() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, 2), nn.Flatten(), nn.Linear(3, 2)).double()
    penalty = OperatorNorm(0.3, limit=0.5, grid=8)
    assert isinstance(penalty, Penalty)
    expected = sum(max(0.0, float(sampled_norm((Convolution(model[i].weight.detach(), model[i].stride),), 8)) - 0.5) for i in (0, 2))
    expected += max(0.0, float(torch.linalg.matrix_norm(model[4].weight.detach(), 2)) - 0.5)
    value = penalty(model)
    assert value.item() == pytest.approx(0.3 * expected, rel=1e-9)
    value.backward()
    weight, step = model[0].weight, 1e-6
    for place in ((0, 0, 0, 0), (2, 1, 1, 2)):
        slope = float(weight.grad[place])
        with torch.no_grad():
            weight[place] += step
            above = penalty(model).item()
            weight[place] -= 2 * step
            below = penalty(model).item()
            weight[place] += step
        assert slope == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-8)


def test_factorized_layers_pay_what_the_dense_ones_do_and_nothing_is_free_of_charge_below() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 2)).double()
    low = sp.factorize(model, where=sp.match("*"))
    penalty = OperatorNorm(1.0, limit=0.1)
    assert penalty(low).item() == pytest.approx(penalty(model).item(), rel=1e-9)
    penalty(low).backward()
    assert all(parameter.grad is not None for name, parameter in low.named_parameters() if "factors" in name)
    assert OperatorNorm(1.0, limit=100.0)(model).item() == 0
    assert float(OperatorNorm(1.0, 0.0, where=lambda name, layer: False)(model)) == 0


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 8, 3, 2, padding=1), nn.Conv1d(4, 4, 5, groups=2), nn.Linear(9, 5)], ids=repr)
def test_a_limited_layer_stays_within_the_limit_while_it_trains(layer: nn.Module) -> None:
    shape = {nn.Conv2d: (2, 3, 8, 8), nn.Conv1d: (2, 4, 9), nn.Linear: (2, 9)}[type(layer)]
    limit_norm(layer, 0.3)
    optimizer, x = torch.optim.SGD(layer.parameters(), 1.0), torch.randn(shape)
    for _ in range(10):
        optimizer.zero_grad()
        (-layer(x).square().mean()).backward()
        optimizer.step()
        assert spectral_norm_bound(layer) <= 0.3 * (1 + 1e-5)  # float32
    assert spectral_norm_bound(layer) > 0.29
    before = layer(x)
    parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer(x), before)
    assert isinstance(layer.weight, nn.Parameter)


def test_settings_outside_their_range_are_refused() -> None:
    with pytest.raises(SettingError, match="limit must be a finite number > 0"):
        clip_norm(torch.eye(2), 0.0)
    with pytest.raises(SettingError, match="weight must be a finite number >= 0"):
        OperatorNorm(-1.0)
    with pytest.raises(LayerError, match="cannot be limited"):
        limit_norm(nn.ConvTranspose2d(2, 2, 3), 1.0)
    with pytest.raises(LayerError, match="is a product of two operators"):
        clip_norm(sp.factorize(nn.Sequential(nn.Linear(4, 4)), where=sp.match("*"))[0], 1.0)
