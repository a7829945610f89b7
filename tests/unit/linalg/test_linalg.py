"""Matrices of kernels, exact decompositions, energies."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim import linalg
from spectrim.errors import SettingError
from spectrim.linalg.fold import folds, leading
from spectrim.linalg.polar import POLAR_FLOOR

SHAPES = [(6, 4, 3), (6, 4, 3, 5), (6, 4, 1, 1), (4, 6, 2, 3, 2), (8, 4), (4, 4, 3, 3), (4, 2, 5, 1), (2, 4, 1, 5), (4, 6, 1, 3, 2)]
FIRST = {(3, 5): 3, (2, 3, 2): 2, (3, 3): 3, (1, 3, 2): 3}  # taps that the spatial fold has on the input side; all where not listed


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def near(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fold", ["channel", "spatial", "input"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_folding_is_inverted_and_has_the_sizes_it_says(shape: Any, groups: int, transposed: bool, fold: Any) -> None:
    weight = double(*shape)
    matrix = linalg.to_matrix(weight, fold, groups, transposed)
    out, in_ = (shape[1], shape[0] // groups) if transposed else (shape[0] // groups, shape[1])
    kernel = shape[2:]
    taps = math.prod(kernel)
    first = {"channel": taps, "spatial": FIRST.get(kernel, taps), "input": 1}[fold]
    expected = (out * taps // first, in_ * first)
    assert tuple(matrix.shape) == ((groups, *expected) if groups > 1 else expected)
    assert torch.equal(linalg.from_matrix(matrix, shape, fold, groups, transposed), weight)


def test_entries_are_where_the_design_says() -> None:
    weight = double(4, 3, 2, 5)
    channel, spatial, input_ = (linalg.to_matrix(weight, fold) for fold in ("channel", "spatial", "input"))
    for o, i, y, x in [(0, 0, 0, 0), (3, 1, 1, 2), (2, 2, 0, 4)]:
        assert channel[o, (i * 2 + y) * 5 + x] == weight[o, i, y, x]
        assert spatial[o * 5 + x, i * 2 + y] == weight[o, i, y, x]
        assert input_[(o * 2 + y) * 5 + x, i] == weight[o, i, y, x]
    grouped = linalg.to_matrix(weight, "channel", groups=2)
    assert torch.equal(grouped[1], linalg.to_matrix(weight[2:], "channel"))
    back = linalg.to_matrix(weight, "channel", transposed=True)  # (in, out, ...): the second axis is the output
    assert back[2, (3 * 2 + 1) * 5 + 4] == weight[3, 2, 1, 4]
    volume = double(4, 3, 1, 2, 5)
    assert linalg.to_matrix(volume, "spatial")[3 * 5 + 4, 2 * 2 + 1] == volume[3, 2, 0, 1, 4]


def test_the_input_fold_by_hand() -> None:
    """``K[:, i, :] = a_i I`` with ``a = (1, 2)``: of rank one over the inputs, and of equal singular values over the outputs."""
    eye = torch.eye(2, dtype=torch.float64)
    kernel = torch.stack([eye, 2 * eye], 1)
    assert linalg.to_matrix(kernel, "input").tolist() == [[1, 2], [0, 0], [0, 0], [1, 2]]
    assert torch.linalg.svdvals(linalg.to_matrix(kernel, "input")).tolist() == pytest.approx([math.sqrt(10), 0], abs=1e-12)
    assert torch.linalg.svdvals(linalg.to_matrix(kernel, "channel")).tolist() == pytest.approx([math.sqrt(5)] * 2, rel=1e-12)


def test_few_outputs_of_many_inputs_and_taps_lose_less_in_the_input_fold() -> None:
    """16 x 128 x 64 taps of noise at half the multiply-accumulates: 7 of 16 or 56 of 128 singular values."""
    kernel, share = double(16, 128, 64), {}
    for fold, rank in (("channel", 7), ("input", 56)):
        matrix = linalg.to_matrix(kernel, fold)
        assert rank == (16 * 128 * 64) // 2 // sum(matrix.shape)
        tail = linalg.tail_energy(torch.linalg.svdvals(matrix))
        share[fold] = float(tail[rank] / tail[0])
    assert share["channel"] == pytest.approx(0.544, abs=0.005)  # 9 of 16 nearly equal energies
    assert share["input"] == pytest.approx(0.414, abs=0.005)


def test_an_unknown_fold_is_refused() -> None:
    unchecked: Any = getattr(leading, "__wrapped__", leading)  # without the checks of argument types
    with pytest.raises(SettingError, match="scheme must be 'channel', 'spatial' or 'input', got 'diagonal'"):
        unchecked("diagonal", (3, 3))


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ((), ("channel",)),
        ((1,), ("channel",)),
        ((1, 1), ("channel",)),
        ((5,), ("channel", "input")),
        ((64, 1), ("channel", "input")),
        ((1, 5), ("channel", "input")),
        ((3, 1, 3), ("channel", "spatial", "input")),
        ((1, 3, 3), ("channel", "spatial", "input")),
        ((2, 3), ("channel", "spatial", "input")),
    ],
    ids=str,
)
def test_folds_are_those_whose_matrices_differ(kernel: Any, expected: Any) -> None:
    assert folds(kernel) == expected
    weight = double(6, 4, *kernel)
    shapes = {fold: tuple(linalg.to_matrix(weight, fold).shape) for fold in ("channel", "spatial", "input")}
    assert {shapes[fold] for fold in expected} == set(shapes.values())
    assert len(set(shapes.values())) == len(expected)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (3, 5, 4), (1, 6)], ids=str)
def test_svd(shape: Any) -> None:
    matrix = torch.randn(shape)
    U, S, Vh = linalg.svd(matrix)
    assert U.dtype == S.dtype == Vh.dtype == torch.float64
    near(U * S.unsqueeze(-2) @ Vh, matrix.double())
    assert (S.diff() <= 0).all()


@pytest.mark.parametrize(("out", "rank", "in_"), [(7, 3, 5), (5, 5, 5), (3, 6, 4), (1, 1, 1), (9, 4, 2)])
@pytest.mark.parametrize("blocks", [(), (3,)])
def test_svd_of_product_is_the_svd(out: int, rank: int, in_: int, blocks: tuple[int, ...]) -> None:
    U, S, Vh = double(*blocks, out, rank), double(*blocks, rank), double(*blocks, rank, in_)
    product = U * S.unsqueeze(-2) @ Vh
    left, values, right = linalg.svd_of_product(U.float(), S.float(), Vh.float())
    kept = min(out, rank, in_)
    assert (left.shape, values.shape, right.shape) == ((*blocks, out, kept), (*blocks, kept), (*blocks, kept, in_))
    assert left.dtype == torch.float64
    left, values, right = linalg.svd_of_product(U, S, Vh)
    near(left * values.unsqueeze(-2) @ right, product)
    near(values, torch.linalg.svdvals(product)[..., :kept])
    near(left.mT @ left, torch.eye(kept, dtype=torch.float64).expand(*blocks, kept, kept))
    near(right @ right.mT, torch.eye(kept, dtype=torch.float64).expand(*blocks, kept, kept))


def test_svd_of_product_of_degenerate_factors() -> None:
    U, S, Vh = double(6, 3), torch.tensor([2.0, 0.0, -1.0]).double(), double(3, 4)
    U[:, 2] = U[:, 0]
    left, values, right = linalg.svd_of_product(U, S, Vh)
    near(left * values.unsqueeze(-2) @ right, U * S @ Vh)
    assert linalg.orthogonality_defect(left) < 1e-12
    zero = linalg.svd_of_product(U, torch.zeros(3).double(), Vh)
    assert not zero[1].any()
    assert linalg.orthogonality_defect(zero[0]) < 1e-12


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20))
def test_tail_energy_by_its_definition(values: list[float]) -> None:
    tail = linalg.tail_energy(torch.tensor(values))
    squares = sorted((float(value) ** 2 for value in torch.tensor(values).double()), reverse=True)
    assert tail.dtype == torch.float64
    assert len(tail) == len(values) + 1
    assert tail[-1] == 0
    for rank, left in enumerate(tail.tolist()):
        assert left == pytest.approx(math.fsum(squares[rank:]), rel=1e-12, abs=1e-300)


def test_a_small_tail_is_not_lost_in_a_large_total() -> None:
    assert linalg.tail_energy(torch.tensor([1e8, 1e-8]).double())[1] == pytest.approx(1e-16, rel=1e-12)


def test_rank_at_energy() -> None:
    spectrum = torch.tensor([2.0, 1.0, 1.0])  # energies 4, 1, 1 of 6
    assert [linalg.rank_at_energy(spectrum, keep) for keep in (0.01, 4 / 6, 0.67, 5 / 6, 0.84, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert linalg.rank_at_energy(torch.ones(10), 0.9) == 9
    assert linalg.rank_at_energy(torch.zeros(4), 1.0) == 1


def test_pooled_spectrum_has_the_tail_energies_of_all_blocks_together() -> None:
    S = double(3, 5)
    pooled = linalg.pooled_spectrum(S)
    each = torch.stack([linalg.tail_energy(block) for block in S.abs()]).sum(0)
    near(linalg.tail_energy(pooled), each)
    assert (pooled.diff() <= 0).all()
    assert torch.equal(linalg.pooled_spectrum(torch.tensor([1.0, -3.0, 2.0])), torch.tensor([3.0, 2.0, 1.0]).double())
    assert not linalg.pooled_spectrum(S.requires_grad_()).requires_grad


def test_orthogonality_defect() -> None:
    q = torch.linalg.qr(double(7, 4)).Q
    assert linalg.orthogonality_defect(q) < 1e-12
    assert linalg.orthogonality_defect(2 * q) == pytest.approx(3.0)  # ||4 I - I||_F / sqrt(4)
    assert linalg.orthogonality_defect(torch.stack([q, 2 * q])) == pytest.approx(3.0)


# ---- polar factors


def conditioned(out: int, in_: int, condition: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with a logarithmic spectrum, and its polar factor."""
    U, S, Vh = torch.linalg.svd(double(out, in_), full_matrices=False)
    spectrum = torch.logspace(0, -math.log10(condition), len(S), dtype=torch.float64)
    return U * spectrum @ Vh, U @ Vh


