"""The laws of a penalty, over `spectrim.penalties.METHODS`."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import spectrim as sp
from spectrim.layers import Factors, named_factors
from spectrim.penalties import METHODS
from spectrim.protocols import Penalty

EVERYTHING = sp.match("*")
SPARSITY = [method for method in METHODS if method is not sp.Orthogonality]
SCALE_FREE = [sp.Hoyer, sp.HoyerSquare]
every_method = pytest.mark.parametrize("method", METHODS)


def orthogonality(U: NDArray[Any], S: NDArray[Any], Vh: NDArray[Any]) -> float:
    r = len(S)
    return float((np.sum((U.T @ U - np.eye(r)) ** 2) + np.sum((Vh @ Vh.T - np.eye(r)) ** 2)) / r**2)


# The formulas of shared/specs/svd-training.md, of one block, in numpy float64.
FORMULAS = {
    sp.Orthogonality: orthogonality,
    sp.Hoyer: lambda U, S, Vh: np.abs(S).sum() / np.sqrt((S**2).sum()) - 1,
    sp.HoyerSquare: lambda U, S, Vh: np.abs(S).sum() ** 2 / (S**2).sum() - 1,
    sp.L1: lambda U, S, Vh: np.abs(S).sum(),
}


def network(dtype: torch.dtype = torch.float64, rank: int | None = None) -> nn.Module:
    """Linear, grouped convolution, recurrent layer and a tied pair, with factors that are neither orthonormal nor positive."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Linear(7, 5), nn.LSTM(5, 3), nn.Linear(3, 4), nn.Linear(3, 4))
    model[4].weight = model[3].weight
    low = sp.factorize(model.to(dtype), "channel", EVERYTHING, rank=rank)
    with torch.no_grad():
        for _, factors in named_factors(low):
            for parameter in factors.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64).to(parameter.dtype))
    return low


def by_formula(method: type, model: nn.Module) -> float:
    """Sum over weights, tied ones once, and over the blocks of each."""
    total = 0.0
    for _, factors in named_factors(model):
        U, S, Vh = (p.detach().double().numpy() for p in (factors.U, factors.S, factors.Vh))
        blocks = [(U, S, Vh)] if S.ndim == 1 else list(zip(U, S, Vh, strict=True))
        total += sum(FORMULAS[method](*block) for block in blocks)
    return total


def set_spectra(model: nn.Module, spectrum: Any) -> None:
    with torch.no_grad():
        for _, factors in named_factors(model):
            factors.S.copy_(spectrum(factors.S))


