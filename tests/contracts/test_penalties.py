"""The laws of a penalty, over `spectrim.penalties.METHODS`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import formulas
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.forms.svd import Factors
from spectrim.layers import named_factors
from spectrim.penalties import LAWS, METHODS, sums
from spectrim.protocols import Penalty
from spectrim.tables import Row

EVERYTHING = sp.match("*")
DEGREES = {"scale-free": 0, "in a unit": 0, "degree-1": 1, "degree-2": 2}
IDEAL: dict[str, Callable[[Tensor], Tensor]] = {
    "orthonormal": lambda S: S,
    "rank-one": lambda S: only_rank_one(S),
    "definite": torch.zeros_like,
}
"""By law: singular values at which the penalty of orthonormal factors is zero."""


def rows(*laws: str) -> list[Row[Penalty]]:
    """Return the rows that obey at least one of the laws; all rows when none is named."""
    return [row for row in METHODS if not laws or row.laws & set(laws)]


def obeying(*laws: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows(*laws), ids=lambda row: row.label)


every_method = obeying()


def made(row: Row[Penalty], weight: float, **knobs: Any) -> Penalty:
    """Make the row's example with another strength."""
    return replace(row.example, weight=weight, **knobs)


def exact(row: Row[Penalty]) -> float:
    """Relative accuracy of a value in float64: that of seven steps for the polar factor, rounding for the others."""
    return 1e-7 if "dense" in row.laws else 1e-12


def degree(row: Row[Penalty]) -> int:
    """Power of a factor on the singular values that the value is multiplied by; 0 where the singular values do not matter."""
    return max((DEGREES[law] for law in row.laws if law in DEGREES), default=0)


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


def by_formula(row: Row[Penalty], model: nn.Module) -> float:
    """Sum over weights, tied ones once, and over the blocks of each."""
    total = 0.0
    for _, factors in named_factors(model):
        U, S, Vh = (p.detach().double().numpy() for p in (factors.U, factors.S, factors.Vh))
        blocks = [(U, S, Vh)] if S.ndim == 1 else list(zip(U, S, Vh, strict=True))
        total += sum(formulas.OF_FACTORS[row.label](*block) for block in blocks)
    return total


def set_spectra(model: nn.Module, spectrum: Any) -> None:
    with torch.no_grad():
        for _, factors in named_factors(model):
            factors.S.copy_(spectrum(factors.S))


