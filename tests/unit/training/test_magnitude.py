"""Pruned weights stay exactly zero through training, and so do their moments; ramps by hand."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.integrations.steps import Steps
from spectrim.projections import Levels, Structured, Tiles, TopK
from spectrim.training.magnitude import Gradual, Hold, OneShot


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


def batches(count: int = 10) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 12, generator=generator), torch.randn(8, 4, generator=generator)) for _ in range(count)]


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, 0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("course", [OneShot({"*": TopK(9)}), Gradual({"*": TopK(9)}, end=0.1, cuts=2)], ids=["one-shot", "gradual"])
def test_pruned_weights_stay_zero_through_a_hundred_steps(kind: str, course: Any) -> None:
    """With moments of a dense training: these would move pruned weights, and later bring them back."""
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    sp.fit(model, batches(), nn.MSELoss(), optimizer, 1, progress=False)
    sp.fit(model, batches(), nn.MSELoss(), optimizer, 1, courses=[course], progress=False)
    holes = {name: p == 0 for name, p in model.named_parameters() if p.dim() > 1}
    dense_bias = model[0].bias.clone()
    sp.fit(model, batches(), nn.MSELoss(), optimizer, 10, courses=[Hold()], tuning=sp.Tuning(clip=0.1), progress=False)
    for name, p in model.named_parameters():
        if name in holes:
            assert int(p.count_nonzero()) == 9
            assert torch.equal(p == 0, holes[name])
            moments = [value for value in optimizer.state[p].values() if value.shape == p.shape]
            assert moments
            assert all(not value[holes[name]].any() for value in moments)
    assert not torch.equal(model[0].bias, dense_bias)
    assert not any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module in model.modules())


def test_the_clipped_norm_is_that_of_the_free_entries() -> None:
    """Gradients are masked before they are clipped: with one free weight each step is exactly as long as the clip."""
    model = nn.Linear(6, 1, bias=False)
    model.weight.data = TopK(1)(model.weight.data)
    before = model.weight.clone()
    batch = (torch.randn(8, 6), 100 + torch.randn(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    sp.fit(model, [batch], nn.MSELoss(), optimizer, 1, courses=[Hold()], tuning=sp.Tuning(clip=0.25), progress=False)
    assert float((model.weight - before).detach().abs().sum()) == pytest.approx(0.25, rel=1e-5)


def test_without_a_course_nothing_is_held() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    sp.fit(model, batches(), nn.MSELoss(), optimizer, 1, courses=[OneShot({"*": TopK(9)})], progress=False)
    sp.fit(model, batches(), nn.MSELoss(), optimizer, 1, progress=False)
    assert int(model[0].weight.count_nonzero()) == model[0].weight.numel()


def test_the_ramp_by_hand() -> None:
    course = Gradual({"0": TopK(12), "2": Structured(2, along="columns")}, begin=0.2, end=0.6, cuts=4)
    kept, model = [], network()

    def note(epoch: int, line: dict[str, float], model: nn.Module) -> None:
        kept.append((int(model[0].weight.count_nonzero()), int(model[2].weight.any(0).sum()), line.get("Gradual kept")))

    sp.fit(
        model, batches(1), nn.MSELoss(), torch.optim.Adam(model.parameters(), 0.01), 10, courses=[course], callbacks=[note], progress=False
    )
    assert [entry[:2] for entry in kept] == [(192, 16), (192, 16), (88, 8), (34, 4), (15, 2), (12, 2), (12, 2), (12, 2), (12, 2), (12, 2)]
    assert kept[1][2] is None
    assert kept[-1][2] == (12 + 2 * 4) / (192 + 64)


def test_tiles_and_fractions_ramp_too() -> None:
    weight = torch.zeros(16, 12)
    course = Gradual({"*": TopK(0.1)}, cuts=2)
    assert course.at(TopK(0.1), weight, 1) == TopK(19 + round(173 / 8))
    assert course.at(Tiles(4, 4, keep=0.25), weight, 1) == Tiles(4, 4, keep=1)
    assert course.at(Structured(0.5), weight, 1) == Structured(9)
    assert course.at(Structured(0.5), weight, 2) == Structured(0.5)


def test_one_shot_at_a_later_moment_and_to_levels() -> None:
    model = network()
    seen = []
    course = OneShot({"0": TopK(10), "2": Levels(2)}, at=0.5)
    note = lambda epoch, line, model: seen.append((int(model[0].weight.count_nonzero()), len(model[2].weight.unique())))  # noqa: E731
    sp.fit(model, batches(3), nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.1), 4, courses=[course], callbacks=[note], progress=False)
    assert seen == [(192, 64), (10, 3), (10, 3), (10, 3)]


@pytest.mark.parametrize(
    "course", [OneShot({"*": TopK(9)}, at=0.3), Gradual({"*": TopK(9)}, end=0.6, cuts=5), Hold()], ids=lambda c: type(c).__name__
)
def test_a_resumed_run_ends_with_the_same_bits(course: Any, tmp_path: Path) -> None:
    def train(folder: Path | None, until: int = 99) -> nn.Module:
        def stop(epoch: int, line: dict[str, float], model: nn.Module) -> None:
            if epoch == until:
                raise InterruptedError

        model = network()
        model[0].weight.data[:3] = 0
        parts: dict[str, Any] = {"checkpoint": folder, "callbacks": [stop], "courses": [course], "progress": False}
        sp.fit(model, batches(4), nn.MSELoss(), torch.optim.Adam(model.parameters(), 0.01), 6, **parts)
        return model

    whole = train(None)
    for until in (1, 4):
        with pytest.raises(InterruptedError):
            train(tmp_path, until)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), train(tmp_path).parameters(), strict=True))


def test_other_loops_hold_weights_and_moments_too() -> None:
    """The loop of Lightning and of the ``Trainer``: `advance`, the optimizer's step, `finish`."""
    model, steps = network(), Steps("mine", [], courses=[OneShot({"*": TopK(9)}, at=0.2)])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    steps.begin(model, 1, 0)
    for step, (x, y) in enumerate(batches()):
        steps.advance(model, x, optimizer, step, 10)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        steps.finish(model)
    for p in (model[0].weight, model[2].weight):
        assert int(p.count_nonzero()) == 9
        assert int(optimizer.state[p]["exp_avg"].count_nonzero()) <= 9


def test_hold_takes_only_weights_with_zeros_and_copies_nothing_else() -> None:
    model = network()
    model[2].weight.data[0] = 0
    memory = Hold(["0", "2"]).start(model, None, 5)
    assert list(memory["free"]) == ["2.weight"]
    assert copy.deepcopy(memory)["free"]["2.weight"].sum() == 48


def test_wrong_settings_are_refused() -> None:
    for made in (lambda: Gradual({"*": Levels(3)}), lambda: Gradual({"*": TopK(1)}, cuts=0), lambda: Gradual({"*": TopK(1)}, begin=0.6)):
        with pytest.raises(SettingError, match=r"^Gradual: "):
            made()
    with pytest.raises(SettingError, match=r"^OneShot: at"):
        OneShot({"*": TopK(1)}, at=1.5)
    with pytest.raises(SettingError, match=r"^Hold: where"):
        Hold([])
    with pytest.raises(SettingError, match=r"^Hold: patterns must be .* got 'fc9'"):
        Hold("fc9").start(network(), None, 3)
