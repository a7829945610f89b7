"""`CumulativeShrinkage`: L1 with weights that grow along the sorted spectrum."""

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.layers import named_factors
from spectrim.penalties import L1, CumulativeShrinkage
from spectrim.protocols import Penalty


def network() -> nn.Module:
    return sp.factorize(nn.Sequential(nn.Linear(5, 4), nn.Conv2d(4, 6, 3, groups=2)).double(), where=sp.match("*"))


def test_value_equals_the_formula_and_the_gradient_its_weights() -> None:
    model, penalty = network(), CumulativeShrinkage(0.3, concentration=2.0)
    assert isinstance(penalty, Penalty)
    with torch.no_grad():
        for _, factors in named_factors(model):
            factors.S.copy_(torch.randn_like(factors.S))  # of any sign and order
    expected, slopes = 0.0, {}
    for name, factors in named_factors(model):
        S = factors.S.detach().reshape(-1, factors.rank)
        slopes[name] = torch.zeros_like(S)
        for block, row in enumerate(S):
            for place, index in enumerate(row.abs().argsort(descending=True).tolist(), 1):
                weight = 0.3 * (1 - (2 / 3) ** place)
                expected += weight * abs(float(row[index]))
                slopes[name][block, index] = weight * float(row[index].sign())
    value = penalty(model)
    assert value.item() == pytest.approx(expected)
    value.backward()
    for name, factors in named_factors(model):
        torch.testing.assert_close(factors.S.grad, slopes[name].reshape(factors.S.shape))


def test_with_a_small_concentration_it_is_l1_and_with_a_large_one_little() -> None:
    model = network()
    assert CumulativeShrinkage(1.0, 1e-9)(model).item() == pytest.approx(L1(1.0)(model).item())
    assert CumulativeShrinkage(1.0, 1e9)(model).item() < 1e-6


def test_settings_outside_their_range_are_refused() -> None:
    with pytest.raises(SettingError, match="weight"):
        CumulativeShrinkage(-1.0)
    with pytest.raises(SettingError, match="concentration must be a finite number > 0"):
        CumulativeShrinkage(1.0, 0.0)