def gradients(row: Row[Penalty], model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Value and the gradients of what it depends on."""
    value = made(row, 0.7)(model)
    found = torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return value, [gradient for gradient in found if gradient is not None]


def only_rank_one(S: Tensor) -> Tensor:
    return torch.where(torch.arange(S.shape[-1]) == 1, -2.5, torch.zeros_like(S))


@every_method
def test_is_a_penalty(row: Row[Penalty]) -> None:
    assert isinstance(row.example, Penalty)
    assert isinstance(row.example, row.method)


def test_every_row_has_a_formula_and_an_ideal_point_and_every_law_a_row() -> None:
    assert [row.label for row in METHODS] == list(formulas.OF_FACTORS)
    assert {row.label for row in rows("dense")} == set(formulas.OF_DENSE)
    assert all(len(row.laws & set(IDEAL)) == 1 for row in METHODS)
    assert all(len(row.laws & set(DEGREES)) == 1 for row in rows("spectral"))
    assert set().union(*(row.laws for row in METHODS)) == set(LAWS)


@every_method
def test_value_equals_the_formula_and_is_not_negative(row: Row[Penalty]) -> None:
    model = network()
    value = made(row, 0.7)(model)
    assert value.shape == ()
    assert value.dtype == torch.float64
    assert float(value.detach()) == pytest.approx(0.7 * by_formula(row, model), rel=exact(row))
    assert float(value.detach()) > 0
    assert float(made(row, 0.0)(model).detach()) == 0


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_layers_are_judged_in_float32(row: Row[Penalty], dtype: torch.dtype) -> None:
    model = network(dtype)
    for value in (made(row, 1.0)(model), made(row, 1.0)(model.to(dtype))):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), torch.tensor(by_formula(row, model)).double(), rtol=1.3e-6, atol=1e-5)  # float32 sums
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(made(row, 1.0)(model), made(row, 1.0)(model.to(dtype)))
    mixed = nn.ModuleList([network(dtype), network(torch.float64)])
    assert float(made(row, 1.0)(mixed).detach()) == pytest.approx(sum(by_formula(row, part) for part in mixed), rel=1e-5)  # float32 half


@every_method
def test_zero_at_the_ideal_point(row: Row[Penalty]) -> None:
    low = sp.factorize(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Linear(7, 5)).double(), where=EVERYTHING)
    (ideal,) = row.laws & set(IDEAL)
    set_spectra(low, IDEAL[ideal])
    assert 0 <= float(made(row, 1.0)(low).detach()) < exact(row)
    value = float(made(row, 1.0)(sp.factorize(nn.Linear(6, 5).double(), rank=1)).detach())
    assert 0 <= value < exact(row) if ideal != "definite" else 1e-3 < value < 10.0


@obeying("spectral")
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
def test_value_and_gradient_are_finite_at_every_spectrum(row: Row[Penalty], spectrum: Any, dtype: torch.dtype) -> None:
    model = network(dtype)
    set_spectra(model, spectrum)
    if degree(row) == 2 and dtype == torch.float32:  # a square: 1e60 is no float32
        set_spectra(model, lambda S: S.clamp(-1e15, 1e15))
    value, found = gradients(row, model)
    assert found
    assert torch.isfinite(value)
    assert all(torch.isfinite(gradient).all() for gradient in found)
    assert float(value.detach()) >= 0


@obeying("spectral")
def test_a_layer_without_singular_values_contributes_nothing(row: Row[Penalty]) -> None:
    model = network()
    set_spectra(model, torch.zeros_like)
    value, found = gradients(row, model)
    assert float(value.detach()) == 0
    assert not any(gradient.any() for gradient in found)


@obeying("scale-free")
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_scale_free(row: Row[Penalty], scale: float) -> None:
    for dtype in (torch.float32, torch.float64):
        model = network(dtype)
        before = made(row, 1.0)(model).detach()
        set_spectra(model, lambda S: S * scale)
        torch.testing.assert_close(made(row, 1.0)(model).detach(), before)


@obeying("degree-1", "degree-2")
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scales_by_its_degree(row: Row[Penalty], scale: float) -> None:
    for dtype in (torch.float32, torch.float64):
        model = network(dtype)
        before = made(row, 1.0)(model).detach()
        set_spectra(model, lambda S: S * scale)
        torch.testing.assert_close(made(row, 1.0)(model).detach() / scale ** degree(row), before)


@every_method
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_value_and_gradient_are_finite_at_extreme_factors(row: Row[Penalty], scale: float) -> None:
    model = network(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale ** (1 / max(1, degree(row))))  # U, S and Vh, squared: 1e48 is no float32
    value, found = gradients(row, model)
    assert torch.isfinite(value)
    assert all(torch.isfinite(gradient).all() for gradient in found)


@every_method
def test_gradient_agrees_with_finite_differences(row: Row[Penalty]) -> None:
    model = network(rank=3)
    parameters = [p for _, factors in named_factors(model) for p in factors.parameters()]
    penalty = made(row, 0.7, **({"steps": 10} if "dense" in row.laws else {}))
    found = torch.autograd.grad(penalty(model), parameters, allow_unused=True)
    step = 1e-6
    checked = 0
    for parameter, gradient in zip(parameters, found, strict=True):
        direction = torch.randn(parameter.shape, dtype=parameter.dtype)
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                parameter.add_(sign * step * direction)
                ends.append(float(penalty(model)))
                parameter.sub_(sign * step * direction)
        expected = 0.0 if gradient is None else float((gradient * direction).sum())
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(expected, rel=1e-7, abs=1e-8)  # central differences with a step of 1e-6
        checked += expected != 0
    assert checked >= len(parameters) // 3


@every_method
def test_a_model_without_factors_costs_nothing(row: Row[Penalty]) -> None:
    for model in (nn.LayerNorm(3) if "dense" in row.laws else nn.Linear(3, 3), nn.Identity()):
        assert float(made(row, 1.0)(model)) == 0


@every_method
def test_weight_is_validated(row: Row[Penalty]) -> None:
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{row.label}: weight must be a finite number >= 0, got"):
            made(row, weight)


@every_method
def test_frozen_as_a_value(row: Row[Penalty]) -> None:
    assert made(row, 0.5) == made(row, 0.5)
    assert hash(made(row, 0.5)) == hash(made(row, 0.5))
    with pytest.raises(AttributeError):
        row.example.weight = 1.0


def test_factors_are_found_wherever_they_are() -> None:
    names = [name for name, factors in named_factors(network()) if isinstance(factors, Factors)]
    assert names == ["0", "1", "2.weight_ih_l0", "2.weight_hh_l0", "3"]


# ---- grouped sums


def plain_orthogonality(model: nn.Module) -> Tensor:
    """The formula, by autograd, layer by layer."""
    grams = [gram for _, factors in named_factors(model) for gram in (factors.U.mT @ factors.U, factors.Vh @ factors.Vh.mT)]
    return torch.stack([(gram - torch.eye(gram.shape[-1], dtype=gram.dtype)).square().sum() / gram.shape[-1] ** 2 for gram in grams]).sum()


def towers() -> nn.Module:
    """Equal shapes across layers and across the two sides, blocks beside plain matrices, a frozen layer and a tied one."""
    layers = [nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(9, 6), nn.Linear(6, 9), nn.Conv2d(4, 12, (1, 3), groups=2), nn.LSTM(6, 4)]
    model = nn.Sequential(*layers, nn.Linear(6, 6)).double()
    model[6].weight = model[0].weight
    model[1].requires_grad_(False)
    low = sp.factorize(model, "channel", EVERYTHING)
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return low


@pytest.mark.parametrize("stacked", [1, 100, sums.STACKED])
def test_orthogonality_and_its_gradient_equal_the_plain_formula(stacked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "STACKED", stacked)
    low = towers()
    parameters = [p for p in low.parameters() if p.requires_grad]
    found, expected = (
        (value, *torch.autograd.grad(value, parameters, allow_unused=True)) for value in (sp.Orthogonality()(low), plain_orthogonality(low))
    )
    assert sum(gradient is not None for gradient in expected) == 13  # U and Vh of 1 + 1 + 1 + 1 + 2 trained weights, and the value
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    frozen = low.requires_grad_(False)
    assert not sp.Orthogonality()(frozen).requires_grad


def test_orthogonality_passes_gradcheck_to_the_second_derivative() -> None:
    low = sp.factorize(nn.Conv2d(4, 6, 3, groups=2).double())
    factors = next(factors for _, factors in named_factors(low))

    def penalty(U: Tensor, Vh: Tensor) -> Tensor:
        return torch.func.functional_call(Wrapped(low), {"low.factors.weight.U": U, "low.factors.weight.Vh": Vh}, ())

    class Wrapped(nn.Module):
        def __init__(self, low: nn.Module) -> None:
            super().__init__()
            self.low = low

        def forward(self) -> Tensor:
            return sp.Orthogonality(0.7)(self.low)

    inputs = tuple((p.detach() + 0.3 * torch.randn_like(p)).requires_grad_() for p in (factors.U, factors.Vh))
    assert torch.autograd.gradcheck(penalty, inputs)
    assert torch.autograd.gradgradcheck(penalty, inputs)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


def test_equal_shapes_share_one_product() -> None:
    low = sp.factorize(nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)], nn.Linear(6, 9), nn.Linear(9, 6)), where=EVERYTHING)
    with Products() as forward:
        value = sp.Orthogonality()(low)
    with Products() as backward:
        value.backward()
    assert (forward.count, backward.count) == (2, 2)  # (6 x 6) and (9 x 6)


@every_method
def test_only_what_is_trained_gets_a_gradient(row: Row[Penalty]) -> None:
    low = sp.factorize(nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)]), where=EVERYTHING)
    low[1].requires_grad_(False)
    made(row, 1.0)(low).backward()
    assert all(p.grad is None for p in low[1].parameters())
    for index in (0, 2):
        assert (low[index].S if "spectral" in row.laws else low[index].U).grad is not None


@every_method
def test_each_layer_gets_its_own_gradient(row: Row[Penalty]) -> None:
    """Grouping must not mix up layers: the sum's gradients are those of each layer alone."""
    low = towers().requires_grad_(True)
    together = torch.autograd.grad(made(row, 1.0)(low), list(low.parameters()), allow_unused=True)
    by_name = dict(zip([name for name, _ in low.named_parameters()], together, strict=True))
    for index in range(6):
        for name, parameter in low[index].named_parameters():
            alone = torch.autograd.grad(made(row, 1.0)(low[index]), parameter, allow_unused=True)[0]
            assert (alone is None) == (by_name[f"{index}.{name}"] is None)
            if alone is not None:
                torch.testing.assert_close(by_name[f"{index}.{name}"], alone, rtol=1e-9, atol=1e-9)


# ---- the dense weight


def conditioned(out: int, in_: int, condition: float) -> Tensor:
    U, S, Vh = torch.linalg.svd(torch.randn(out, in_, dtype=torch.float64), full_matrices=False)
    return U * torch.logspace(0, -float(np.log10(condition)), len(S), dtype=torch.float64) @ Vh


def linear(W: Tensor) -> nn.Linear:
    layer = nn.Linear(W.shape[1], W.shape[0], dtype=W.dtype)
    layer.weight = nn.Parameter(W.clone())
    return layer


def value_and_gradient(penalty: Callable[[nn.Module], Tensor], layer: nn.Module) -> tuple[Tensor, Tensor]:
    value = penalty(layer)
    return value.detach(), torch.autograd.grad(value, layer.weight)[0]


@obeying("dense")
@pytest.mark.parametrize("condition", [1, 10, 100, 400])
@pytest.mark.parametrize("shape", [(24, 24), (16, 60), (60, 16), (5, 2)], ids=str)
def test_dense_value_and_gradient_are_as_accurate_as_stated(row: Row[Penalty], condition: float, shape: tuple[int, int]) -> None:
    W = conditioned(*shape, condition)
    expected, slope, first_term = formulas.of_dense(row.label, W)
    for dtype, value_rtol, gradient_rtol in ((torch.float64, 1e-8, 1e-8), (torch.float32, 1e-6, 5e-5)):
        value, gradient = value_and_gradient(made(row, 1.0), linear(W.to(dtype)))
        assert (value.dtype, gradient.dtype) == (dtype, dtype)
        torch.testing.assert_close(value.double(), expected, rtol=value_rtol, atol=2 * value_rtol)  # PolarHoyer subtracts one
        assert float(torch.linalg.matrix_norm(gradient.double() - slope, 2)) <= gradient_rtol * first_term


def test_small_singular_values_are_pushed_less_never_wrongly() -> None:
    W = conditioned(20, 30, 1e7)
    value, gradient = value_and_gradient(sp.penalties.NuclearNorm(1.0), linear(W))
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    pushes = (U.T @ gradient @ Vh.T).diagonal()
    assert float(pushes.max()) <= 1 + 1e-8
    assert float(pushes.min()) > 0
    assert float(value) == pytest.approx(float(S.sum()), rel=1e-3)


@obeying("dense")
def test_dense_gradient_is_that_of_the_value(row: Row[Penalty]) -> None:
    W, penalty = torch.randn(6, 4, dtype=torch.float64), made(row, 0.7, steps=9)
    _, gradient = value_and_gradient(penalty, linear(W))
    for _ in range(5):
        direction = torch.randn_like(W)
        ends = [float(penalty(linear(W + sign * 1e-5 * direction)).detach()) for sign in (1, -1)]
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-7, abs=1e-9)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(penalty(layer := linear(W)), layer.weight, create_graph=True)


