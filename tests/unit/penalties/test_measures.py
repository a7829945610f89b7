"""Measures of rank: gradients, values by hand, and what they do to a spectrum."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.layers import named_factors
from spectrim.penalties import L1, CumulativeShrinkage, EffectiveRank, HoyerSquare, LogDeterminant, Schatten
from spectrim.penalties.measures import effective_rank

MEASURES = [sp.Hoyer(0.7), HoyerSquare(0.7), L1(0.7), EffectiveRank(0.7), LogDeterminant(0.7), Schatten(0.7), CumulativeShrinkage(0.7)]
each = pytest.mark.parametrize("penalty", MEASURES, ids=lambda penalty: type(penalty).__name__)


class OfSpectrum(nn.Module):
    """Calls a penalty of a factorized layer as a function of its singular values."""

    def __init__(self, penalty: Any, size: int) -> None:
        super().__init__()
        self.low, self.penalty = sp.factorize(nn.Linear(size, size).double(), where="*"), penalty

    def forward(self) -> Tensor:
        return self.penalty(self.low)

    def at(self, S: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(self, {"low.factors.weight.S": S}, ())
        return found


@each
@pytest.mark.parametrize("spectrum", [[3.0, -1.5, 0.4, 0.02], [2.0, 1.9, -1.8, 1.7]], ids=["falling", "flat"])
def test_gradients_pass_gradcheck(penalty: Any, spectrum: list[float]) -> None:
    function = OfSpectrum(penalty, 4)
    assert torch.autograd.gradcheck(function.at, (torch.tensor(spectrum, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize("scheme", ["tucker", "cp", "tt"])
@each
def test_they_see_the_spectra_of_every_form_of_a_kernel(penalty: Any, scheme: Any) -> None:
    low = sp.factorize(nn.Conv2d(3, 6, 3), scheme)
    value = penalty(low)
    value.backward()
    ((_, form),) = named_factors(low)
    whole = 0.0
    for spectrum in form.values():
        size = len(spectrum)
        of_one = OfSpectrum(penalty, size).at(spectrum.detach().double())
        whole += float(of_one)
    assert float(value.detach()) == pytest.approx(whole, rel=1e-5)
    gradients = [part.grad for part in form.parameters() if part.grad is not None]
    assert gradients
    assert all(bool(torch.isfinite(gradient).all()) and bool(gradient.any()) for gradient in gradients)


def test_the_effective_rank_of_known_spectra() -> None:
    """``(2, 1, 1)``: shares 1/2, 1/4, 1/4, entropy 3/2 ln 2, effective rank 2 sqrt 2."""
    S = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 1.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(effective_rank(S, 1e-12), torch.tensor([8.0**0.5, 3.0, 1.0, 1.0], dtype=torch.float64))
    exact, bounded = effective_rank(S, 1e-15), effective_rank(S, 1e-3)
    assert bool((bounded <= exact).all())
    assert bool((bounded >= exact * (1 - 3 * 1e-3)).all())


def test_a_scale_free_measure_pushes_large_values_up_and_small_ones_down() -> None:
    for penalty, free in ((EffectiveRank(1.0), True), (sp.Hoyer(1.0), True), (LogDeterminant(1.0), False), (Schatten(1.0), False)):
        S = torch.tensor([4.0, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(OfSpectrum(penalty, 3).at(S), S)
        assert bool(slope[0] < 0) == free
        assert float(slope[2]) > float(slope[1]) > float(slope[0])
        if free:
            assert float(slope @ S.detach()) == pytest.approx(0.0, abs=1e-5)  # nothing changes along the spectrum itself


def test_limits_of_the_measures() -> None:
    S = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    assert float(OfSpectrum(Schatten(1.0, p=1.0), 3).at(S)) == pytest.approx(4.5)  # the nuclear norm
    small = float(OfSpectrum(LogDeterminant(1.0, scale=1e6), 3).at(S))
    assert small == pytest.approx(4.5e-6, rel=1e-5)  # far below the scale it is the nuclear norm in units of it


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: EffectiveRank(1.0, eps=0.0), r"EffectiveRank: eps must be a number in \(0, 0.01\]"),
        (lambda: LogDeterminant(1.0, scale=-1.0), "LogDeterminant: scale must be a finite number > 0"),
        (lambda: Schatten(1.0, p=0.0), r"Schatten: p must be a number in \(0, 1\]"),
        (lambda: Schatten(1.0, eps=0.0), "Schatten: eps must be a finite number > 0"),
    ],
)
def test_settings_are_checked(make: Any, rule: str) -> None:
    with pytest.raises(SettingError, match=rule):
        make()
