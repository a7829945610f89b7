"""CP decompositions of kernels: exact start, alternating least squares, against tensorly."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from spectrim.linalg import cp


def kernel(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def leading(parts: cp.Parts, rank: int) -> cp.Parts:
    A, B, C = parts
    return A[:, :rank], B[:, :rank], C[:, :rank]


@pytest.mark.parametrize("shape", [(8, 6, 9), (16, 1, 9), (2, 12, 25), (1, 1, 9), (5, 4, 3), (12, 2, 3)])
def test_orthogonal_components_are_exact_and_their_energies_add_up(shape: tuple[int, int, int]) -> None:
    W = kernel(*shape)
    parts = cp.orthogonal_cp(W)
    assert parts[0].shape[1] == cp.cp_rank(shape)
    torch.testing.assert_close(cp.compose(*parts), W, rtol=1e-9, atol=1e-12)
    products = cp.gram(*parts)
    torch.testing.assert_close(products, torch.diag(products.diagonal()), rtol=0, atol=1e-12)
    energies = products.diagonal()
    assert bool((energies.diff() <= 1e-12).all())
    expected = torch.cat([energies.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(cp.truncation_errors(*parts), expected, rtol=1e-9, atol=1e-12)


def test_one_product_of_three_vectors_is_one_component_by_hand() -> None:
    """``W[o, i, t] = a_o b_i c_t`` with norms 5, 1 and 2: the only component has norm 10."""
    a, b, c = torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8, 0.0]), torch.tensor([2.0, 0.0])
    W = torch.einsum("o,i,t->oit", a, b, c)
    A, B, C = cp.cp(W, 1)
    assert float(C.norm()) == pytest.approx(10.0)
    torch.testing.assert_close(cp.compose(A, B, C), W.double())


def test_errors_of_leaving_out_components_that_are_not_orthogonal() -> None:
    parts = (kernel(6, 4), kernel(5, 4), kernel(3, 4))
    whole = cp.compose(*parts)
    expected = [float((whole - cp.compose(*leading(parts, rank))).square().sum()) for rank in range(5)]
    torch.testing.assert_close(cp.truncation_errors(*parts), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 4, 12, 30])
def test_each_sweep_lowers_the_error_or_is_the_last(rank: int) -> None:
    W = kernel(8, 6, 9)
    start = leading(cp.orthogonal_cp(W), rank)
    errors = [cp.squared_error(W, cp.als(W, start, sweeps)) for sweeps in (1, 2, 5, 20, 60)]
    assert errors[0] < cp.squared_error(W, start)
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))


def test_what_has_few_components_is_found() -> None:
    truth = (kernel(8, 3), kernel(7, 3), kernel(9, 3))
    W = cp.compose(*truth)
    assert cp.squared_error(W, cp.cp(W, 3, sweeps=500)) < 1e-4 * float(W.square().sum())
    assert cp.squared_error(W, cp.als(W, truth)) < 1e-20 * float(W.square().sum())


def test_components_that_are_zero_stay_finite() -> None:
    A, B, C = cp.als(torch.zeros(4, 3, 5), (torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(5, 2)))
    assert all(bool(torch.isfinite(part).all()) for part in (A, B, C))
    assert not C.any()


def test_the_error_and_the_growth_of_components_are_those_of_tensorly_or_better() -> None:
    pytest.importorskip("tensorly")
    import tensorly
    from tensorly.decomposition import parafac

    W, rank = kernel(12, 10, 9), 20
    mine = cp.cp(W, rank)
    rebuilt = tensorly.cp_to_tensor((None, [part.numpy() for part in mine]))
    torch.testing.assert_close(cp.compose(*mine), torch.from_numpy(rebuilt), rtol=1e-9, atol=1e-12)
    theirs = parafac(W.numpy(), rank, n_iter_max=cp.SWEEPS, init="random", random_state=0, tol=0)
    error = float(((W.numpy() - tensorly.cp_to_tensor(theirs)) ** 2).sum())
    assert cp.squared_error(W, mine) < 1.05 * error
    assert float(mine[2].square().sum()) < 6 * float(W.square().sum())