def gradients(method: type, model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Value and the gradients of what it depends on."""
    value = method(0.7)(model)
    found = torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return value, [gradient for gradient in found if gradient is not None]


def only_rank_one(S: Tensor) -> Tensor:
    return torch.where(torch.arange(S.shape[-1]) == 1, -2.5, torch.zeros_like(S))


@every_method
def test_is_a_penalty(method: type) -> None:
    assert isinstance(method(0.5), Penalty)


@every_method
def test_value_equals_the_formula_and_is_not_negative(method: type) -> None:
    model = network()
    value = method(0.7)(model)
    assert value.shape == ()
    assert value.dtype == torch.float64
    assert float(value.detach()) == pytest.approx(0.7 * by_formula(method, model), rel=1e-12)
    assert float(value.detach()) > 0
    assert float(method(0.0)(model).detach()) == 0


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_layers_are_judged_in_float32(method: type, dtype: torch.dtype) -> None:
    model = network(dtype)
    for value in (method(1.0)(model), method(1.0)(model.to(dtype))):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), torch.tensor(by_formula(method, model)).double(), rtol=1.3e-6, atol=1e-5)  # float32 sums
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(method(1.0)(model), method(1.0)(model.to(dtype)))
    mixed = nn.ModuleList([network(dtype), network(torch.float64)])
    assert float(method(1.0)(mixed).detach()) == pytest.approx(sum(by_formula(method, part) for part in mixed), rel=1e-5)  # float32 half


@every_method
def test_zero_at_the_ideal_point(method: type) -> None:
    low = sp.factorize(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Linear(7, 5)).double(), where=EVERYTHING)
    if method is sp.L1:
        set_spectra(low, torch.zeros_like)
    elif method is not sp.Orthogonality:
        set_spectra(low, only_rank_one)
    assert 0 <= float(method(1.0)(low).detach()) < 1e-12
    low = sp.factorize(nn.Linear(6, 5).double(), rank=1)
    assert 0 <= float(method(1.0)(low).detach()) < (1e-12 if method is not sp.L1 else 10.0)


@pytest.mark.parametrize("method", SPARSITY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "spectrum",
    [
        torch.zeros_like,
        only_rank_one,
        torch.ones_like,
        lambda S: S * 1e-30,
        lambda S: S * 1e-36,
        lambda S: S * 1e-40,  # subnormal in float32
        lambda S: S * 1e30,
        lambda S: torch.where(only_rank_one(S) != 0, 1e30, 1e-30).to(S.dtype),
    ],
    ids=["zero", "rank one", "flat", "tiny", "tinier", "subnormal", "huge", "both"],
)
def test_value_and_gradient_are_finite_at_every_spectrum(method: type, spectrum: Any, dtype: torch.dtype) -> None:
    model = network(dtype)
    set_spectra(model, spectrum)
    value, found = gradients(method, model)
    assert found
    assert torch.isfinite(value)
    assert all(torch.isfinite(gradient).all() for gradient in found)
    assert float(value.detach()) >= 0


@pytest.mark.parametrize("method", SPARSITY)
def test_a_layer_without_singular_values_contributes_nothing(method: type) -> None:
    model = network()
    set_spectra(model, torch.zeros_like)
    value, found = gradients(method, model)
    assert float(value.detach()) == 0
    assert not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("method", SCALE_FREE)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_scale_free(method: type, scale: float) -> None:
    for dtype in (torch.float32, torch.float64):
        model = network(dtype)
        before = method(1.0)(model).detach()
        set_spectra(model, lambda S: S * scale)
        torch.testing.assert_close(method(1.0)(model).detach(), before)


@every_method
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_value_and_gradient_are_finite_at_extreme_factors(method: type, scale: float) -> None:
    model = network(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    value, found = gradients(method, model)
    assert torch.isfinite(value)
    assert all(torch.isfinite(gradient).all() for gradient in found)


@every_method
def test_gradient_agrees_with_finite_differences(method: type) -> None:
    model = network(rank=3)
    parameters = [p for _, factors in named_factors(model) for p in factors.parameters()]
    value = method(0.7)(model)
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    step = 1e-6
    checked = 0
    for parameter, gradient in zip(parameters, found, strict=True):
        direction = torch.randn(parameter.shape, dtype=parameter.dtype)
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                parameter.add_(sign * step * direction)
                ends.append(float(method(0.7)(model)))
                parameter.sub_(sign * step * direction)
        expected = 0.0 if gradient is None else float((gradient * direction).sum())
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(expected, rel=1e-7, abs=1e-8)  # central differences with a step of 1e-6
        checked += expected != 0
    assert checked >= len(parameters) // 3


@every_method
def test_a_model_without_factors_costs_nothing(method: type) -> None:
    for model in (nn.Linear(3, 3), nn.Identity()):
        assert float(method(1.0)(model)) == 0


@every_method
def test_weight_is_validated(method: type) -> None:
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{method.__name__}: weight must be a finite number >= 0, got"):
            method(weight)


@every_method
def test_frozen_as_a_value(method: type) -> None:
    assert method(0.5) == method(0.5)
    assert hash(method(0.5)) == hash(method(0.5))
    with pytest.raises(AttributeError):
        method(0.5).weight = 1.0


def test_factors_are_found_wherever_they_are() -> None:
    names = [name for name, factors in named_factors(network()) if isinstance(factors, Factors)]
    assert names == ["0", "1", "2.weight_ih_l0", "2.weight_hh_l0", "3"]
