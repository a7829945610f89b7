"""`Ramp` cuts to its target by law, `Squeeze` drives there what it will cut, and `fit` cuts while it trains."""

import copy
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import FormatError, RankError, SettingError
from spectrim.layers import named_factors
from spectrim.metrics.macs import count_macs
from spectrim.penalties import tail_shares
from spectrim.protocols import Change, Course, RankSchedule
from spectrim.training.history import History
from spectrim.training.squeeze import Squeeze, SteeredTail

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
    sp.surgery.prune_optimizer_state(optimizers[0], models[0], copied)
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
    history = sp.fit(model, batches(), nn.MSELoss(), optimizer, 4, courses=[ramp], progress=False)
    assert [cut["step"] for cut in history.cuts] == [4, 8]  # the third one, at step 12, is smaller than a rank
    assert history.cuts[-1]["ranks"] == ranks(model)
    means = [sum(cut["ranks"].values()) / 3 for cut in history.cuts]
    assert [line["mean_rank"] for line in history.epochs] == [means[0], means[1], means[1], means[1]]
    assert count_macs(sp.merge(model), inputs[:1]) <= 0.5 * dense
    assert {id(p) for p in model.parameters()} == {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]


def session(folder: Path, epochs: int, execution: Any = "macs", schedule: Any = None) -> tuple[nn.Module, History]:
    model = low()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    settings = {"courses": [schedule or Until4()], "tuning": sp.Tuning(execution=execution), "checkpoint": folder, "progress": False}
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

    monkeypatch.setattr(sys.modules["spectrim.training.loop"], "choose_execution", choose)
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
        sp.fit(model, batches(), nn.MSELoss(), optimizer, 4, courses=[Until4()], checkpoint=tmp_path, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [id(p) for p in model.parameters()] == [id(p) for p in held] == [id(p) for p in optimizer.param_groups[0]["params"]]


# ---- Squeeze


def squeezed(schedule: Squeeze, make: Any, epochs: int = 40, **settings: Any) -> tuple[nn.Module, History]:
    """Train on one linear teacher until the schedule's end."""
    model, data = low(), batches(5)
    teacher = nn.Linear(12, 4)
    data = [(inputs, teacher(inputs).detach()) for inputs, _ in data]
    courses = [] if schedule is None else [schedule]
    history = sp.fit(
        model, data, nn.MSELoss(), make(model.parameters()), epochs, courses=courses, progress=False, **settings
    )  # fmt: skip
    return model, history


def test_squeeze_updates_evenly_and_cuts_at_the_end() -> None:
    squeeze, model, (inputs, _) = Squeeze(sp.Budget(macs=0.5), begin=0.1, end=0.6, updates=5), low(), batches()[0]
    assert isinstance(squeeze, RankSchedule)
    assert isinstance(squeeze, Course)
    assert isinstance(sp.Ramp(0.5), Course)
    found = {step: ranks for step in range(100) if (ranks := squeeze(model, inputs, step, 100)) is not None}
    assert found == {60: sp.allocate(model, sp.Budget(macs=0.5), inputs)}
    penalized = [step for step in range(100) if squeeze.penalty(model, inputs, step, 100, None) is not None]
    assert penalized == list(range(10, 60))
    held = Squeeze(sp.Budget(macs=0.5), begin=0.1, end=0.6, updates=5, cut=False)
    assert all(held(model, inputs, step, 100) is None for step in range(100))
    assert held.penalty(model, inputs, 99, 100, None) is not None


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_squeeze_cuts_however_short_training_is(steps: int) -> None:
    model, (inputs, _) = low(), batches()[0]
    squeeze = Squeeze(sp.Budget(macs=0.5), end=1.0)
    assert squeeze(model, inputs, steps - 1, steps) == sp.allocate(model, sp.Budget(macs=0.5), inputs)
    state: dict[str, Any] | None = None
    for step in range(steps - 1):
        penalty = squeeze.penalty(model, inputs, step, steps, state)
        assert penalty is not None
        state = asdict(penalty)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"begin": 0.6}, "begin and end"),
        ({"end": 1.2}, "begin and end"),
        ({"updates": 0}, "updates"),
        ({"left": 0.0}, "left"),
        ({"left": 1.0}, "left"),
    ],
)
def test_squeeze_settings_out_of_range(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError, match=f"Squeeze: {field} must be"):
        Squeeze(**({"budget": sp.Budget(macs=0.5)} | settings))


def test_making_factors_exact_in_place_keeps_the_function_and_the_moments() -> None:
    model = low()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for inputs, target in batches(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), target).backward()
        optimizer.step()
    before, outputs = ranks(model), model(inputs)
    assert max(sp.linalg.orthogonality_defect(factors.U) for _, factors in named_factors(model)) > 0.01
    sp.prune_(model, {}, optimizer)
    assert ranks(model) == before
    torch.testing.assert_close(model(inputs), outputs)
    for _, factors in named_factors(model):
        assert sp.linalg.orthogonality_defect(factors.U) < 1e-6
        assert torch.equal(factors.S, factors.S.sort(descending=True).values)
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())


