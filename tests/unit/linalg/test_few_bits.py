"""Rounding to levels between the extremes: nearest, unbiased where stochastic, and with the gradient of the bits that autograd finds."""

import math

import pytest
import torch
from torch import Tensor

from spectrim.linalg.rounding import EXACT, Rounded, RoundedGradient, on_grid


def test_by_hand() -> None:
    x = torch.tensor([[0.0, 0.4, 1.6, 3.0], [-1.0, 0.0, 0.1, 2.0]])
    assert on_grid(x, 2).tolist() == [[pytest.approx(v) for v in row] for row in ([1 / 3, 1 / 3, 5 / 3, 3.0], [-1.0, 1 / 3, 1 / 3, 5 / 3])]
    assert on_grid(x, 2, by_row=True).tolist() == [[0.0, 0.0, 2.0, 3.0], [-1.0, 0.0, 0.0, 2.0]]


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_nearest_of_so_many_levels_and_the_extremes_stay(bits: int, by_row: bool) -> None:
    x = torch.randn(6, 500, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    found = on_grid(x, bits, by_row=by_row)
    for rows, before in ((found, x),) if not by_row else zip(found.split(1), x.split(1), strict=True):
        low, high = before.min(), before.max()
        step = (high - low) / (2**bits - 1)
        assert len(rows.unique().mul(1e9).round().unique()) <= 2**bits
        assert float((rows - before).abs().max()) <= float(step) / 2 * (1 + 1e-9)
        torch.testing.assert_close(torch.stack([rows.min(), rows.max()]), torch.stack([low, high]))
    torch.testing.assert_close(on_grid(found, bits, by_row=by_row), found)


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 4), torch.full((2, 2), 1e-42), torch.empty(0, 3), torch.tensor(1.5)], ids=lambda x: str(tuple(x.shape))
)
def test_what_has_no_range_stays(x: Tensor) -> None:
    torch.testing.assert_close(on_grid(x, 3), x, rtol=0, atol=0)


def test_enough_bits_round_nothing() -> None:
    x = torch.randn(5)
    assert on_grid(x, EXACT) is x


def test_stochastic_rounding_is_unbiased() -> None:
    torch.manual_seed(0)
    x = torch.tensor([0.0, 0.1, 0.25, 0.8, 1.0]).repeat(20_000, 1)
    found = on_grid(x, 2, stochastic=True)
    assert set(found.mul(3).round().unique().tolist()) == {0.0, 1.0, 2.0, 3.0}
    torch.testing.assert_close(found.mean(0), x[0], rtol=0, atol=4 / 3 / 2 / math.sqrt(20_000))  # four standard errors
    assert torch.equal(found[:, [0, 4]], x[:, [0, 4]])


def straight_through(x: Tensor, bits: Tensor, by_row: bool) -> Tensor:
    """Round by torch's own operations: autograd passes the rounding of codes, ranges are constants, the bits are a real number."""
    rows = x.reshape(len(x), -1) if by_row else x.reshape(1, -1)
    low, high = rows.detach().amin(1, keepdim=True), rows.detach().amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = (rows - low) / step
    codes = codes + (codes.round() - codes).detach()
    return (low + codes * step).reshape(x.shape)


def frozen(x: Tensor, bits: float, at: int, by_row: bool) -> Tensor:
    """Round with the residuals of `at` bits and the step of others: a smooth function of the bits, for finite differences."""
    ranges = x.reshape(len(x), -1) if by_row else x.reshape(1, -1)
    span = (ranges.amax(1) - ranges.amin(1)).reshape(-1, *[1] * (x.dim() - 1)) if by_row else x.max() - x.min()
    residual = (on_grid(x, at, by_row=by_row) - x) / (span / (2**at - 1))
    return x + residual * span / (2**bits - 1)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("bits", [3, 5, 8])
def test_the_gradient_of_the_bits_is_that_of_autograd_and_of_finite_differences(bits: int, by_row: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x, g = (torch.randn(4, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    slope = torch.zeros((), dtype=torch.float64, requires_grad=True)
    real = torch.tensor(float(bits), dtype=torch.float64, requires_grad=True)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = Rounded.apply(ours, slope, bits, by_row), straight_through(theirs, real, by_row)
    torch.testing.assert_close(y, z)
    (y * g).sum().backward()
    (z * g).sum().backward()
    torch.testing.assert_close(slope.grad, real.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.grad, theirs.grad)
    h = 1e-5
    ends = [float((frozen(x, bits + d, bits, by_row) * g).sum()) for d in (h, -h)]
    assert float(slope.grad) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5)


def test_gradients_are_rounded_on_their_way_back() -> None:
    torch.manual_seed(0)
    x, g = torch.randn(7, 9, requires_grad=True), torch.randn(7, 9)
    y = RoundedGradient.apply(x, 3)
    assert torch.equal(y, x)
    y.backward(g)
    assert len(x.grad.mul(1e5).round().unique()) <= 8
    assert float((x.grad - g).abs().max()) <= float(g.max() - g.min()) / 7 * (1 + 1e-5)