@pytest.mark.parametrize(
    ("steps", "dtype", "tolerance"), [(6, torch.float64, 2e-3), (7, torch.float64, 2e-9), (7, torch.float32, 5e-5)], ids=str
)
@pytest.mark.parametrize("condition", [1, 30, 400])
@pytest.mark.parametrize("shape", [(20, 20), (16, 50), (50, 16), (64, 3), (1, 7)], ids=str)
def test_polar_factor_is_as_accurate_as_stated(shape: Any, condition: float, steps: int, dtype: torch.dtype, tolerance: float) -> None:
    matrix, polar = conditioned(*shape, condition)
    for scale in (1.0, 1e-20, 1e20):
        found = linalg.polar_factor((scale * matrix).to(dtype), steps)
        assert found.dtype == dtype
        assert float(torch.linalg.matrix_norm(found.double() - polar, 2)) < tolerance


def test_polar_factors_of_a_stack_are_those_of_each() -> None:
    stack = double(3, 2, 5, 4)
    near(linalg.polar_factor(stack)[1, 1], linalg.polar_factor(stack[1, 1]))
    near(linalg.polar_factor(stack.mT), linalg.polar_factor(stack).mT)


def test_polar_factor_of_zeros_and_of_low_rank() -> None:
    assert not linalg.polar_factor(torch.zeros(2, 4, 3)).any()
    left, right = torch.linalg.qr(double(9, 2)).Q, torch.linalg.qr(double(6, 2)).Q
    error = linalg.polar_factor(left * torch.tensor([2.0, 0.5]).double() @ right.mT) - left @ right.mT
    assert float(torch.linalg.matrix_norm(error, 2)) < 2e-9


