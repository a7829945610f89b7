"""The smallest network that is at most so much worse: bisection, and budgets that say so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.budget.budget import BudgetError
from spectrim.errors import SettingError
from spectrim.files import read_json
from spectrim.pipeline.search import RESOLUTION, smallest

DENSE = {"accuracy": 0.9, "loss": 1.0}


@pytest.mark.parametrize("truth", [0.1, 0.37, 0.62, 0.99])
def test_bisection_finds_the_smallest_share_to_its_resolution(truth: float) -> None:
    def scores(share: float) -> tuple[dict[str, float], dict[str, float]]:
        return DENSE, {"accuracy": 0.9 if share >= truth else 0.8, "loss": 1.0}

    found, tried = smallest(sp.Budget(max_drop=0.5), "macs", lambda budget: budget.limits["macs"], scores)
    assert truth <= found <= truth + RESOLUTION
    assert len(tried) <= 6
    assert [one["kept"] for one in tried] == [one["budget"]["macs"] >= truth for one in tried]


def test_other_limits_hold_and_a_floor_counts_as_too_small() -> None:
    seen = []

    def make(budget: sp.Budget) -> float:
        seen.append(budget)
        if budget.limits["macs"] < 0.2:
            raise BudgetError("too small")
        return budget.limits["macs"]

    found, _ = smallest(sp.Budget(macs=0.6, params=0.5, max_drop=1.0), "macs", make, lambda share: (DENSE, DENSE))
    assert 0.2 <= found <= 0.2 + RESOLUTION
    assert all(budget.limits["params"] == 0.5 and budget.limits["macs"] <= 0.6 and not budget.drops for budget in seen)


def test_a_drop_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"at macs=0.3 the network is too much worse for max_drop=0.5: accuracy 10.00 points lower"):
        smallest(sp.Budget(macs=0.3, max_drop=0.5), "macs", lambda budget: budget, lambda _: (DENSE, {"accuracy": 0.8, "loss": 1.0}))


def test_the_loss_may_be_limited_and_accuracy_is_asked_for_by_name() -> None:
    found, _ = smallest(
        sp.Budget(max_loss_rise=0.05),
        "macs",
        lambda budget: budget.limits["macs"],
        lambda share: ({"loss": 2.0}, {"loss": 2.0 + 0.2 * (1 - share)}),
    )
    assert 0.5 <= found <= 0.5 + RESOLUTION
    with pytest.raises(SettingError, match="max_loss_rise"):
        smallest(sp.Budget(max_drop=0.5), "macs", lambda budget: budget, lambda _: ({"loss": 1.0}, {"loss": 1.0}))


@pytest.mark.parametrize("value", [-1.0, float("inf")])
def test_points_are_checked(value: Any) -> None:
    with pytest.raises(SettingError, match="max_drop"):
        sp.Budget(max_drop=value)


def test_verbs_that_score_nothing_refuse_it() -> None:
    with pytest.raises(SettingError, match="without max_drop"):
        sp.allocate(sp.factorize(nn.Linear(8, 8)), sp.Budget(max_drop=1.0), torch.zeros(1, 8))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    basis = torch.randn(4, 24)
    x = torch.randn(1024, 4) @ basis
    y = (x @ torch.randn(24, 3)).argmax(1)
    data = [(x[i : i + 128], y[i : i + 128]) for i in range(0, 1024, 128)]
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    sp.fit(model, data[:6], nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), 0.01), 20, progress=False)
    return model, data


def test_compress_keeps_the_promise_and_the_folder_has_what_was_tried(trained: tuple[nn.Module, Any], tmp_path: Path) -> None:
    model, data = trained
    settings: dict[str, Any] = {"eval_data": data[6:], "cut": "whitened", "folder": tmp_path / "out", "progress": False}
    made = sp.compress(model, data[:6], nn.CrossEntropyLoss(), {"macs": 0.8, "max_drop": 1.0}, **settings)
    dense, final = made.measured["dense"], made.measured["final"]
    assert dense.accuracy is not None
    assert final.accuracy is not None
    assert 100 * (dense.accuracy - final.accuracy) <= 1.0 + 1e-9
    assert dense.macs is not None
    assert final.macs is not None
    assert final.macs <= 0.8 * dense.macs
    allowed = [one["budget"]["macs"] for one in made.tried if one["kept"]]
    refused = [one["budget"]["macs"] for one in made.tried if not one["kept"]]
    assert min(allowed) > max(refused, default=0.0)
    assert made.settings["budget"] == f"Budget(macs={min(allowed)!r})"
    assert read_json(tmp_path / "out" / "result.json")["tried"] == made.tried
    again = sp.load(tmp_path / "out" / "final", model)
    torch.testing.assert_close(again(data[0][0]), made.model(data[0][0]))
    assert "tried macs=0.4: " in made.stages()


def test_a_validation_split_is_asked_for(trained: tuple[nn.Module, Any]) -> None:
    with pytest.raises(SettingError, match="eval_data must be a validation split"):
        sp.compress(trained[0], trained[1], nn.CrossEntropyLoss(), sp.Budget(max_drop=1.0), progress=False)
