"""A budget is met by count, from close below, with the least energy lost; what cannot be met says what can."""

import importlib.util
import itertools
import re
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim import zoo
from spectrim.budget.allocate import allocate, as_fractions
from spectrim.budget.budget import Budget
from spectrim.budget.costs import rank_costs, spectra
from spectrim.budget.latency_table import latency_table
from spectrim.budget.timed import LatencyTable
from spectrim.errors import LayerError, SettingError
from spectrim.layers import named_factors
from spectrim.linalg.spectral import tail_energy
from spectrim.metrics.clock import Latency
from spectrim.metrics.macs import count_macs
from spectrim.metrics.measurement import measure

knapsack = sys.modules["spectrim.budget.knapsack"]
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
@pytest.mark.parametrize("states", [0, 2**28], ids=["solver", "dynamic programming"])
def test_nothing_better_exists_on_a_small_case(seed: int, kind: str, states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "STATES", states)
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


@pytest.mark.parametrize("seed", range(20))
def test_dynamic_programming_finds_the_optimum_that_the_solver_comes_near(seed: int) -> None:
    """Of weights with different numbers of choices, costs in different units, and choices that cost more and lose more."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 6, size=5)
    starts = np.cumsum([0, *sizes])
    objective, row = random.random(starts[-1]), 6.0 * random.integers(1, 9, size=starts[-1]) * random.integers(1, 3)
    every = list(itertools.product(*(range(size) for size in sizes)))
    costs = [sum(row[start + place] for start, place in zip(starts, places, strict=False)) for places in every]
    losses = [sum(objective[start + place] for start, place in zip(starts, places, strict=False)) for places in every]
    for most in np.quantile(costs, [0.0, 0.2, 0.5, 1.0]):
        limit = knapsack._Limit("macs", row, float(most), float(row.sum()))
        picked = knapsack._by_dynamic_programming(objective, starts, limit)
        assert picked is not None
        place = every.index(tuple(picked))
        assert costs[place] <= most
        assert losses[place] == pytest.approx(min(loss for loss, cost in zip(losses, costs, strict=True) if cost <= most))


@pytest.mark.parametrize("seed", range(10))
def test_the_relaxation_answers_only_near_the_optimum(seed: int) -> None:
    """Of many weights with convex losses it does; where a solution is too far from its bound it has none."""
    random, smooth = np.random.default_rng(seed), seed % 2
    counts = random.integers(2, 30, size=400 if smooth else 3)
    starts = np.cumsum([0, *counts])
    objective = np.concatenate([random.uniform(0.6, 0.95) ** np.arange(n) if smooth else np.sort(random.random(n))[::-1] for n in counts])
    row = np.concatenate([6.0 * np.arange(1, n + 1) * random.integers(1, 5) for n in counts])
    most = float(sum(row[starts[1:] - 1]) * 0.35)
    limit = knapsack._Limit("macs", row, most, float(row.sum()))
    picked, exact = knapsack._by_relaxation(objective, starts, limit), knapsack._by_dynamic_programming(objective, starts, limit)
    assert exact is not None
    assert picked is not None or not smooth
    if picked is not None:
        assert row[starts[:-1] + picked].sum() <= most
        best = objective[starts[:-1] + exact].sum()
        assert best <= objective[starts[:-1] + picked].sum() <= best * (1 + 1.01 * knapsack.GAP)


def test_dynamic_programming_leaves_seconds_and_fine_units_to_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    starts, objective, row = np.array([0, 2, 4]), np.array([1.0, 0.0, 1.0, 0.0]), np.array([1.0, 5.0, 2.0, 7.0])
    limit = knapsack._Limit("macs", row, 8.0, 12.0)
    assert knapsack._by_dynamic_programming(objective, starts, limit) in ([1, 0], [0, 1])
    assert knapsack._by_dynamic_programming(objective, starts, replace(limit, row=row / 3)) is None
    monkeypatch.setattr(knapsack, "STATES", 10)
    assert knapsack._by_dynamic_programming(objective, starts, limit) is None
    assert knapsack._solve(objective, starts, [limit]) in ([1, 0], [0, 1])


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
    low = sp.prune(sp.factorize(dense), sp.budget.Fraction(0.6))
    ranks = allocate(low, Budget(macs=0.3), x)
    assert all(ranks[name] <= factors.rank for name, factors in named_factors(low))
    assert count_macs(sp.merge(sp.prune(low, ranks)), x) <= 0.3 * count_macs(dense, x), "fractions are of the dense network"


@pytest.mark.parametrize("states", [0, 2**28], ids=["solver", "dynamic programming"])
def test_the_solvers_tolerance_does_not_break_the_budget(states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large counts: a millionth of the network is thousands of multiply-accumulates."""
    monkeypatch.setattr(knapsack, "STATES", states)
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
    with pytest.raises(SettingError, match=r"Budget: no ranks satisfy macs=0\.2 and params=0\.12 together; relax"):
        allocate(low, Budget(macs=0.2, params=0.12), x)


