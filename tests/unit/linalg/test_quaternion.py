"""Quaternion matrices multiply as quaternions do; their decomposition is exact, optimal and structured."""

import pytest
import torch
from torch import Tensor

from spectrim.errors import SettingError
from spectrim.linalg.quaternion import Quaternions, qsvd, randomized_qsvd


def drawn(m: int, n: int) -> Quaternions:
    return Quaternions.of(*torch.randn(4, m, n).double())


def difference(a: Quaternions, b: Quaternions) -> float:
    return (a - b).norm()


def identity(n: int) -> Quaternions:
    return Quaternions.of(torch.eye(n), *torch.zeros(3, n, n))


def test_the_units_multiply_as_hamilton_says() -> None:
    one, i, j, k = (Quaternions.of(*row) for row in torch.eye(4).tolist())
    for a, b, c in ((i, j, k), (j, k, i), (k, i, j)):
        assert difference(a @ b, c) == 0
        assert ((b @ a).A + c.A).abs().sum() + ((b @ a).B + c.B).abs().sum() == 0
    for unit in (i, j, k):
        assert difference(unit.H @ unit, one) == 0


def test_the_adjoint_carries_products_transposes_and_norms() -> None:
    P, Q = drawn(3, 4), drawn(4, 5)
    torch.testing.assert_close((P @ Q).adjoint(), P.adjoint() @ Q.adjoint())
    torch.testing.assert_close(P.H.adjoint(), P.adjoint().mH)
    assert float(P.adjoint().norm()) ** 2 == pytest.approx(2 * P.norm() ** 2)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_the_decomposition_is_exact_and_orthonormal(shape: tuple[int, int]) -> None:
    Q = drawn(*shape)
    U, S, Vh = qsvd(Q)
    assert difference(U.scaled(S) @ Vh, Q) < 1e-12
    assert difference(U.H @ U, identity(4 if 4 in shape else 5)) < 1e-12
    assert difference(Vh @ Vh.H, identity(4 if 4 in shape else 5)) < 1e-12
    values = torch.linalg.svdvals(Q.adjoint())
    torch.testing.assert_close(values[::2], S)
    torch.testing.assert_close(values[1::2], S)


def test_a_cut_is_the_best_of_its_rank() -> None:
    Q = drawn(7, 6)
    S = qsvd(Q)[1]
    for rank in range(1, 7):
        U, values, Vh = qsvd(Q, rank)
        assert difference(U.scaled(values) @ Vh, Q) == pytest.approx(float(S[rank:].norm()), abs=1e-10)


@pytest.mark.parametrize("decompose", [qsvd, randomized_qsvd])
def test_matrices_of_low_rank_and_equal_values_are_exact(decompose: object) -> None:
    low = drawn(8, 3) @ drawn(3, 9)
    U, S, Vh = decompose(low, 3)  # type: ignore[operator]
    assert difference(U.scaled(S) @ Vh, low) < 1e-11
    left, right = qsvd(drawn(8, 8))[0], qsvd(drawn(8, 8))[2]
    for values in (torch.ones(8), torch.tensor([2.0, 2, 2, 1, 1, 0, 0, 0])):
        Q = left.scaled(values.double()) @ right
        U, S, Vh = decompose(Q, 8)  # type: ignore[operator]
        torch.testing.assert_close(S, values.double(), atol=1e-10, rtol=0)
        assert difference(U.scaled(S) @ Vh, Q) < 1e-10
        assert difference(U.H @ U, identity(8)) < 1e-9


def image_like(size: int) -> Quaternions:
    """Return pure quaternions with a spectrum that falls as those of images do."""
    torch.manual_seed(0)
    left, right = (qsvd(drawn(size, size))[0] for _ in range(2))
    full = left.scaled(1 / torch.arange(1, size + 1).double()) @ right.H
    return Quaternions.of(torch.zeros(size, size), *full.parts()[1:])


def test_the_randomized_one_is_near_the_optimum() -> None:
    Q = image_like(40)
    for rank in (1, 5, 12):
        U, S, Vh = qsvd(Q, rank)
        optimal = difference(U.scaled(S) @ Vh, Q)
        V: Tensor
        for seed in range(3):
            U, V, Vh = randomized_qsvd(Q, rank, seed=seed)
            assert difference(U.scaled(V) @ Vh, Q) <= 1.1 * optimal


def test_one_quaternion_by_hand() -> None:
    """``1 + 2 i - 2 j + 4 k`` has the norm 5, and is 5 times a unit."""
    U, S, Vh = qsvd(Quaternions.of(1.0, 2.0, -2.0, 4.0))
    assert float(S) == pytest.approx(5.0)
    assert [float(part) for part in (U @ Vh).parts()] == pytest.approx([0.2, 0.4, -0.4, 0.8])


def test_other_ranks_are_refused() -> None:
    for rank in (0, 4):
        with pytest.raises(SettingError, match=r"rank must be an integer in \[1, 3\]"):
            qsvd(drawn(3, 5), rank)