def test_the_goal_falls_by_the_same_factor_at_every_step() -> None:
    model, (inputs, _) = low(), batches()[0]
    squeeze = Squeeze(sp.Budget(macs=0.5), begin=0.2, end=0.7, updates=7, left=1e-3)
    state: dict[str, Any] | None = None
    for step in range(20, 70):
        penalty = squeeze.penalty(model, inputs, step, 100, state)
        assert isinstance(penalty, SteeredTail)
        state = asdict(penalty)
        for name, share in tail_shares(model, penalty.ranks).items():  # nothing moves: these are the shares at the start
            assert penalty.goals[name] == pytest.approx(share ** (1 - (step - 20) / 50) * 1e-3 ** ((step - 20) / 50), rel=1e-9)
            assert penalty.lags[name] == pytest.approx(math.log(share / penalty.goals[name]), abs=1e-9)
    state = json.loads(json.dumps(state))
    assert squeeze.penalty(model, inputs, 70, 100, state) is None
    assert squeeze.penalty(model, inputs, 69, 100, state) == squeeze.penalty(model, inputs, 69, 100, state)


def test_a_strength_by_hand() -> None:
    """Span 50, goal 0.1 with one more step after this one, so 0.1 -> 0.1 (0.001 / 0.1)^(1/2) = 0.01; the share is a tenth of all."""
    model = sp.factorize(nn.Sequential(nn.Linear(2, 2)), where=EVERYTHING)
    with torch.no_grad():
        model[0].S.copy_(torch.tensor([3.0, 1.0]))
    before = SteeredTail({"0": 1}, {"0": 0.5}, {"0": 0.1}, {"0": 2.25})
    penalty = Squeeze(sp.Budget(macs=1.0), end=0.5, updates=1, left=1e-3).penalty(model, torch.zeros(1, 2), 49, 100, asdict(before))
    assert penalty is not None
    lag = math.log(0.1 / 0.01)
    assert penalty.goals == {"0": pytest.approx(0.01)}
    assert penalty.lags == {"0": pytest.approx(lag, rel=1e-6)}
    assert penalty.strengths == {"0": pytest.approx(0.5 * math.exp(15 / 50 * lag + 1.5 * (lag - 2.25)), rel=1e-6)}
    assert float(penalty(model).detach()) == pytest.approx(penalty.strengths["0"] * (0.1 - 0.01))


def test_a_weight_whose_rank_changes_sets_out_from_where_it_is() -> None:
    model, (inputs, _) = low(), batches()[0]
    squeeze = Squeeze(sp.Budget(macs=0.5), end=1.0, updates=10)
    allocated = sp.allocate(model, sp.Budget(macs=0.5), inputs)
    (same, moved, *others) = [name for name, _ in named_factors(model) if allocated[name] < ranks(model)[name]]
    held = {name: allocated[name] for name in (same, moved)} | {moved: allocated[moved] - 1}
    before = SteeredTail(held, {same: 0.2, moved: 5.0}, {same: 0.3, moved: 0.4}, {same: 0.0, moved: 0.0})
    penalty = squeeze.penalty(model, inputs, 10, 100, asdict(before))
    assert penalty is not None
    shares = tail_shares(model, penalty.ranks)
    assert penalty.goals[moved] == shares[moved]
    assert penalty.lags[moved] == 0
    assert penalty.goals[same] == pytest.approx(0.3 * (1e-4 / 0.3) ** (1 / 90))
    for name in others:  # new: at the usual strength
        assert penalty.strengths[name] == pytest.approx(math.sqrt(penalty.strengths[same] * penalty.strengths[moved]))


MAKERS = {
    "sgd 0.02": lambda parameters: torch.optim.SGD(parameters, 0.02, momentum=0.9),
    "sgd 0.2": lambda parameters: torch.optim.SGD(parameters, 0.2),
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-2),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_the_tail_reaches_its_goal_whatever_the_optimizer(maker: str) -> None:
    """No strength is chosen; the task pulls the other way, and steps are of very different sizes."""
    squeeze = Squeeze(sp.Budget(macs=0.5), end=0.9, updates=15, left=1e-3, cut=False)
    model, history = squeezed(squeeze, MAKERS[maker], penalties=[sp.Orthogonality(0.1)])
    shares = tail_shares(model, sp.allocate(model, sp.Budget(macs=0.5), batches()[0][0]))
    free, _ = squeezed(squeeze, MAKERS[maker], epochs=0)
    assert max(tail_shares(free, sp.allocate(free, sp.Budget(macs=0.5), batches()[0][0])).values()) > 0.05
    assert shares
    assert max(shares.values()) < 3e-3  # three times what was asked: noise of the last steps
    assert history.cuts == []