def test_nothing_to_allocate() -> None:
    with pytest.raises(LayerError, match=r"call factorize\(model\) first"):
        allocate(network(), Budget(macs=0.5), inputs())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {},
            r"Budget: one of macs, params, .*, max_drop, max_loss_rise, coded_bytes must be given, got None; Budget\(macs=0.4\) keeps 40 %",
        ),
        ({"macs": 0.0}, r"Budget: macs must be the fraction kept, in \(0, 1\], got 0.0"),
        ({"macs": 40.0}, r"Budget: macs must be the fraction kept, in \(0, 1\], got 40.0"),
        ({"params": -0.1}, r"Budget: params must be the fraction kept"),
        ({"params": float("nan")}, r"Budget: params must be the fraction kept"),
        ({"size": 5000.0}, r"Budget: size must be the fraction kept, in \(0, 1\], got 5000.0; write size_bytes= for bytes"),
        ({"latency": 2.0}, r"Budget: latency must be the fraction kept, in \(0, 1\], got 2.0; write latency_s= for seconds"),
        ({"size_bytes": 0.4}, r"Budget: size_bytes must be bytes, at least 1, got 0.4; Budget\(size=0.4\) keeps 40 %"),
        ({"size_bytes": float("inf")}, "Budget: size_bytes must be bytes, at least 1, got inf"),
        ({"latency_s": 0.0}, r"Budget: latency_s must be seconds, above 0, got 0.0; Budget\(latency=0.4\) keeps 40 %"),
        ({"latency_s": float("nan")}, "Budget: latency_s must be seconds, above 0, got nan"),
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


# ---- bytes, seconds, other importances


def test_a_budget_prints_what_it_limits() -> None:
    assert repr(Budget(size=0.4, latency_s=0.002)) == "Budget(size=0.4, latency_s=0.002)"
    assert Budget(size_bytes=1000, macs=0.5).limits == {"macs": 0.5, "size_bytes": 1000}
    assert Budget(macs=0.5) == Budget(0.5)
    assert len({Budget(macs=0.5), Budget(0.5), Budget(params=0.5)}) == 2


def size_of(model: nn.Module) -> int:
    return measure(model, latency=False).size_bytes


@pytest.mark.parametrize(("kind", "kept"), [("macs", 0.455), ("params", 0.32), ("size", 0.2), ("size_bytes", 0.3)])
def test_a_residual_network_meets_its_budget_within_one_percent(kind: str, kept: float) -> None:
    dense, x = zoo.resnet20(), torch.randn(1, 3, 32, 32)
    low = sp.factorize(dense, "spatial")
    count = {"macs": lambda model: count_macs(model, x), "params": count_params}.get(kind, size_of)
    limit = kept * count(dense)
    ranks = allocate(low, Budget(**{kind: limit if kind == "size_bytes" else kept}), x)
    assert 0.99 * limit <= count(sp.merge(sp.prune(low, ranks))) <= limit


