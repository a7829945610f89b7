"""Principal directions of long rows: the SVD of the centered matrix, whatever the ranges of columns that are read."""

import pytest
import torch
from torch import Tensor

from spectrim.linalg import principal
from spectrim.linalg.principal import centered_gram, orthonormal_, overlaps, principal_axes, principal_directions, ranges


def matrix(rows: int = 7, width: int = 50) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) + 100


def identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("numbers", [1, 70, 1 << 22])
def test_directions_and_variances_are_those_of_the_svd(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(principal, "NUMBERS", numbers)
    X = matrix()
    _, values, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    variances, axes = principal_axes(centered_gram(lambda start, end: X[:, start:end], 7, 50))
    assert axes.shape == (7, 6), "the mean takes one direction"
    torch.testing.assert_close(variances, values[:6].square(), rtol=1e-9, atol=0)
    P = principal_directions(lambda start, end: X[:, start:end], axes, variances, 50, torch.float64)
    torch.testing.assert_close((P @ Vh[:6].mT).abs(), identity(6), rtol=0, atol=1e-9)
    torch.testing.assert_close(P @ P.mT, identity(6), rtol=0, atol=1e-12)
    torch.testing.assert_close((X - X.mean(0)) @ P.mT @ P, X - X.mean(0), rtol=1e-9, atol=1e-9)


def test_small_variances_far_from_the_origin_stay_orthonormal() -> None:
    """A direction of 1e-5 of the largest deviation, samples around 100, directions in single precision."""
    X = matrix(5, 4000)
    X = 100 + (X - 100) * torch.tensor([1.0, 1e-2, 1e-3, 1e-4, 1e-5], dtype=torch.float64)[:, None]
    variances, axes = principal_axes(centered_gram(lambda start, end: X[:, start:end], 5, 4000))
    P = principal_directions(lambda start, end: X[:, start:end], axes, variances, 4000, torch.float32)
    assert axes.shape[1] == 4
    assert float((overlaps(P) - identity(4)).abs().max()) < 1e-6, "the bound of the method"


def test_what_does_not_vary_spans_nothing_and_repeats_span_once() -> None:
    X = matrix(3).repeat(2, 1)
    assert principal_axes(centered_gram(lambda start, end: X[:, start:end], 6, 50))[1].shape[1] == 2
    same = matrix(1).repeat(4, 1)
    assert principal_axes(centered_gram(lambda start, end: same[:, start:end], 4, 50))[1].shape[1] == 0


def test_signs_do_not_depend_on_those_of_the_eigensolver(monkeypatch: pytest.MonkeyPatch) -> None:
    X = matrix()
    gram = centered_gram(lambda start, end: X[:, start:end], 7, 50)
    _, axes = principal_axes(gram)
    solve = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda given: (solve(given)[0], -solve(given)[1]))
    assert torch.equal(principal_axes(gram)[1], axes)


def test_ranges_cover_all_columns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(principal, "NUMBERS", 30)
    assert [index for start, end in ranges(25, 7) for index in range(start, end)] == list(range(25))


def test_rows_are_made_orthonormal_within_their_span() -> None:
    rows = matrix(4, 60)
    made = orthonormal_(rows.clone())
    torch.testing.assert_close(made @ made.mT, identity(4), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows @ made.mT @ made, rows, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made[0], rows[0] / rows[0].norm(), rtol=1e-9, atol=0)
    with pytest.raises(torch.linalg.LinAlgError):
        orthonormal_(torch.ones(2, 5))