@pytest.mark.parametrize(("steps", "error"), [(1, 0.992), (6, 1e-3), (7, 2e-9), (9, 1e-14)])
def test_polar_schedule_brings_its_interval_to_one(steps: int, error: float) -> None:
    x = torch.logspace(math.log10(POLAR_FLOOR), 0, 20001, dtype=torch.float64)
    for a, b, c in linalg.polar_schedule(steps):
        x = a * x + b * x**3 + c * x**5
    assert float((x - 1).abs().max()) <= error


# ---- fast decompositions


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (3, 4, 4)], ids=str)
def test_spectrum(shape: Any) -> None:
    matrix = double(*shape)
    near(linalg.spectrum(matrix).flip(-1), torch.linalg.svdvals(matrix))
    assert linalg.spectrum(torch.zeros(shape)).dtype == torch.float64


@pytest.mark.parametrize("shape", [(200, 260), (260, 200), (2, 150, 200)], ids=str)
@pytest.mark.parametrize("rank", [1, 10, 40])
@pytest.mark.parametrize("decay", [0.0, 1.0], ids=["flat", "decaying"])
def test_randomized_svd_is_within_one_percent_of_the_best(shape: Any, rank: int, decay: float) -> None:
    U, S, Vh = torch.linalg.svd(double(*shape), full_matrices=False)
    S = S * torch.arange(1, S.shape[-1] + 1) ** -decay
    matrix = U * S.unsqueeze(-2) @ Vh
    left, values, right = linalg.randomized_svd(matrix, rank)
    assert (left.shape[-1], values.shape[-1], right.shape[-2]) == (rank, rank, rank)
    best = S[..., rank:].square().sum().sqrt()
    error = (matrix - left * values.unsqueeze(-2) @ right).norm()
    assert best * (1 - 1e-12) <= error <= 1.01 * best
    assert (values.diff() <= 0).all()
    assert linalg.orthogonality_defect(left) < 1e-12
    assert linalg.orthogonality_defect(right.mT) < 1e-12