class Mixed(nn.Module):
    """Buffers, an integer one among them, layers in half precision, and a table whose indices no other layer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Linear(24, 24).to(torch.bfloat16)
        self.register_buffer("steps", torch.arange(100))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).to(torch.bfloat16))  # type: ignore[no-any-return]


def test_bytes_are_those_of_parameters_and_buffers_in_their_own_precision() -> None:
    dense, x = Mixed().eval(), torch.randn(2, 24)
    low = sp.factorize(dense, where=EVERYTHING)
    whole = size_of(dense)
    assert whole == 4 * 600 + 2 * 600 + 4 * 4 * 24 + 8 + 800
    for limit in (3000, 3700, 4444):
        merged = sp.merge(sp.prune(low, allocate(low, Budget(size_bytes=limit), x)))
        assert limit - 4 * 48 < size_of(merged) <= limit
    assert allocate(low, Budget(size_bytes=10 * whole), x) == {"first": 24, "second": 24}, "more than dense is no limit"
    with pytest.raises(SettingError, match="Budget: size_bytes must be at least 1624 bytes for this network, got 1000;") as caught:
        allocate(low, Budget(size_bytes=1000), x)
    smallest = int(re.search(r"at least (\d+) bytes", str(caught.value))[1])
    assert allocate(low, Budget(size_bytes=smallest), x) == {"first": 1, "second": 1}
    assert size_of(sp.merge(sp.prune(low, sp.budget.Fixed(1)))) == smallest


@pytest.mark.parametrize("name", ["lstm", "tied", "attention", "convolutions"])
def test_bytes_of_whole_networks(name: str) -> None:
    tokens = torch.randint(0, 60, (2, 7))
    dense, x = {
        "lstm": lambda: (zoo.LSTMLanguageModel(60, 24, 24, 2, 0.0), tokens),
        "tied": lambda: (zoo.LSTMLanguageModel(60, 24, 24, 1, 0.0, tied=True), tokens),
        "attention": lambda: (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 6, 16)),
        "convolutions": lambda: (network(), inputs()),
    }[name]()
    low = sp.factorize(dense, where=EVERYTHING)
    merged = sp.merge(sp.prune(low, allocate(low, Budget(size=0.7), x)))
    assert 0.65 * size_of(dense) < size_of(merged) <= 0.7 * size_of(dense)


def table_of(low: nn.Module, x: Any, pair_s: float = 1e-5, dense_s: float = 1e-3) -> LatencyTable:
    """A latency table in which a pair takes `pair_s` a rank and every dense layer `dense_s`."""
    table = latency_table(low, x, time_box=1e-3, multiple=1)
    timings = {
        key: replace(timing, dense_s=dense_s, pair_s=tuple(pair_s * rank for rank in timing.ranks)) for key, timing in table.timings.items()
    }
    return replace(table, timings=timings)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Whole networks take 5 milliseconds; returns those that were timed."""
    timed: list[nn.Module] = []

    def compare(models: dict[str, nn.Module], inputs: Any, *, threads: int, **more: Any) -> dict[str, Latency]:
        timed.extend(models.values())
        return dict.fromkeys(models, Latency(5e-3, 0.0, 1, threads, 1))

    monkeypatch.setattr(sys.modules["spectrim.budget.whole_network"], "compare_latency", compare)
    return timed


def test_a_latency_budget_counts_the_rest_of_the_network(clock: list[nn.Module]) -> None:
    dense, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(1, 64)
    low = sp.factorize(dense, where=EVERYTHING)
    table = table_of(low, x)
    for budget in (Budget(latency=0.7), Budget(latency_s=3.5e-3)):
        ranks = allocate(low, budget, x, latency=table)
        assert sum(ranks.values()) == 50, "3 of 5 ms are not these layers': 0.5 ms are left for 10 microseconds a rank"
    assert [type(layer) for layer in clock[0]] == [nn.Linear, nn.ReLU, nn.Linear], "timed dense"
    assert [layer.weight.shape for layer in clock[0] if isinstance(layer, nn.Linear)] == [(64, 64)] * 2
    assert allocate(low, Budget(latency=1.0), x, latency=table) == {"0": 64, "2": 64}
    cut = sp.prune(low, {"0": 20, "2": 12})
    assert sum(allocate(cut, Budget(latency=0.64), x, latency=table).values()) == 20, "fractions are of the dense network"
    with pytest.raises(SettingError, match=r"Budget: latency must be at least 0\.6040 for this network, got 0\.5"):
        allocate(low, Budget(latency=0.5), x, latency=table)
    with pytest.raises(SettingError, match=r"Budget: latency_s must be at least 0\.0030200 seconds for this network, got 0\.001"):
        allocate(low, Budget(latency_s=0.001), x, latency=table)
    both = allocate(low, Budget(latency=0.7, params=0.3), x, latency=table)
    assert count_params(sp.merge(sp.prune(low, both), latency=table)) <= 0.3 * count_params(dense)
    assert sum(both.values()) < 50


def test_what_the_table_did_not_time_is_of_the_rest(clock: list[nn.Module]) -> None:
    dense, x = nn.Sequential(nn.Embedding(30, 64), nn.Linear(64, 64)), torch.randint(0, 30, (1, 3))
    low = sp.factorize(dense, where=EVERYTHING)
    ranks = allocate(low, Budget(latency=0.85), x, latency=table_of(low, x))
    assert ranks == {"0": 30, "1": 25}


def test_a_latency_budget_needs_a_table_made_with_the_same_batch() -> None:
    low, x = sp.factorize(nn.Linear(64, 64)), torch.randn(1, 64)
    hint = r"table = latency_table\(model, inputs\) makes one"
    for budget in (Budget(latency=0.5), Budget(latency_s=1.0)):
        with pytest.raises(SettingError, match=rf"allocate: latency must be a latency table for .*, got None; {hint}"):
            allocate(low, budget, x)
    with pytest.raises(
        SettingError, match=r"allocate: inputs must be the batch that the latency table was made with, got 'another batch'.*2x64"
    ):
        allocate(low, Budget(latency=0.5), torch.randn(2, 64), latency=table_of(low, x))


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs the extra onnx")
def test_the_dense_network_is_timed_in_the_backend_of_the_table() -> None:
    low, x = sp.factorize(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))), torch.randn(1, 64)
    table = replace(table_of(low, x, pair_s=1e-9, dense_s=1e-7), backend="onnx")
    assert allocate(low, Budget(latency_s=10.0), x, latency=table) == {"0": 64}