@obeying("dense")
def test_dense_invariances(row: Row[Penalty]) -> None:
    W = torch.randn(12, 7, dtype=torch.float64)
    value, gradient = value_and_gradient(made(row, 1.0), linear(W))
    mirrored, transposed = value_and_gradient(made(row, 1.0), linear(W.T.contiguous()))
    torch.testing.assert_close(mirrored, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(transposed, gradient.T, rtol=1e-10, atol=1e-12)
    for scale in (1e-20, 1e20):
        for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            scaled, slope = value_and_gradient(made(row, 1.0), linear((W * scale).to(dtype)))
            torch.testing.assert_close(scaled.double(), value * scale ** degree(row), rtol=rtol, atol=0)
            torch.testing.assert_close(slope.double() * scale ** (1 - degree(row)), gradient, rtol=10 * rtol, atol=rtol)


@obeying("dense")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dense_weights_of_zeros_and_of_rank_one(row: Row[Penalty], dtype: torch.dtype) -> None:
    value, gradient = value_and_gradient(made(row, 1.0), linear(torch.zeros(5, 4, dtype=dtype)))
    assert float(value) == 0
    assert not gradient.any()
    one = torch.outer(torch.tensor([1.0, -2.0, 2.0]), torch.tensor([2.0, 0.0, -1.0, 2.0])).to(dtype)  # norms 3 and 3
    value, gradient = value_and_gradient(made(row, 1.0), linear(one))
    assert gradient.dtype == dtype
    assert torch.isfinite(gradient).all()
    tolerance = 1e-2 if dtype.itemsize == 2 else 1e-5  # of the gradient's own dtype
    expected, slope, _ = formulas.of_dense(row.label, one)  # by hand: 9 and one / 9 for the nuclear norm, 0 and zeros for PolarHoyer
    assert float(value) == pytest.approx(float(expected), rel=1e-6, abs=1e-6)
    assert float((gradient.double() - slope).norm()) <= tolerance * float(slope.norm()) + 1e-4


@obeying("dense")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_are_judged_in_float32(row: Row[Penalty], dtype: torch.dtype) -> None:
    layer = linear(torch.randn(9, 7).to(dtype))
    expected, slope, _ = formulas.of_dense(row.label, layer.weight.detach())
    with torch.autocast("cpu", torch.bfloat16):
        value, gradient = value_and_gradient(made(row, 1.0), layer)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-2, atol=1e-3)  # the gradient is in half precision


