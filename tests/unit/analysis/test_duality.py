"""Closed forms against gradient descent and the convex program, the program against cvxpy, bounds below every network."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.analysis.arrangements import arrangements, most_arrangements
from spectrim.analysis.convex_program import NeuronGL1, convex_optimum
from spectrim.analysis.duality import (
    alignment,
    certificate,
    linear_optimum,
    rank_one_optimum,
    relu_optimum,
    suggest_rank,
    suggest_ranks,
)
from spectrim.analysis.optima import path_cost, path_scale
from spectrim.errors import LayerError, SettingError
from spectrim.penalties import L1


def white(n: int, d: int) -> Tensor:
    """Return ``(n, d)`` with orthonormal rows or columns."""
    long = torch.linalg.qr(torch.randn(max(n, d), min(n, d)).double()).Q
    return long if n >= d else long.mT


def loss_of(weights: Any, X: Tensor, Y: Tensor, decay: float, relu: bool) -> Tensor:
    hidden = X
    for number, weight in enumerate(weights):
        hidden = hidden @ weight.mT
        hidden = hidden.clamp(min=0) if relu and number < len(weights) - 1 else hidden
    return (hidden - Y).square().sum() / 2 + decay / 2 * sum(weight.square().sum() for weight in weights)


def descended(X: Tensor, Y: Tensor, decay: float, layers: int, relu: bool, width: int, starts: int = 3, steps: int = 600) -> float:
    """Return the best loss of gradient descent from several starts."""
    best = math.inf
    for seed in range(starts):
        torch.manual_seed(seed)
        sizes = [X.shape[1], *[width] * (layers - 1), Y.shape[1]]
        weights = [torch.randn(b, a).double().div(a**0.5).requires_grad_() for a, b in pairwise(sizes)]
        optimizer = torch.optim.Adam(weights, 0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of(weights, X, Y, decay, relu)
            loss.backward()
            optimizer.step()
            schedule.step()
        best = min(best, loss.item())
    return best


def one_hot(counts: tuple[int, ...]) -> Tensor:
    target = torch.cat([torch.full((count,), c) for c, count in enumerate(counts)])
    return nn.functional.one_hot(target[torch.randperm(len(target))]).double()


@pytest.mark.parametrize("layers", [2, 3, 4])
@pytest.mark.parametrize("curvature", [1.0, 2.5])
def test_the_scale_of_a_path_is_the_minimum_over_a_grid(layers: int, curvature: float) -> None:
    for strength in (0.0, 0.3, 1.0, 1.4, 5.0):
        for decay in (0.0, 0.2, 1.0, 3.0):
            grid = [path_cost(k * 2e-3, strength, decay, layers, curvature) for k in range(2000)]
            found = path_cost(path_scale(strength, decay, layers, curvature), strength, decay, layers, curvature)
            assert min(grid) - 2e-5 * (1 + strength) <= found <= min(grid) + 1e-12  # the grid is that coarse


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_deep_linear_networks(layers: int, shape: tuple[int, int]) -> None:
    X, Y = white(*shape), 3 * torch.randn(shape[0], 3).double()
    best = linear_optimum(X, Y, 1.0, layers)
    assert float(loss_of(best.weights, X, Y, 1.0, relu=False)) == pytest.approx(best.loss, rel=1e-9)
    assert descended(X, Y, 1.0, layers, relu=False, width=5, starts=1) == pytest.approx(best.loss, rel=1e-4)
    assert [int(torch.linalg.matrix_rank(weight, rtol=1e-9)) for weight in best.weights] == [best.rank] * layers


@pytest.mark.parametrize("layers", [2, 3])
def test_deep_relu_networks_on_whitened_one_hot_data(layers: int) -> None:
    X, Y = white(12, 15), one_hot((7, 4, 1))
    best = relu_optimum(X, Y, 0.6 if layers == 3 else 1.3, layers)
    decay = 0.6 if layers == 3 else 1.3
    assert float(loss_of(best.weights, X, Y, decay, relu=True)) == pytest.approx(best.loss, rel=1e-9)
    assert descended(X, Y, decay, layers, relu=True, width=12) == pytest.approx(best.loss, rel=1e-4)
    assert best.rank == sum(path_scale(math.sqrt(count), decay, layers) > 0 for count in (7, 4, 1)) == 2


@pytest.mark.parametrize("layers", [2, 3])
def test_deep_relu_networks_on_inputs_of_rank_one(layers: int) -> None:
    column, row, Y = torch.randn(10).double(), torch.randn(4).double(), 3 * torch.randn(10, 2).double()
    if layers == 3:
        Y = (column + torch.randn(10).double())[:, None]  # opposite targets on both sides
    X = torch.outer(column, row)
    best = rank_one_optimum(column, row, Y, 0.5, layers)
    assert float(loss_of(best.weights, X, Y, 0.5, relu=True)) == pytest.approx(best.loss, rel=1e-9)
    assert descended(X, Y, 0.5, layers, relu=True, width=10) == pytest.approx(best.loss, rel=1e-4)


def test_three_layers_share_paths_that_agree_and_no_closed_form_is_given() -> None:
    """Both sides pull up: one hidden unit of the second layer serves both, at less than two paths."""
    column, row = torch.tensor([1.0, -1.0]).double(), torch.tensor([1.0]).double()
    Y = torch.tensor([[2.0], [2.0]]).double()
    apart = 4.0 + 2 * path_cost(path_scale(2.0, 1.0, 3), 2.0, 1.0, 3)
    assert descended(torch.outer(column, row), Y, 1.0, 3, relu=True, width=6) < 0.99 * apart
    with pytest.raises(SettingError, match="opposite targets on both sides"):
        rank_one_optimum(column, row, Y, 1.0, layers=3)


def test_two_linear_layers_by_hand_are_nuclear_norm_shrinkage() -> None:
    """``X = I``, ``Y = diag(5, 3, 1/2)``, decay 1: strengths 4, 2, 0; loss ``(25 + 9 + 1/4 - 16 - 4) / 2 = 7.125``."""
    Y = torch.diag(torch.tensor([5.0, 3.0, 0.5]))
    best = linear_optimum(torch.eye(3), Y, 1.0)
    assert best.loss == pytest.approx(7.125)
    assert best.rank == 2
    product = best.weights[1] @ best.weights[0]
    torch.testing.assert_close(product, torch.diag(torch.tensor([4.0, 2.0, 0.0])).double())
    assert float(product.sub(Y.double()).square().sum() / 2 + torch.linalg.svdvals(product).sum()) == pytest.approx(7.125)


def test_l1_on_singular_values_is_the_decay_of_two_layers() -> None:
    """At its balanced factors, ``decay / 2 (||W_1||^2 + ||W_2||^2)`` is ``decay ||W_2 W_1||_*``: `L1` of the factorized product."""
    best = linear_optimum(white(9, 5), 3 * torch.randn(9, 4).double(), 0.5)
    layer = nn.Linear(5, 4, bias=False).double()
    layer.weight.data = best.weights[1] @ best.weights[0]
    squares = sum(float(weight.square().sum()) for weight in best.weights)
    assert L1(0.5)(sp.factorize(nn.Sequential(layer), where=sp.match("*"))).item() == pytest.approx(0.5 / 2 * squares)


def test_patterns_are_all_that_random_directions_have() -> None:
    X = torch.randn(7, 3).double()
    found = {tuple(row) for row in arrangements(X).int().tolist()}
    drawn = {tuple(row) for row in (torch.randn(20000, 3).double() @ X.mT > 0).int().tolist()}
    assert len(found) == most_arrangements(X) == 2 * (1 + 6 + 15)
    assert drawn <= found
    assert len(drawn) >= len(found) - 2  # small cones may be missed
    with pytest.raises(SettingError, match="general position"):
        arrangements(torch.cat([X, X[:1]]))
    with pytest.raises(SettingError, match="few examples"):
        arrangements(torch.randn(60, 6))


@pytest.mark.parametrize("decay", [0.1, 1.0])
def test_the_convex_program_is_the_optimum_of_networks_and_that_of_cvxpy(decay: float) -> None:
    X, Y = torch.randn(6, 2).double(), torch.randn(6, 1).double()
    solved = convex_optimum(X, Y, NeuronGL1(decay))
    assert solved.residual < 1e-6
    first, second = solved.weights()
    assert float(loss_of((first, second), X, Y, decay, relu=True)) == pytest.approx(solved.loss, rel=1e-4)
    assert descended(X, Y, decay, 2, relu=True, width=20) == pytest.approx(solved.loss, rel=1e-4)
    cvxpy = pytest.importorskip("cvxpy")
    D = solved.patterns.numpy()
    v, w = (cvxpy.Variable((len(D), 2)) for _ in range(2))
    output = sum(cvxpy.multiply(d, X.numpy() @ (v[i] - w[i])) for i, d in enumerate(D))
    norms = sum(cvxpy.norm(v[i]) + cvxpy.norm(w[i]) for i in range(len(D)))
    inside = [cvxpy.multiply(2 * d - 1, X.numpy() @ one[i]) >= 0 for i, d in enumerate(D) for one in (v, w)]
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(output - Y[:, 0].numpy()) / 2 + decay * norms), inside)
    assert problem.solve(solver="CLARABEL") == pytest.approx(solved.loss, rel=1e-5)


def test_gated_networks_have_a_lower_optimum_and_agree_with_cvxpy() -> None:
    X, Y = torch.randn(6, 2).double(), torch.randn(6, 2).double()
    gated = convex_optimum(X, Y, NeuronGL1(0.3), "gated_relu")
    one = convex_optimum(X, Y[:, :1], NeuronGL1(0.3), "gated_relu")
    assert one.loss <= convex_optimum(X, Y[:, :1], NeuronGL1(0.3)).loss + 1e-6
    cvxpy = pytest.importorskip("cvxpy")
    D = gated.patterns.numpy()
    V = [cvxpy.Variable((2, 2)) for _ in D]
    output = sum(cvxpy.multiply(d[:, None].repeat(2, 1), X.numpy() @ v) for d, v in zip(D, V, strict=True))
    loss = cvxpy.sum_squares(output - Y.numpy()) / 2 + 0.3 * sum(cvxpy.normNuc(v) for v in V)
    assert cvxpy.Problem(cvxpy.Minimize(loss)).solve(solver="CLARABEL") == pytest.approx(gated.loss, rel=1e-5)


def test_closed_forms_are_optima_of_the_convex_program() -> None:
    column, row, Y = torch.randn(6).double(), torch.tensor([1.0, 2.0]).double(), 3 * torch.randn(6, 1).double()
    X = torch.outer(column, row)
    assert convex_optimum(X, Y, NeuronGL1(0.5)).loss == pytest.approx(rank_one_optimum(column, row, Y, 0.5).loss, rel=1e-4)
    X, Y = white(4, 4), torch.ones(4, 1).double()  # one class
    assert convex_optimum(X, Y, NeuronGL1(0.5)).loss == pytest.approx(relu_optimum(X, Y, 0.5).loss, rel=1e-4)


def sequential(weights: Any, relu: bool) -> nn.Sequential:
    layers = [nn.Linear(w.shape[1], w.shape[0], bias=False).double() for w in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data = weight.clone()
    return nn.Sequential(layers[0], nn.ReLU(), layers[1]) if relu else nn.Sequential(*layers)


def test_certificates_are_tight_at_the_optimum_and_below_it_elsewhere() -> None:
    X, Y = white(12, 5), 3 * torch.randn(12, 3).double()
    best = linear_optimum(X, Y, 1.0)
    tight = certificate(sequential(best.weights, relu=False), X, Y, 1.0)
    assert tight.proof
    assert (tight.loss, tight.bound) == pytest.approx((best.loss, best.loss), rel=1e-9)
    for scale in (0.0, 0.7, 1.3, 3.0):
        other = certificate(sequential([scale * weight for weight in best.weights], relu=False), X, Y, 1.0)
        assert other.bound <= best.loss * (1 + 1e-9) <= other.loss * (1 + 2e-9)
    X, Y = torch.randn(6, 2).double(), torch.randn(6, 1).double()
    solved = convex_optimum(X, Y, NeuronGL1(0.5), tol=1e-9)
    model = sequential(solved.weights(), relu=True)
    exact = certificate(model, X, Y, 0.5, method="arrangements")
    relaxed, sampled = (certificate(model, X, Y, 0.5, method=method) for method in ("relaxed", "sampled"))  # type: ignore[arg-type]
    assert exact.proof
    assert relaxed.proof
    assert not sampled.proof
    assert relaxed.bound <= exact.bound <= sampled.bound + 1e-9
    assert exact.bound <= solved.loss + 1e-7
    assert exact.bound == pytest.approx(solved.loss, rel=1e-4)  # strong duality
    assert sampled.bound == pytest.approx(solved.loss, rel=1e-3)  # its dual constraint is tight at the optimum
    assert certificate(model, X, Y, 0.5).method == "arrangements"


def test_one_factorized_network_and_bounds_for_many_examples() -> None:
    X, Y = torch.randn(200, 10).double(), torch.randn(200, 3).double()
    model = sequential([torch.randn(8, 10).double(), torch.randn(3, 8).double()], relu=True)
    low = sp.factorize(model, where=sp.match("*"))
    found, same = (certificate(one, X, Y, 5.0) for one in (model, low))
    assert found.method == "relaxed"
    assert (same.loss, same.bound) == pytest.approx((found.loss, found.bound), rel=1e-6)
    assert 0 <= found.bound <= found.loss


def test_networks_for_which_no_bound_holds_are_refused() -> None:
    X, Y = torch.randn(5, 3), torch.randn(5, 2)
    deep = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with pytest.raises(LayerError, match="for deeper networks no bound of this kind holds"):
        certificate(deep, X, Y, 1.0)
    with pytest.raises(LayerError, match="has biases"):
        certificate(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), X, Y, 1.0)
    with pytest.raises(SettingError, match="decay must be > 0"):
        certificate(deep[:3], X, torch.randn(5, 4), 0.0)
    with pytest.raises(SettingError, match="whitened"):
        linear_optimum(X, Y, 1.0)
    with pytest.raises(SettingError, match="one-hot"):
        relu_optimum(white(3, 5), torch.randn(3, 2), 1.0)
    with pytest.raises(SettingError, match="one output"):
        convex_optimum(X, Y, NeuronGL1(1.0))


def test_suggested_ranks_are_survivors_and_fall_with_the_decay() -> None:
    X, Y = torch.randn(50, 6).double(), torch.randn(50, 4).double()
    whitened = torch.linalg.svd(X, full_matrices=False)[0]
    ranks = [suggest_rank(X, Y, decay) for decay in (0.0, 1.0, 2.0, 4.0, 1e9)]
    assert ranks == [linear_optimum(whitened, Y, decay).rank or 1 for decay in (0.0, 1.0, 2.0, 4.0, 1e9)]
    assert ranks == sorted(ranks, reverse=True)
    assert suggest_ranks({"a": torch.tensor([4.0, 1.0, 0.1])}, 0.01, layers=3)["a"] <= 3


def test_alignment_is_one_for_shared_singular_vectors_and_smaller_otherwise() -> None:
    best = linear_optimum(white(9, 5), 3 * torch.randn(9, 5).double(), 0.5, layers=3)
    layers = [nn.Linear(5, 5).double() for _ in best.weights]
    for layer, weight in zip(layers, best.weights, strict=True):
        layer.weight.data = weight.clone()
    model = nn.Sequential(*layers)
    aligned = alignment(model)
    assert list(aligned) == [("0", "1"), ("1", "2")]
    assert list(aligned.values()) == pytest.approx([1.0, 1.0])
    model[1].weight.data = torch.randn(5, 5).double()
    assert max(alignment(model).values()) < 0.99
    low = sp.factorize(model, where=sp.match("*"))
    assert list(alignment(low).values()) == pytest.approx(list(alignment(model).values()), rel=1e-6)