def test_randomized_svd_of_low_rank_is_exact_and_repeats() -> None:
    matrix = double(60, 5) @ double(5, 40)
    U, S, Vh = linalg.randomized_svd(matrix, 5)
    torch.testing.assert_close(U * S @ Vh, matrix, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(S, torch.linalg.svdvals(matrix)[:5], rtol=1e-10, atol=0)
    before = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(linalg.randomized_svd(matrix, 5), (U, S, Vh), strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert linalg.randomized_svd(matrix.half(), 5)[0].dtype == torch.float32
    assert linalg.randomized_svd(matrix, 40)[1].shape == (40,)


# Truncation in other norms


def metric(size: int, rank: int, *blocks: int) -> torch.Tensor:
    rows = double(*blocks, rank, size)
    return rows.mT @ rows


def weighted_error(difference: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor:
    """``tr(L D R D^T)``, summed over blocks."""
    moved = difference if right is None else difference @ right
    moved = moved if left is None else left @ moved
    return (moved * difference).sum()


METRICS = {
    "inputs": (None, 9),
    "inputs-rank-deficient": (None, 3),
    "outputs": (8, None),
    "both": (8, 9),
    "both-inputs-rank-deficient": (8, 2),
}


@pytest.mark.parametrize(("left_rank", "right_rank"), METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("blocks", [(), (2,)], ids=["one", "blocks"])
@pytest.mark.parametrize(("out", "held", "in_"), [(6, 6, 7), (7, 5, 5), (6, 4, 7)])
def test_the_weighted_error_is_the_weighted_tail(
    out: int, held: int, in_: int, blocks: tuple[int, ...], left_rank: int | None, right_rank: int | None
) -> None:
    U, S, Vh = linalg.svd_of_product(double(*blocks, out, held), double(*blocks, held), double(*blocks, held, in_))
    whole = U * S.unsqueeze(-2) @ Vh
    left = None if left_rank is None else metric(out, left_rank, *blocks)
    right = None if right_rank is None else metric(in_, right_rank, *blocks)
    X, values, Y = linalg.weighted_svd(U, S, Vh, left, right)
    near(X @ Y, whole)
    near(linalg.weighted_spectrum(U, -S, Vh, left, right), values)
    scale = float(weighted_error(whole, left, right))
    for rank in range(1, held + 1):
        cut = X[..., :rank] @ Y[..., :rank, :]
        error = weighted_error(whole - cut, left, right)
        assert abs(float(error - values[..., rank:].square().sum())) < 1e-9 * scale
        if rank < held:
            for _ in range(5):  # nor is any other matrix of that rank nearer, in or out of the space of the factors
                nudge = 1e-2 * double(*blocks, out, rank), 1e-2 * double(*blocks, rank, in_)
                other = (X[..., :rank] + nudge[0]) @ (Y[..., :rank, :] + nudge[1])
                assert weighted_error(whole - other, left, right) > error - 1e-9 * scale
            random = double(*blocks, out, rank) @ double(*blocks, rank, in_)
            assert weighted_error(whole - random, left, right) > error


def test_weighted_truncation_by_hand() -> None:
    """A diagonal matrix ``diag(3, 2)``: the second output counts four times, the second input nine times."""
    eye, S = torch.eye(2).double(), torch.tensor([3.0, 2.0]).double()
    diagonal = torch.tensor([1.0, 4.0]).double(), torch.tensor([1.0, 9.0]).double()
    for left, right in (diagonal, tuple(torch.diag(d) for d in diagonal)):
        X, values, Y = linalg.weighted_svd(eye, S, eye, left, right)
        near(values, torch.tensor([12.0, 3.0]).double())  # 2 * sqrt(4) * sqrt(9), and 3
        near(X[:, :1] @ Y[:1], torch.tensor([[0.0, 0.0], [0.0, 2.0]]).double())


def test_the_identity_and_zeros_weigh_nothing() -> None:
    U, S, Vh = linalg.svd(double(5, 4))
    for size, weight in ((1.0, 1.0), (0.0, 1.0), (9.0, 3.0)):
        X, values, Y = linalg.weighted_svd(U, S, Vh, right=size * torch.eye(4).double())
        near(values, weight * S)
        near(X[:, :2] @ Y[:2], U[:, :2] * S[:2] @ Vh[:2])


def test_outputs_without_weight_stay_finite() -> None:
    U, S, Vh = linalg.svd(double(5, 4))
    left = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])).double()
    X, _, Y = linalg.weighted_svd(U, S, Vh, left)
    whole = U * S @ Vh
    cut = X[:, :2] @ Y[:2]
    assert weighted_error(whole - cut, left, None) < 1e-9 * weighted_error(whole, left, None)
    assert cut.norm() < 1e6 * whole.norm()


@pytest.mark.parametrize("seen", [40, 299, 0])
def test_wide_metrics_of_few_directions_have_a_root(seen: int) -> None:
    wide = linalg.spectral.WIDE + 44
    rows, others = torch.randn(seen, wide, dtype=torch.float64), torch.randn(seen, wide, dtype=torch.float64)
    left, right, eye = rows.mT @ rows, others.mT @ others, torch.eye(wide, dtype=torch.float64)
    root, inverse = linalg.spectral.metric_root(eye, left, linalg.spectral.LEFT_FLOOR)
    assert torch.allclose(root @ inverse, eye, atol=1e-5)
    assert torch.allclose(root.mT @ root, left if seen else eye, atol=1e-8 * (float(left.norm()) + (seen == 0)))
    U, S, Vh = linalg.svd(torch.randn(wide, wide, dtype=torch.float64))
    X, values, Y = linalg.spectral.weighted_svd(U, S, Vh, left, right)
    W = U * S @ Vh
    assert torch.allclose(X @ Y, W, atol=1e-8 * float(W.norm()))
    if seen:
        lost = W - X[:, :20] @ Y[:20]
        assert float(((left @ lost @ right) * lost).sum()) == pytest.approx(float(values[20:].square().sum()), rel=1e-6)