@obeying("dense")
@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
def test_dense_convolutions_are_folded_like_factorized_ones(row: Row[Penalty], scheme: Any) -> None:
    for layer in (nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, (2, 3)), nn.Conv1d(4, 6, 3), nn.LSTM(5, 3)):
        dense = float(made(row, 1.0, scheme=scheme)(layer.double()).detach())
        assert dense > 0.1
        assert dense == pytest.approx(float(made(row, 1.0)(sp.factorize(layer, scheme)).detach()), rel=1e-8)


@obeying("dense")
def test_dense_layers_are_chosen_as_factorize_does(row: Row[Penalty]) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 6), nn.Linear(6, 4)).double()
    each = [float(made(row, 1.0)(layer).detach()) for layer in model if isinstance(layer, nn.Linear)]

    def value(where: Any = None, of: nn.Module = model) -> float:
        return float(made(row, 1.0, where=where)(of).detach())

    assert value() == pytest.approx(each[0] + each[1], rel=1e-9)
    assert value(EVERYTHING) == pytest.approx(sum(each), rel=1e-9)
    assert value(sp.match("2")) == pytest.approx(each[1], rel=1e-9)
    part = sp.factorize(model, where=sp.match("0"))
    assert value(of=part) == pytest.approx(each[0] + each[1], rel=1e-7)
    assert value(sp.match("!0"), part) == pytest.approx(each[1] + each[2], rel=1e-9)
    model[2].weight = nn.Parameter(model[0].weight.detach().T.contiguous())
    tied = nn.Sequential(nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 2)).double()
    tied[1].weight = tied[0].weight
    assert value(of=tied) == pytest.approx(value(of=tied[0]), rel=1e-9)


