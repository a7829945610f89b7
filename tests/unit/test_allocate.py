"""A budget is met by count, from close below, with the least energy lost; what cannot be met says what can."""

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim import zoo
from spectrim.allocate import Budget, allocate
from spectrim.costs import rank_costs, spectra
from spectrim.errors import LayerError, SettingError
from spectrim.layers import named_factors
from spectrim.linalg import tail_energy
from spectrim.measure import count_macs

EVERYTHING = sp.match("*")


def count_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)),
    )


def inputs(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 12, 12)


def finest_step(low: nn.Module, ranks: dict[str, int], x: Any, kind: str) -> float:
    """What the cheapest single step up would add: the budget cannot be missed by more, else that step would have been taken."""
    costs = rank_costs(low, x)
    steps = [
        getattr(costs[name], kind)[rank] - getattr(costs[name], kind)[rank - 1]
        for name, rank in ranks.items()
        if rank < len(costs[name].macs)
    ]
    return min(step for step in steps if step > 0)


@pytest.mark.parametrize("fraction", [0.2, 0.35, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_budgets_are_met_by_count_and_from_close_below(fraction: float, kind: str, scheme: Any) -> None:
    dense, x = network(), inputs()
    low = sp.factorize(dense, scheme)
    ranks = allocate(low, Budget(**{kind: fraction}), x)
    assert list(ranks) == [name for name, _ in named_factors(low)]
    merged = sp.merge(sp.prune(low, ranks))
    measured = count_macs(merged, x) if kind == "macs" else count_params(merged)
    limit = fraction * (count_macs(dense, x) if kind == "macs" else count_params(dense))
    assert measured <= limit
    assert measured > limit - finest_step(low, ranks, x, kind)


@pytest.mark.parametrize(("macs", "params"), [(0.4, 0.8), (0.8, 0.4), (0.5, 0.5)])
def test_both_budgets_at_once(macs: float, params: float) -> None:
    dense, x = network(), inputs()
    low = sp.factorize(dense, "spatial", EVERYTHING)
    merged = sp.merge(sp.prune(low, allocate(low, Budget(macs=macs, params=params), x)))
    assert count_macs(merged, x) <= macs * count_macs(dense, x)
    assert count_params(merged) <= params * count_params(dense)
    alone = [loss(low, allocate(low, budget, x)) for budget in (Budget(macs=macs), Budget(params=params))]
    assert loss(low, allocate(low, Budget(macs=macs, params=params), x)) >= max(alone) * (1 - 1e-4)  # the solver's relative gap


def loss(low: nn.Module, ranks: dict[str, int]) -> float:
    """What `allocate` minimises, written out again."""
    total = 0.0
    for name, singular_values in spectra(low).items():
        squares = singular_values.square()
        total += float(squares[ranks[name] :].sum() / squares.sum())
    return total


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_nothing_better_exists_on_a_small_case(seed: int, kind: str) -> None:
    torch.default_generator.manual_seed(seed)
    dense, x = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 6), nn.Conv1d(5, 4, 2)), torch.randn(2, 5, 7)
    with torch.no_grad():
        for layer, decay in zip(dense, (0.3, 0.6, 0.9), strict=True):
            layer.weight.mul_(torch.exp(-decay * torch.arange(layer.weight.shape[1]).float()).reshape(-1, *[1] * (layer.weight.dim() - 2)))
    low = sp.factorize(dense, where=EVERYTHING)
    fraction = 0.55
    ranks = allocate(low, Budget(**{kind: fraction}), x)
    costs = rank_costs(low, x)
    extra = sum(p.numel() for layer in dense for p in [layer.bias]) if kind == "params" else 0
    limit = fraction * (extra + sum(getattr(cost, f"dense_{kind}") for cost in costs.values()))
    best = min(
        loss(low, dict(zip(costs, choice, strict=True)))
        for choice in itertools.product(*(range(1, len(cost.macs) + 1) for cost in costs.values()))
        if extra + sum(getattr(cost, kind)[rank - 1] for cost, rank in zip(costs.values(), choice, strict=True)) <= limit
    )
    assert loss(low, ranks) == pytest.approx(best, rel=2e-4)  # the solver's relative gap is 1e-4


def test_more_budget_never_loses_more() -> None:
    low, x = sp.factorize(network()), inputs()
    losses = [loss(low, allocate(low, Budget(macs=fraction), x)) for fraction in (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)]
    assert all(a >= b * (1 - 1e-4) for a, b in itertools.pairwise(losses))  # the solver's relative gap
    assert losses[-1] == pytest.approx(0, abs=1e-12), "everything is kept"
    full = {name: factors.rank for name, factors in named_factors(low)}
    assert allocate(low, Budget(macs=1.0), x) == full