def test_the_dense_network_is_really_timed() -> None:
    low, x = sp.factorize(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))), torch.randn(1, 64)
    table = table_of(low, x, pair_s=1e-9, dense_s=1e-7)  # a linear layer cannot be that fast: nearly all is the rest
    assert allocate(low, Budget(latency_s=10.0), x, latency=table) == {"0": 64}
    with pytest.raises(SettingError, match=r"Budget: latency_s must be at least 0\.0"):
        allocate(low, Budget(latency_s=2e-7), x, latency=table)


def test_bytes_and_seconds_as_fractions(clock: list[nn.Module]) -> None:
    dense, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(1, 64)
    low = sp.factorize(dense, where=EVERYTHING)
    assert as_fractions(Budget(macs=0.4), low, x) == Budget(macs=0.4)
    half = size_of(dense) // 2
    budget = as_fractions(Budget(macs=0.9, size_bytes=half), low, x)
    assert budget == Budget(macs=0.9, size=0.5)
    assert allocate(low, budget, x) == allocate(low, Budget(macs=0.9, size_bytes=half), x)
    assert as_fractions(Budget(size=0.3, size_bytes=half), low, x) == Budget(size=0.3)
    assert as_fractions(Budget(size_bytes=10 * half), low, x) == Budget(size=1.0)
    assert as_fractions(Budget(latency_s=2e-3), low, x, latency=table_of(low, x)) == Budget(latency=0.4)


class Given:
    """An importance that returns what it was given."""

    def __init__(self, distortions: Any) -> None:
        self.distortions = distortions

    def __call__(self, model: nn.Module, /) -> Any:
        return self.distortions


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_the_unit_of_an_importance_does_not_matter(unit: float) -> None:
    dense, x = network(), inputs()
    low = sp.factorize(dense)
    energies = {name: tail_energy(values) / tail_energy(values)[0] for name, values in spectra(low).items()}
    ranks = allocate(low, Budget(macs=0.4), x, importance=Given({name: unit * distortion for name, distortion in energies.items()}))
    assert loss(low, ranks) == pytest.approx(loss(low, allocate(low, Budget(macs=0.4), x)), rel=2e-4)  # the solver's relative gap


def test_a_steep_importance_is_solved_as_well_as_a_flat_one() -> None:
    """What is lost at the best choice is a millionth of what could be: the solver's absolute tolerances must not decide."""
    low, x = sp.factorize(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), where=EVERYTHING), torch.randn(1, 12)
    distortions = {}
    for name in ("0", "1"):
        steps = torch.rand(13, dtype=torch.float64) * torch.tensor([1e6, *[1.0] * 11, 0.0]).double()
        distortions[name] = steps.flip(0).cumsum(0).flip(0)
    for fraction in (0.3, 0.5, 0.7):
        ranks = allocate(low, Budget(macs=fraction), x, importance=Given(distortions))
        allowed = [
            (a, b) for a, b in itertools.product(range(1, 13), repeat=2) if sum(144 if r >= 6 else 24 * r for r in (a, b)) <= fraction * 288
        ]
        best = min(float(distortions["0"][a] + distortions["1"][b]) for a, b in allowed)
        assert float(distortions["0"][ranks["0"]] + distortions["1"][ranks["1"]]) == pytest.approx(
            best, rel=2e-4
        )  # the solver's relative gap


def test_an_importance_turns_the_choice() -> None:
    low, x = sp.factorize(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), where=EVERYTHING), torch.randn(1, 16)
    falling = torch.linspace(1.0, 0.0, 17, dtype=torch.float64)
    first = allocate(low, Budget(macs=0.5), x, importance=Given({"0": 100 * falling, "1": falling}))
    second = allocate(low, Budget(macs=0.5), x, importance=Given({"0": falling, "1": 100 * falling}))
    assert (first["0"], first["1"]) == (second["1"], second["0"]) == (7, 1)


def test_three_limits_that_exclude_each_other_are_all_named() -> None:
    dense, x = nn.Sequential(nn.Embedding(200, 16), nn.Linear(16, 8)), torch.randint(0, 200, (2, 5))
    low = sp.factorize(dense, where=EVERYTHING)
    with pytest.raises(SettingError, match=r"Budget: no ranks satisfy macs=0\.2 and params=0\.12 and size=0\.5 together"):
        allocate(low, Budget(macs=0.2, params=0.12, size=0.5), x)