def test_cutting_a_squeezed_network_changes_almost_nothing() -> None:
    """By the output, right before and after the cut, beside the same cut without a penalty."""
    errors = {}
    for name, schedule in {"squeezed": Squeeze(sp.Budget(macs=0.5), end=0.8, updates=15, cut=False), "plain": None}.items():
        model, _ = squeezed(schedule, MAKERS["sgd 0.2"], penalties=[sp.Orthogonality(1.0)])  # type: ignore[arg-type]
        (inputs, _) = batches()[0]
        cut = sp.prune(model, sp.allocate(model, sp.Budget(macs=0.5), inputs))
        errors[name] = float((cut(inputs) - model(inputs)).detach().square().sum() / model(inputs).detach().square().sum())
    assert errors["squeezed"] < 1e-3
    assert errors["squeezed"] < 0.01 * errors["plain"]


def test_fit_adds_the_penalty_of_a_schedule_in_plain_sight() -> None:
    squeeze = Squeeze(sp.Budget(macs=0.5), end=0.5)
    model, history = squeezed(squeeze, MAKERS["adam"], epochs=4, penalties=[sp.Hoyer(0.01)])
    assert [cut["step"] for cut in history.cuts] == [10]  # making factors exact is no cut
    assert history.cuts[0]["ranks"] == ranks(model)
    assert list(history.epochs[0])[:3] == ["loss", "Hoyer", "Squeeze"]
    added = [line["Squeeze"] for line in history.epochs]
    assert added[0] > 0
    assert added[2:] == [0.0, 0.0]
    assert history.epochs[2]["mean_rank"] < history.epochs[1]["mean_rank"]


def test_a_course_is_asked_once_for_each_optimizer_step() -> None:
    asked: list[tuple[Any, ...]] = []

    class Watch:
        def start(self, model: nn.Module, inputs: Any, steps: int) -> dict[str, Any]:
            asked.append(("start", steps))
            return {}

        def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any]) -> Change | None:
            asked.append(("before", step, steps))
            return Change({"0": 5}) if step == 2 else None

        def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any]) -> None:
            assert not torch.is_grad_enabled()
            asked.append(("after", step, steps))

    model = low()
    sp.fit(
        model,
        batches(5),
        nn.MSELoss(),
        torch.optim.SGD(model.parameters(), 0.1),
        2,
        tuning=sp.Tuning(accumulate=2),
        courses=[Watch()],
        progress=False,
    )
    assert asked == [("start", 6), *((what, step, 6) for step in range(6) for what in ("before", "after"))]
    assert ranks(model)["0"] == 5


def test_accumulated_batches_are_one_larger_batch_for_a_schedule() -> None:
    """The penalty counts once for a step, and no gradient is lost to a cut within a group."""
    small = batches(5)
    large = [tuple(torch.cat(parts) for parts in zip(*small[i : i + 2], strict=True)) for i in (0, 2, 4)]
    found = []
    for data, accumulate in ((small, 2), (large, 1)):
        model = low().double()
        data = [(inputs.double(), target.double()) for inputs, target in data]
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        squeeze = Squeeze(sp.Budget(macs=0.5), updates=3)
        history = sp.fit(
            model, data, nn.MSELoss(), optimizer, 4, tuning=sp.Tuning(accumulate=accumulate), courses=[squeeze], progress=False
        )
        found.append((model.state_dict(), history.cuts))
    assert found[0][1] == found[1][1]
    for key, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][key], rtol=1e-9, atol=1e-9)


class StoppedError(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("cut", [True, False], ids=["cut", "held"])
def test_a_squeezed_run_is_resumed_with_the_same_bits(tmp_path: Path, accumulate: int, cut: bool) -> None:
    def train(folder: Path | None, until: int = 9) -> tuple[nn.Module, History]:
        def stop(epoch: int, line: dict[str, float], model: nn.Module) -> None:
            if epoch == until:
                raise StoppedError

        model = low()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        squeeze = Squeeze(sp.Budget(macs=0.5), updates=4, cut=cut)
        settings: dict[str, Any] = {
            "courses": [squeeze],
            "tuning": sp.Tuning(accumulate=accumulate),
            "checkpoint": folder,
            "callbacks": [stop],
        }
        return model, sp.fit(model, batches(), nn.MSELoss(), optimizer, 6, progress=False, **settings)

    whole, history = train(None)
    for until in (2, 3, 5):  # the epoch in which it stops is lost; the cut is in the fourth
        with pytest.raises(StoppedError):
            train(tmp_path, until)
    model, resumed = train(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), model.state_dict().values(), strict=True))
    assert resumed.cuts == history.cuts
    assert [line["Squeeze"] for line in resumed.epochs] == [line["Squeeze"] for line in history.epochs]
    plain = low()
    with pytest.raises(FormatError, match=r"another (optimizer or schedule|model)"):
        sp.fit(plain, batches(), nn.MSELoss(), torch.optim.Adam(plain.parameters()), 6, checkpoint=tmp_path, progress=False)
