"""`FrobeniusDecay` pulls on the product; its laws are in the contract tests."""

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.layers import named_factors
from spectrim.penalties import FrobeniusDecay, sums
from spectrim.penalties.decay import groups_of, half_squared_norm


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_both_ways_to_compute_it_agree(rank: int) -> None:
    left, right = torch.randn(2, 9, rank, dtype=torch.float64), torch.randn(2, rank, 8, dtype=torch.float64)
    assert float(half_squared_norm(left, right)) == pytest.approx(0.5 * float((left @ right).square().sum()), rel=1e-12)


def test_the_gradient_of_the_product_is_that_of_weight_decay() -> None:
    """With orthonormal factors the step on S alone is the one that decay makes on the dense weight's singular values."""
    low = sp.factorize(nn.Linear(7, 5).double(), rank=2)
    FrobeniusDecay(0.3)(low).backward()
    torch.testing.assert_close(low.S.grad, 0.3 * low.S.detach(), rtol=1e-12, atol=1e-12)
    weight = low.weight.detach().requires_grad_()
    (0.15 * weight.square().sum()).backward()
    torch.testing.assert_close(low.U.grad, weight.grad @ low.Vh.detach().T * low.S.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stacked", [1, sums.STACKED])
def test_equal_shapes_are_one_group(stacked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectrim.penalties.decay.STACKED", stacked)
    low = sp.factorize(nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)], nn.Linear(6, 9)).double(), where=sp.match("*"))
    assert len(groups_of(low)) == (2 if stacked > 1 else 6)
    expected = sum(0.5 * float(factors.matrix().detach().square().sum()) for _, factors in named_factors(low))
    assert float(FrobeniusDecay(1.0)(low).detach()) == pytest.approx(expected, rel=1e-12)
