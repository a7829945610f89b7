"""`Ramp` cuts to its target by law, and `fit` cuts while it trains."""

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import FormatError, RankError, SettingError
from spectrim.fit import History
from spectrim.layers import named_factors
from spectrim.measure import count_macs
from spectrim.protocols import RankSchedule

EVERYTHING = sp.match("*")


def low() -> nn.Module:
    torch.manual_seed(1)
    return sp.factorize(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)), where=EVERYTHING)


def batches(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 12, generator=generator), torch.randn(8, 4, generator=generator)) for _ in range(count)]


def ranks(model: nn.Module) -> dict[str, int]:
    return {name: factors.rank for name, factors in named_factors(model)}


@pytest.mark.parametrize(("begin", "end", "cuts", "steps"), [(0.0, 0.5, 8, 100), (0.25, 1.0, 3, 40), (0.0, 1.0, 1, 7), (0.0, 0.5, 9, 4)])
def test_the_ramp_falls_to_its_target(begin: float, end: float, cuts: int, steps: int) -> None:
    ramp = sp.Ramp(sp.Budget(macs=0.4, params=0.3), begin, end, cuts)
    found = [(step, budget) for step in range(steps) if isinstance(budget := ramp.at(step, steps), sp.Budget)]
    assert 1 <= len(found) <= cuts
    assert found[-1] == (min(round(steps * end), steps - 1), sp.Budget(macs=0.4, params=0.3))
    kept = [budget.macs for _, budget in found]
    assert kept == sorted(kept, reverse=True)
    assert all(step >= begin * steps for step, _ in found)


def test_the_ramp_by_hand() -> None:
    ramp = sp.Ramp(0.2, begin=0.0, end=1.0, cuts=2)
    assert [ramp.at(step, 10) for step in (0, 4, 5, 9)] == [None, None, pytest.approx(0.2 + 0.8 / 8), pytest.approx(0.2)]


def test_energies_multiply_to_the_target() -> None:
    class Spectrum(nn.Module):
        pass

    ramp, left = sp.Ramp(0.5, end=1.0, cuts=4), 1.0
    for step in range(20):
        rule = ramp(Spectrum(), None, step, 20)
        left *= rule.keep if isinstance(rule, sp.Energy) else 1.0
    assert left == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"target": 0.0}, "target"), ({"begin": 0.6}, "begin and end"), ({"end": 1.2}, "begin and end"), ({"cuts": 0}, "cuts")],
)
def test_settings_out_of_range(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError, match=f"Ramp: {field} must be"):
        sp.Ramp(**({"target": 0.5} | settings))


# ---- in place


def test_cutting_in_place_is_cutting_a_copy() -> None:
    models = [low(), low()]
    optimizers = [torch.optim.Adam(model.parameters(), 0.1) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        for inputs, target in batches(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs), target).backward()
            optimizer.step()
    copied = sp.prune(models[0], {"0": 3, "2": 2})
    sp.prune_optimizer_state(optimizers[0], models[0], copied)
    sp.prune_(models[1], {"0": 3, "2": 2}, optimizers[1])
    models[0] = copied
    assert ranks(models[1]) == {"0": 3, "2": 2, "4": 4}
    for model, optimizer in zip(models, optimizers, strict=True):
        for inputs, target in batches(2):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs), target).backward()
            optimizer.step()
    for (name, one), (_, two) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_bad_rank_changes_nothing() -> None:
    model = low()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RankError):
        sp.prune_(model, {"0": 2, "2": 99})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---- in fit


def test_fit_cuts_as_it_goes() -> None:
    model, (inputs, _) = low(), batches()[0]
    dense = count_macs(sp.merge(model), inputs[:1])
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    ramp = sp.Ramp(sp.Budget(macs=0.5), end=0.6, cuts=3)
    assert isinstance(ramp, RankSchedule)
    history = sp.fit(model, batches(), nn.MSELoss(), optimizer, 4, rank_schedule=ramp, progress=False)
    assert [cut["step"] for cut in history.cuts] == [4, 8, 12]
    assert history.cuts[-1]["ranks"] == ranks(model)
    means = [sum(cut["ranks"].values()) / 3 for cut in history.cuts]
    assert [line["mean_rank"] for line in history.epochs] == [means[0], means[1], means[2], means[2]]
    assert count_macs(sp.merge(model), inputs[:1]) <= 0.5 * dense
    assert {id(p) for p in model.parameters()} == {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]


def session(folder: Path, epochs: int, execution: Any = "macs", schedule: Any = None) -> tuple[nn.Module, History]:
    model = low()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    settings = {"rank_schedule": schedule or Until4(), "execution": execution, "checkpoint": folder, "progress": False}
    return model, sp.fit(model, batches(), nn.MSELoss(), optimizer, epochs, **settings)


class Until4:
    """Cuts at fixed steps, whatever the length of the training."""

    def __call__(self, model: nn.Module, inputs: Any, step: int, steps: int) -> Mapping[str, int] | None:
        return {3: {"2": 9}, 7: {"0": 4}, 13: {"2": 5, "4": 2}}.get(step)


@pytest.mark.parametrize("execution", ["macs", "measured"])
def test_a_resumed_run_cuts_at_the_same_steps_and_ends_with_the_same_bits(tmp_path: Path, execution: Any) -> None:
    whole, history = session(tmp_path / "whole", 4, execution)
    for epochs in (1, 2, 4):
        model, resumed = session(tmp_path / "parts", epochs, "macs")
    if execution == "macs":
        assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), model.state_dict().values(), strict=True))
    assert ranks(whole) == ranks(model) == {"0": 4, "2": 5, "4": 2}
    assert resumed.cuts == history.cuts
    assert len(resumed.epochs) == 4


def test_measured_choices_are_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def choose(model: nn.Module, inputs: Any) -> dict[str, bool]:
        for index, layer in enumerate(m for m in model if hasattr(m, "execution")):
            asked.append(index)
            layer.execution.setdefault(("weight", layer.rank, tuple(inputs.shape[1:])), len(asked) % 2 == 0)
        return {}

    monkeypatch.setattr(sys.modules["spectrim.fit"], "choose_execution", choose)  # the module: spectrim.fit is the function
    first, _ = session(tmp_path, 2, "measured")
    state = [dict(layer.execution) for layer in first if hasattr(layer, "execution")]
    again, _ = session(tmp_path, 2, "measured")
    assert [layer.execution for layer in again if hasattr(layer, "execution")] == state
    assert any(state)


def test_without_a_schedule_a_cut_checkpoint_is_refused(tmp_path: Path) -> None:
    session(tmp_path, 2)
    model = low()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FormatError, match="is the checkpoint of another model"):
        sp.fit(model, batches(), nn.MSELoss(), torch.optim.Adam(model.parameters()), 2, checkpoint=tmp_path, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_damaged_cut_checkpoint_changes_nothing(tmp_path: Path) -> None:
    session(tmp_path, 2)
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["optimizer"]["state"][0]["exp_avg"] = "no tensor"
    state["random"] = {}
    torch.save(state, path)
    model = low()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    before, held = copy.deepcopy(model.state_dict()), list(model.parameters())
    with pytest.raises(FormatError):
        sp.fit(model, batches(), nn.MSELoss(), optimizer, 4, rank_schedule=Until4(), checkpoint=tmp_path, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [id(p) for p in model.parameters()] == [id(p) for p in held] == [id(p) for p in optimizer.param_groups[0]["params"]]