@obeying("dense")
def test_knobs_of_dense_penalties_are_validated(row: Row[Penalty]) -> None:
    for steps in (0, -1, True):
        with pytest.raises(SettingError, match=f"{row.label}: steps must be an integer >= 1, got {steps}"):
            made(row, 1.0, steps=steps)


@obeying("dense")
def test_descent_lowers_the_rank_of_a_dense_weight(row: Row[Penalty]) -> None:
    layer = nn.Linear(12, 8)
    before = torch.linalg.svdvals(layer.weight.detach())
    optimizer = torch.optim.SGD([layer.weight], lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        made(row, 1.0)(layer).backward()
        optimizer.step()
    after = torch.linalg.svdvals(layer.weight.detach())
    assert after.sum() / after[0] < 0.9 * before.sum() / before[0]


def test_a_sampled_orthogonality_is_right_on_average() -> None:
    low = sp.factorize(nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 8), nn.Conv2d(8, 8, 3, groups=2)).double(), "channel", sp.match("*"))
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def measured(penalty: sp.Orthogonality) -> torch.Tensor:
        factors = [p for name, p in low.named_parameters() if name.endswith((".U", ".Vh"))]
        value = penalty(low)
        return torch.cat([value.reshape(1), *(g.flatten() for g in torch.autograd.grad(value, factors))])

    exact, count = measured(sp.Orthogonality(0.5)), 600
    draws = torch.stack([measured(sp.Orthogonality(0.5, sample=0.25)) for _ in range(count)])
    error = (draws.mean(0) - exact).abs()
    assert (error <= 5 * draws.std(0) / count**0.5 + 1e-12).all()  # five standard errors
    assert draws[:, 0].std() > 0
    torch.testing.assert_close(measured(sp.Orthogonality(0.5, sample=0.999)), exact)
    with pytest.raises(SettingError, match=r"Orthogonality: sample must be a fraction in \(0, 1\]"):
        sp.Orthogonality(1.0, sample=0.0)
