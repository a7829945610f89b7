"""A common order of hidden units: the same function, windows at both ends as good as free pivots."""

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spectrim.errors import SettingError
from spectrim.linalg.absorption import end_order
from spectrim.linalg.interpolative import PIVOT_BOUND, interpolate


def factor(size: int, rank: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64)).Q


@pytest.mark.parametrize(("rank", "other"), [(12, 9), (20, 20), (12, 28), (30, 25), (40, 40), (1, 40), (40, 1)])
def test_both_windows_stand_at_their_ends(rank: int, other: int) -> None:
    first, last = factor(40, rank), factor(40, other)
    order = end_order(first, last)
    assert sorted(order.tolist()) == list(range(40))
    for basis, start, bound in ((first[order], 0, PIVOT_BOUND), (last[order], 40 - other, 1e3)):
        kept = basis[start : start + basis.shape[1]]
        assert (basis @ torch.linalg.inv(kept)).abs().max() <= bound * (1 + 1e-9)


def test_a_feed_forward_block_computes_the_same_and_needs_no_gather() -> None:
    hidden, width, rank = 60, 24, 15
    weights = {name: factor(hidden, rank) @ torch.randn(rank, width, dtype=torch.float64) for name in ("up", "gate")}
    biases = {name: torch.randn(hidden, dtype=torch.float64) for name in weights}
    U, Vh = torch.randn(width, rank, dtype=torch.float64), factor(hidden, rank).mT
    x = torch.randn(5, width, dtype=torch.float64)

    def block(order: Tensor, down: Tensor) -> Tensor:
        up, gate = (F.linear(x, weights[name][order], biases[name][order]) for name in ("up", "gate"))
        return F.linear(F.silu(gate) * up, down)

    order = end_order(Vh.mT)
    form = interpolate(U, Vh[:, order], side="columns", bound=PIVOT_BOUND)
    assert form.start == 0
    assert form.growth <= PIVOT_BOUND
    torch.testing.assert_close(block(order, form.matrix()), block(torch.arange(hidden), U @ Vh), rtol=1e-9, atol=1e-9)


def test_factors_that_do_not_fit_are_refused() -> None:
    jaxtyping.config.update("jaxtyping_disable", True)  # which would say so before
    try:
        with pytest.raises(SettingError, match="last must be of 6 rows"):
            end_order(factor(6, 2), factor(5, 2))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    with pytest.raises(SettingError, match="first must be of 2 rows"):
        end_order(torch.randn(2, 6))
