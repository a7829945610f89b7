"""Training in few bits: the cost that was asked for, bits that differ over layers and time, and no trace in the network."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.layers.rounded import computed
from spectrim.training import CyclicPrecision, LearnedPrecision, StaticPrecision, bits_of, float_in_int8, rounding
from spectrim.training.bits import bit_operations, counted, shifted_to

EVERYTHING = sp.match("*")


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 24), nn.ReLU(), nn.Linear(24, 4))


def task(count: int = 12, seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Images with one bright quadrant, in noise."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        y = torch.randint(4, (16,), generator=generator)
        x = 0.7 * torch.randn(16, 1, 8, 8, generator=generator)
        for image, label in zip(x, y.tolist(), strict=True):
            image[0, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 1
        made.append((x, y))
    return made


def train(model: nn.Module, courses: list[Any], epochs: int = 10, **settings: Any) -> Any:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    return sp.fit(model, task(), nn.CrossEntropyLoss(), optimizer, epochs, courses=courses, progress=False, **settings)


def columns(history: Any, name: str) -> list[float]:
    return [value for line in history.epochs for key, value in line.items() if key.endswith(f"Precision {name}")]


@pytest.mark.parametrize(("cost", "rise"), [(0.35, 0.0), (0.6, 0.5), (0.9, 0.5)])
def test_the_cost_is_met_from_below(cost: float, rise: float) -> None:
    history = train(net(), [LearnedPrecision(cost, rise=rise)])
    assert 0.95 * cost <= columns(history, "cost")[-1] <= cost


def test_bits_differ_over_layers_and_time_and_the_network_learns() -> None:
    model = net()
    history = train(model, [LearnedPrecision(0.6)], epochs=12)
    bits = [bits_of(line) for line in history.epochs]
    assert all(set(each) == {"0", "4", "6"} for each in bits)
    assert any(len(set(each.values())) > 1 for each in bits)
    assert len({tuple(each.values()) for each in bits}) > 1
    assert all(3 <= b <= 8 for each in bits for b in each.values())
    with rounding(model, bits[-1]):
        assert sp.evaluate(model, task(seed=3), nn.CrossEntropyLoss())["accuracy"] > 0.8


def test_bits_settle_for_the_last_steps_and_the_cost_is_met() -> None:
    history = train(net(), [LearnedPrecision(0.6, settle=0.5)], epochs=10)
    bits = [bits_of(line) for line in history.epochs]
    assert bits[5:] == [bits[5]] * 5
    assert 0.57 <= columns(history, "cost")[-1] <= 0.6
    whole = LearnedPrecision()._whole(np.array([3.2, 5.9, 8.0]), np.ones(3), float(bit_operations(1.0, np.array([3, 6, 8]), 8).sum()))
    assert whole.tolist() == [3, 6, 8]


def test_the_costs_in_the_log_by_hand() -> None:
    macs = 6 * 9 * 36 + 54 * 24 + 24 * 4
    last = train(net(), [StaticPrecision(6)], epochs=1).last
    assert last["StaticPrecision BOPs"] == pytest.approx(macs * (36 + 2 * 6 * 8))
    assert last["StaticPrecision cost"] == pytest.approx((36 + 96) / 192)
    assert last["StaticPrecision ratio"] == pytest.approx((6 * 6 + 2 * 6 * 8) / 3 / 1024)
    assert train(net(), [StaticPrecision(8)], epochs=1).last["StaticPrecision cost"] == pytest.approx(1)


def test_cycles_by_hand() -> None:
    course = CyclicPrecision(3, 8, cycles=2)
    assert [course.at(step, 20) for step in range(11)] == [3, 3, 3, 4, 5, 6, 6, 7, 8, 8, 3]
    course = CyclicPrecision(cycles=12)
    cost = columns(train(net(), [course], epochs=4), "cost")[-1]
    assert cost == pytest.approx(sum(b * b + 16 * b for b in (course.at(step, 48) for step in range(48))) / 48 / 192)


def test_32_bits_train_to_the_bits_of_float() -> None:
    plain, rounded = net(), net()
    train(plain, [], epochs=2)
    train(rounded, [StaticPrecision(32, gradient_bits=32)], epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), rounded.state_dict().values(), strict=True))


def test_the_plan_has_the_mean_that_was_asked_for() -> None:
    for settings in (
        {"cost": 0.6},
        {"cost": 0.9, "rise": 1.0},
        {"cost": 1.0},
        {"cost": 0.4, "rise": 0.0},
        {"cost": 0.5, "most": 5, "rise": 1.0},
    ):
        course = LearnedPrecision(**settings)
        plan = [course.planned(step, 1000) for step in range(1000)]
        assert sum(plan) / 1000 == pytest.approx(0.99 * course.cost, rel=1e-5)
        assert plan == sorted(plan)
        assert max(plan) <= (course.most**2 + 16 * course.most) / 192 + 1e-9


def test_bits_go_where_they_gain_most_for_an_operation() -> None:
    """Quadratic losses of layers ``h 4^-b`` at ``macs (b b + 2 b g)`` end where the derivatives have one ratio."""
    course = LearnedPrecision(0.6, rise=0.0, rate=0.2)
    macs, harm = {"a": 100.0, "b": 10.0, "c": 40.0}, {"a": 1.0, "b": 0.3, "c": 30.0}
    reference = float(bit_operations(150.0, 8, 8))
    memory: dict[str, Any] = {
        "macs": macs,
        "reference": reference,
        "bit_operations": 0.0,
        "done": 0,
        "planned": 0.0,
        "slopes": {},
        "learned": 0,
    }
    memory["values"] = dict.fromkeys(macs, 5.0)
    for step in range(700):
        values = memory["values"]
        memory["bit_operations"] += sum(bit_operations(macs[n], b, 8) for n, b in values.items())
        course._learn({n: -2 * math.log(2) * harm[n] * 4 ** -values[n] for n in values}, step, 700, memory)
    free = {n: b for n, b in memory["values"].items() if 3.001 < b < 7.999}
    gains = [harm[n] * 4**-b / (macs[n] * (b + 8)) for n, b in free.items()]
    assert len(free) >= 2
    assert max(gains) == pytest.approx(min(gains), rel=1e-2)
    assert sum(bit_operations(macs[n], b, 8) for n, b in memory["values"].items()) == pytest.approx(0.99 * 0.6 * reference, rel=1e-3)


def test_bits_that_cost_so_much() -> None:
    macs = np.array([3.0, 1.0, 5.0])
    values = np.array([4.0, 7.9, 3.0])
    for share in (0.1, 0.35, 0.6, 0.95, 2.0):
        goal = share * float(bit_operations(macs, 8, 8).sum())
        found = shifted_to(values, goal, macs, (3, 8), 8)
        assert found.min() >= 3
        assert found.max() <= 8
        cost = float(bit_operations(macs, found, 8).sum())
        ends = [float(bit_operations(macs, bits, 8).sum()) for bits in (3, 8)]
        assert cost == pytest.approx(min(max(goal, ends[0]), ends[1]))
        free = (found > 3) & (found < 8)
        assert len(set((found - values)[free].round(6))) <= 1


def test_ranks_and_bits_share_one_budget() -> None:
    """Factors have bits of their own; a cut makes room for bits, and the cost still counts from the ranks at the begin."""
    low = sp.factorize(net(), where=EVERYTHING)
    cut = sp.Ramp(sp.Budget(macs=0.4), end=0.3, cuts=1)
    history = train(low, [cut, LearnedPrecision(0.6, rise=0.0)], epochs=12)
    assert set(bits_of(history.last)) == {f"{layer}.{part}" for layer in "046" for part in ("Vh", "U")}
    assert history.cuts
    assert 0.57 <= columns(history, "cost")[-1] <= 0.6  # with more than 8 bits in the end: the rank costs less than that
    assert 8 < max(bits_of(history.last).values()) <= 16
    means = [np.mean(list(bits_of(history.epochs[epoch]).values())) for epoch in (2, -1)]
    assert means[1] > means[0] + 0.5
    assert columns(history, "BOPs")[-1] == pytest.approx(
        columns(history, "cost")[-1] * 192 * sum(macs_of(sp.factorize(net(), where=EVERYTHING)))
    )


def test_bits_rise_no_further_than_a_cut_makes_room_for() -> None:
    course, reference = LearnedPrecision(0.6), float(bit_operations(100.0, 8, 8))
    assert course._most(100.0, 2 * reference, reference) == 8  # nothing has been cut
    assert course._most(40.0, 0.3 * reference, reference) == 8
    assert course._most(40.0, 0.6 * reference, reference) == 11  # 40 (11 11 + 2 11 8) = 0.62 of 100 (8 8 + 2 8 8); 10 bits cost 0.54
    assert course._most(1.0, 0.6 * reference, reference) == 16
    assert LearnedPrecision(0.6, most_after_cuts=8)._most(1.0, 0.6 * reference, reference) == 8


def macs_of(model: nn.Module) -> list[float]:
    return list(counted("test", model, task(1)[0][0])["macs"].values())


class StoppedError(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("factors", [False, True])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, factors: bool) -> None:
    def run(folder: Path | None, until: int = 9) -> tuple[nn.Module, Any]:
        def stop(epoch: int, line: dict[str, float], model: nn.Module) -> None:
            if epoch == until:
                raise StoppedError

        torch.manual_seed(7)
        model = sp.factorize(net(), where=EVERYTHING) if factors else net()
        courses = [LearnedPrecision(0.6), *([sp.Ramp(sp.Budget(macs=0.5), cuts=2)] if factors else [])]
        return model, train(model, courses, 5, checkpoint=folder, callbacks=[stop])

    whole, history = run(None)
    for until in (1, 3):
        with pytest.raises(StoppedError):
            run(tmp_path, until)
    model, resumed = run(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), model.state_dict().values(), strict=True))
    strip = [{key: value for key, value in line.items() if "seconds" not in key and "per_s" not in key} for line in resumed.epochs]
    assert strip == [{key: value for key, value in line.items() if "seconds" not in key and "per_s" not in key} for line in history.epochs]


def test_an_error_within_a_step_leaves_the_network_in_float() -> None:
    model = net()
    kinds = [type(module) for module in model]

    def broken(output: Tensor, target: Tensor) -> Tensor:
        assert [type(module) for module in model] != kinds
        raise StoppedError

    with pytest.raises(StoppedError):
        sp.fit(model, task(), broken, torch.optim.SGD(model.parameters(), 0.1), 1, courses=[StaticPrecision()], progress=False)
    assert [type(module) for module in model] == kinds
    assert not any("_arithmetic" in vars(module) for module in model.modules())


def test_gradients_of_several_batches_are_one_step() -> None:
    history = train(net(), [LearnedPrecision(0.6)], tuning=sp.Tuning(accumulate=3))
    assert 0.57 <= columns(history, "cost")[-1] <= 0.6


def test_what_stays_in_float_is_named_and_nothing_at_all_is_refused() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.lstm, self.head = nn.Embedding(10, 4), nn.LSTM(4, 4), nn.Linear(4, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.lstm(self.table(tokens))[0])

    with pytest.warns(UserWarning, match=r"StaticPrecision: these layers compute in float, and no cost counts them: lstm$"):
        memory = StaticPrecision().start(Text(), torch.zeros(3, 2, dtype=torch.long), 10)
    assert list(memory["macs"]) == ["head"]
    with pytest.raises(SettingError, match="LearnedPrecision: model must be a network with linear layers or convolutions"):
        LearnedPrecision().start(nn.Sequential(nn.ReLU()), torch.zeros(1, 2), 10)


def test_counting_leaves_the_network_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = counted("test", model, torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    assert found["macs"] == {"0": 16.0, "3": 8.0}
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StaticPrecision(1), r"StaticPrecision: bits must be an integer in \[2, 16\], or 32"),
        (lambda: CyclicPrecision(cycles=0), "CyclicPrecision: cycles must be"),
        (lambda: CyclicPrecision(6, 5), "CyclicPrecision: least and most must be"),
        (lambda: LearnedPrecision(0.2), r"LearnedPrecision: cost must be a share of static 8 bits in \[0.297, 1.000\]"),
        (lambda: LearnedPrecision(settle=1.0), r"LearnedPrecision: settle must be in \[0, 1\)"),
        (lambda: LearnedPrecision(rate=0.0), "LearnedPrecision: rate and rise must be"),
        (lambda: LearnedPrecision(most_after_cuts=7), r"LearnedPrecision: most_after_cuts must be an integer in \[8, 16\]"),
        (lambda: LearnedPrecision(most=17), "LearnedPrecision: least and most must be 2 <= least <= most <= 16"),
    ],
)
def test_settings_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make()


def test_bits_of_no_operation_are_refused() -> None:
    model = net()
    with pytest.raises(SettingError, match="rounding: bits must be by operation of the model: 0, 4, 6"), rounding(model, {"1": 3}):
        pass
    assert list(computed(model)) == ["0", "4", "6"]


def test_what_learned_eight_bits_at_most_becomes_int8(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = net()
    with warnings.catch_warnings():
        history = train(model, [LearnedPrecision(0.9, most=10)], epochs=4)
    bits = bits_of(history.last) | {"6": 9}
    keep = float_in_int8(model, bits)
    assert keep is not None
    assert [keep(name, module) for name, module in model.named_modules()][-1]
    assert float_in_int8(model, dict.fromkeys(bits, 8)) is None
    made = sp.quantize(model.eval(), task(), tmp_path / "net.onnx", keep=keep)
    assert made.layers["6"] != "int8"
    assert made.layers["4"] == "int8"