def test_important_layers_keep_more() -> None:
    dense = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    with torch.no_grad():
        dense[0].weight.copy_(torch.eye(16))  # every direction matters
        dense[1].weight.copy_(torch.diag(torch.tensor([1.0, *[1e-3] * 15])))  # one does
    low = sp.factorize(dense, where=EVERYTHING)
    assert allocate(low, Budget(macs=0.5), torch.randn(1, 16)) == {"0": 7, "1": 1}, "0.5 * 512 = 32 * (7 + 1)"
    assert allocate(low, Budget(macs=0.6), torch.randn(1, 16)) == {"0": 16, "1": 1}, (
        "0.6 * 512 = 307 >= 256 + 32: dense costs less than rank 9"
    )


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (lambda: zoo.LSTMLanguageModel(60, 24, 24, 2, 0.0), lambda: torch.randint(0, 60, (2, 7))),
        (lambda: zoo.LSTMLanguageModel(60, 24, 24, 1, 0.0, tied=True), lambda: torch.randint(0, 60, (2, 7))),
        (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), lambda: torch.randn(2, 6, 16)),
        (zoo.mlperftiny_resnet8, lambda: torch.randn(1, 3, 32, 32)),
    ],
    ids=["lstm", "tied", "encoder", "resnet8"],
)
@pytest.mark.parametrize("budget", [Budget(macs=0.7), Budget(params=0.7), Budget(macs=0.8, params=0.8)], ids=str)
def test_whole_networks(make: Any, call: Any, budget: Budget) -> None:
    dense, x = make(), call()
    low = sp.factorize(dense, where=EVERYTHING)
    merged = sp.merge(sp.prune(low, allocate(low, budget, x)))
    if budget.macs:
        assert count_macs(merged, x) <= budget.macs * count_macs(dense, x)
    if budget.params:
        assert count_params(merged) <= budget.params * count_params(dense)


def test_a_network_that_was_cut_before() -> None:
    dense, x = network(), inputs()
    low = sp.prune(sp.factorize(dense), sp.Fraction(0.6))
    ranks = allocate(low, Budget(macs=0.3), x)
    assert all(ranks[name] <= factors.rank for name, factors in named_factors(low))
    assert count_macs(sp.merge(sp.prune(low, ranks)), x) <= 0.3 * count_macs(dense, x), "fractions are of the dense network"


def test_the_solvers_tolerance_does_not_break_the_budget() -> None:
    """Large counts: a millionth of the network is thousands of multiply-accumulates."""
    dense, x = nn.Sequential(nn.Linear(90, 120), nn.ReLU(), nn.Linear(120, 90)), torch.randn(1, 5000, 90)
    low = sp.factorize(dense, where=EVERYTHING)
    full = count_macs(dense, x)
    for rank in (3, 17, 23):
        exact = 5000 * 210 * 2 * rank
        ranks = allocate(low, Budget(macs=(exact - 0.5) / full), x)
        assert count_macs(sp.merge(sp.prune(low, ranks)), x) <= exact - 1
        assert sum(ranks.values()) == 2 * rank - 1
        ranks = allocate(low, Budget(macs=(exact + 0.5) / full), x)
        assert sum(ranks.values()) == 2 * rank


def test_a_budget_below_the_smallest_network_names_that() -> None:
    dense, x = network(), inputs()
    low = sp.factorize(dense)
    for kind in ("macs", "params"):
        with pytest.raises(SettingError, match=rf"^Budget: {kind} must be at least 0\.\d{{4}} for this network, got 0\.01") as caught:
            allocate(low, Budget(**{kind: 0.01}), x)
        smallest = float(re.search(r"at least (0\.\d+)", str(caught.value))[1])
        ranks = allocate(low, Budget(**{kind: smallest}), x)
        merged = sp.merge(sp.prune(low, ranks))
        measured, full = (
            count(model) for model in (merged, dense) for count in [count_params if kind == "params" else lambda m: count_macs(m, x)]
        )
        assert measured <= smallest * full
        with pytest.raises(SettingError):
            allocate(low, Budget(**{kind: smallest - 1e-4}), x)


def test_budgets_that_exclude_each_other() -> None:
    """An embedding that is cut saves parameters, but a look-up then multiplies."""
    dense, x = nn.Sequential(nn.Embedding(200, 16), nn.Linear(16, 8)), torch.randint(0, 200, (2, 5))
    low = sp.factorize(dense, where=EVERYTHING)
    for budget in (Budget(macs=0.9), Budget(params=0.2)):
        allocate(low, budget, x)
    with pytest.raises(SettingError, match="Budget: macs and params must be looser, got 'limits that no ranks meet together'"):
        allocate(low, Budget(macs=0.2, params=0.12), x)


def test_nothing_to_allocate() -> None:
    with pytest.raises(LayerError, match=r"call factorize\(model\) first"):
        allocate(network(), Budget(macs=0.5), inputs())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"Budget: macs or params must be given, got None; Budget\(macs=0.4\) keeps 40 %"),
        ({"macs": 0.0}, r"Budget: macs must be the fraction kept, in \(0, 1\], got 0.0"),
        ({"macs": 40.0}, r"Budget: macs must be the fraction kept, in \(0, 1\], got 40.0"),
        ({"params": -0.1}, r"Budget: params must be the fraction kept"),
        ({"params": float("nan")}, r"Budget: params must be the fraction kept"),
    ],
)
def test_budgets_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Budget(**settings)


def test_spectral_loss_is_relative_to_each_layer() -> None:
    low = sp.factorize(network())
    ranks = {name: 1 for name, _ in named_factors(low)}
    tails = {name: tail_energy(values) for name, values in spectra(low).items()}
    assert loss(low, ranks) == pytest.approx(sum(float(tail[1] / tail[0]) for tail in tails.values()))
