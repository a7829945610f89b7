"""Nothing is computed twice in one call: decompositions, copies, prices and scores are counted."""

import copy
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.metrics.evaluate import evaluate

LOSS = nn.CrossEntropyLoss()
WEIGHTS = 4


def network() -> nn.Module:
    layers = [(12, 16), (16, 16), (16, 16), (16, 12)]
    return nn.Sequential(
        *(module for sizes in layers for module in (nn.Linear(*sizes), nn.BatchNorm1d(sizes[1]), nn.ReLU())), nn.Linear(12, 4)
    )


def batches(count: int) -> list[Any]:
    return [(torch.randn(16, 12), torch.randint(4, (16,))) for _ in range(count)]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """What is called, and how often; evaluations by network (its state) and data."""
    found: Counter[Any] = Counter()
    svd, deepcopy = torch.linalg.svd, copy.deepcopy

    def counting_svd(*arguments: Any, **options: Any) -> Any:
        found["svd"] += 1
        return svd(*arguments, **options)

    def counting_copy(value: Any, memo: Any = None, *rest: Any) -> Any:
        if isinstance(value, nn.Module) and len(list(value.modules())) > WEIGHTS * 3:
            found["deepcopy"] += 1
        return deepcopy(value, memo, *rest)

    def counting_evaluate(model: nn.Module, data: Any, loss: Any) -> Any:
        state = tuple(float(tensor.double().square().sum()) for tensor in model.state_dict().values())
        found["evaluate", state, id(data)] += 1
        return evaluate(model, data, loss)

    monkeypatch.setattr(torch.linalg, "svd", counting_svd)
    monkeypatch.setattr(copy, "deepcopy", counting_copy)
    for name in ("pipeline.judge", "pipeline.teaching", "budget.judge"):
        monkeypatch.setattr(sys.modules[f"spectrim.{name}"], "evaluate", counting_evaluate)
    for name in ("budget.priced", "budget.plan", "budget.allocate"):
        priced = sys.modules[f"spectrim.{name}"].ladder  # type: ignore[attr-defined]

        def counting_ladder(*arguments: Any, priced: Any = priced, **options: Any) -> Any:
            found["ladder"] += 1
            return priced(*arguments, **options)

        monkeypatch.setattr(sys.modules[f"spectrim.{name}"], "ladder", counting_ladder)
    return found


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_whole_compress(counts: Counter[Any], epochs: int) -> None:
    sp.compress(network(), batches(3), LOSS, sp.Budget(macs=0.5), epochs, eval_data=batches(2), progress=False)
    assert counts["svd"] <= 8 * WEIGHTS
    assert counts["deepcopy"] <= 4
    assert counts["ladder"] == 1
    assert max(count for key, count in counts.items() if isinstance(key, tuple)) == 1, "each network on each data set once"


def test_a_plan_prices_the_network_once(counts: Counter[Any]) -> None:
    sp.plan(network(), torch.randn(2, 12), batches(3), LOSS)
    assert counts["ladder"] == 1
    assert counts["deepcopy"] <= 3
    assert counts["svd"] <= 5 * WEIGHTS, "factorize, exact, normalized, whitened, by the loss"


def test_several_budgets_share_a_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = network().eval(), batches(3)
    known = sp.calibrate(sp.factorize(model), data, LOSS)
    shared = [sp.compress(model, data, LOSS, budget, calibration=known, progress=False).ranks for budget in (0.5, {"macs": 0.7})]
    apart = [sp.compress(model, data, LOSS, sp.Budget(macs=fraction), progress=False).ranks for fraction in (0.5, 0.7)]
    assert shared == apart
    monkeypatch.setattr(sys.modules["spectrim.budget.plan"], "calibrate", None)
    assert "LossSensitivity" in sp.plan(model, data[0][0], data, LOSS, budgets=[0.5], calibration=known).weights[0].distortions


def test_squeezing_prices_the_network_once(counts: Counter[Any]) -> None:
    sp.compress(network(), batches(3), LOSS, sp.Budget(macs=0.5), 2, squeeze=0.5, progress=False)
    assert counts["ladder"] == 1


def test_roots_of_curvatures_serve_the_cut_and_the_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    decompositions = sys.modules["spectrim.surgery.decompositions"]
    root, met = decompositions.root, []  # type: ignore[attr-defined]

    def counting(metric: torch.Tensor) -> torch.Tensor:
        met.append(metric)
        return root(metric)

    monkeypatch.setattr(decompositions, "root", counting)
    sp.compress(network(), batches(4), LOSS, 0.6, where=sp.match("*"), cut="both", progress=False)
    assert len(met) == len({id(metric) for metric in met}) == WEIGHTS + 1
