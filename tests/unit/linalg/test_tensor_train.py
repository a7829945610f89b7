"""Tensor trains of kernels, against the laws of TT-SVD and tensorly."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.linalg import tensor_train as tt
from spectrim.linalg import train_sizes
from spectrim.linalg.train_sizes import nested_path, path_losses

SHAPE = (6, 3, 4, 7)


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [SHAPE, (2, 3, 3, 16), (16, 3, 3, 2), (5, 4), (3, 5, 4), (4, 2, 3, 2, 6)])
def test_full_ranks_are_exact_and_cores_orthonormal(shape: tuple[int, ...]) -> None:
    W, ranks = tensor(*shape), tt.full_ranks(shape)
    cores = tt.tt_svd(W, ranks)
    assert [tuple(core.shape) for core in cores] == tt.shapes(shape, ranks)
    assert sum(core.numel() for core in cores) == tt.count(shape, ranks)
    torch.testing.assert_close(tt.contract(cores), W, rtol=1e-9, atol=1e-12)
    for core in cores[:-1]:
        unfolded = core.reshape(-1, core.shape[-1])
        torch.testing.assert_close(unfolded.mT @ unfolded, torch.eye(core.shape[-1], dtype=torch.float64), rtol=0, atol=1e-12)


def test_right_spectra_are_the_singular_values_of_the_unfoldings() -> None:
    W = tensor(*SHAPE)
    for cut, energy in enumerate(tt.right_spectra(tt.tt_svd(W, tt.full_ranks(SHAPE))), 1):
        values = torch.linalg.svdvals(W.reshape(math.prod(SHAPE[:cut]), -1))
        torch.testing.assert_close(energy.sqrt(), values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ranks", [(2, 5, 3), (6, 12, 7), (1, 1, 1), (6, 3, 7)])
def test_the_error_is_at_most_the_energy_behind_the_ranks_and_that_of_tensorly(ranks: tuple[int, int, int]) -> None:
    W = tensor(*SHAPE)
    cores = tt.tt_svd(W, ranks)
    error = float((W - tt.contract(cores)).square().sum())
    energies = tt.right_spectra(tt.tt_svd(W, tt.full_ranks(SHAPE)))
    assert error <= sum(float(energy[rank:].sum()) for energy, rank in zip(energies, ranks, strict=True)) + 1e-12
    pytest.importorskip("tensorly")
    from tensorly.decomposition import tensor_train

    theirs = tensor_train(W.numpy(), (1, *ranks, 1))
    assert error == pytest.approx(float(((W.numpy() - theirs.to_tensor()) ** 2).sum()), rel=1e-9, abs=1e-12)


def test_ranks_that_no_tensor_fills_are_zeros() -> None:
    W = tensor(*SHAPE)
    cores = tt.tt_svd(W, (1, 9, 7))  # at most 3 behind one column and three taps
    assert not cores[1][..., 3:].any()
    torch.testing.assert_close(tt.contract(cores), tt.contract(tt.tt_svd(W, (1, 3, 7))))


@pytest.mark.parametrize("shape", [SHAPE, (5, 4), (3, 5, 4), (4, 2, 3, 2, 6)])
@pytest.mark.parametrize("work", [1e10, 300.0], ids=["every rank", "some ranks"])
def test_the_path_is_nested_filled_and_priced_by_what_is_lost(shape: tuple[int, ...], work: float, monkeypatch: Any) -> None:
    monkeypatch.setattr(train_sizes, "WORK", work)
    W, full = tensor(*shape), tt.full_ranks(shape)
    cores = tt.tt_svd(W, full)
    path = nested_path(cores, shape)
    assert path[0] == (1,) * len(full)
    assert path[-1] == full
    for before, after in pairwise(path):
        assert sum(b - a for a, b in zip(before, after, strict=True)) == 1
    for size in path:
        around = (1, *size, 1)
        assert all(rank <= min(around[cut] * shape[cut], shape[cut + 1] * around[cut + 2]) for cut, rank in enumerate(size))
    errors = [W.square().sum(), *((W - tt.contract(tt.leading(cores, size))).square().sum() for size in path)]
    expected, found = torch.stack(errors).cummin(0).values, path_losses(cores, path, shape)
    if work == 1e10:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert bool((found >= expected - 1e-12).all())  # of ranks that are not compared that of smaller ones
    assert bool((found.diff() <= 0).all())


def test_the_path_goes_down_where_least_is_lost_for_each_number() -> None:
    """Of a train that is exact at small ranks, these are on the path: all larger sizes lose nothing."""
    W = tt.contract([torch.randn(shape, dtype=torch.float64) for shape in tt.shapes(SHAPE, (2, 3, 2))])
    cores = tt.tt_svd(W, tt.full_ranks(SHAPE))
    path = nested_path(cores, SHAPE)
    assert (2, 3, 2) in path
    assert float(path_losses(cores, path, SHAPE)[path.index((2, 3, 2)) + 1]) < 1e-9 * float(W.square().sum())


@pytest.mark.parametrize("shape", [SHAPE, (5, 4), (4, 2, 3, 2, 6)])
def test_alternating_least_squares_comes_nearer_and_keeps_columns_orthonormal(shape: tuple[int, ...]) -> None:
    W, ranks = tensor(*shape), tuple(max(1, rank // 2) for rank in tt.full_ranks(shape))
    errors, cores = [], tt.tt_svd(W, ranks)
    for _ in range(4):
        errors.append(float((W - tt.contract(cores)).square().sum()))
        cores = tt.improved(W, cores, 1)
        for core in cores[:-1]:
            unfolded = core.reshape(-1, core.shape[-1])
            torch.testing.assert_close(unfolded.mT @ unfolded, torch.eye(core.shape[-1], dtype=torch.float64), rtol=0, atol=1e-12)
        assert float((W - tt.contract(cores)).square().sum()) == pytest.approx(float(W.square().sum() - cores[-1].square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] or len(shape) == 2  # of a matrix the first one is the best


def test_overlaps_of_a_train_with_itself_are_identities() -> None:
    cores = tt.tt_svd(tensor(*SHAPE), (4, 6, 5))
    for found, rank in zip(tt.overlaps(cores, cores), (4, 6, 5), strict=True):
        torch.testing.assert_close(found, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)


def test_orthonormalized_cores_hold_the_same_tensor() -> None:
    cores = [torch.randn(shape, dtype=torch.float64) for shape in tt.shapes(SHAPE, (4, 6, 5))]
    made = tt.orthonormalized(cores)
    torch.testing.assert_close(tt.contract(made), tt.contract(cores), rtol=1e-9, atol=1e-9)
    for core in made[:-1]:
        unfolded = core.reshape(-1, core.shape[-1])
        torch.testing.assert_close(unfolded.mT @ unfolded, torch.eye(core.shape[-1], dtype=torch.float64), rtol=0, atol=1e-12)
    for again, core in zip(tt.orthonormalized(made), made, strict=True):
        torch.testing.assert_close(again, core, rtol=1e-9, atol=1e-9)
    wide = [torch.randn(shape, dtype=torch.float64) for shape in tt.shapes(SHAPE, (7, 6, 5))]  # seven columns of six
    torch.testing.assert_close(tt.contract(tt.orthonormalized(wide)), tt.contract(wide), rtol=1e-9, atol=1e-9)
