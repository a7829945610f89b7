"""`Tuning`: one value that `fit`, `compress` and recipes train by."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jaxtyping
import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.pipeline.recipe import Phase
from spectrim.training.tuning import one_cycle


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def data(count: int = 3) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(count)]


@pytest.fixture
def as_users_call() -> Iterator[None]:
    """Types are checked while these tests run; users have no such checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


LOSS = nn.CrossEntropyLoss()


def alike(first: nn.Module, second: nn.Module) -> bool:
    return all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_it_makes_trains_like_what_is_made_by_hand(accumulate: int) -> None:
    """Three batches, in steps of two: the schedule advances twice in an epoch."""
    by_hand, made = net(), net()
    optimizer = torch.optim.SGD(by_hand.parameters(), 0.1)
    steps = 2 * (3 if accumulate == 1 else 2)
    live = sp.Tuning(scheduler=one_cycle(optimizer, steps), scheduler_steps="batch", accumulate=accumulate)
    sp.fit(by_hand, data(), LOSS, optimizer, 2, tuning=live, progress=False)
    tuning = sp.Tuning(partial(torch.optim.SGD, lr=0.1), one_cycle, "batch", accumulate=accumulate)
    history = sp.fit(made, data(), LOSS, epochs=2, tuning=tuning, progress=False)
    assert alike(by_hand, made)
    assert history.last["learning_rate"] < history.epochs[0]["learning_rate"]


def test_a_schedule_by_epochs_gets_their_number() -> None:
    asked: list[int] = []

    def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        asked.append(steps)
        return torch.optim.lr_scheduler.StepLR(optimizer, 1)

    sp.fit(net(), data(), LOSS, epochs=2, tuning=sp.Tuning(scheduler=schedule), progress=False)
    assert asked == [2]


def test_without_anything_it_is_adam_at_a_constant_rate() -> None:
    a, b = net(), net()
    history = sp.fit(a, data(), LOSS, epochs=2, progress=False)
    sp.fit(b, data(), LOSS, torch.optim.Adam(b.parameters(), 1e-3), 2, progress=False)
    assert alike(a, b)
    assert [line["learning_rate"] for line in history.epochs] == [1e-3, 1e-3]


def test_compress_trains_by_the_same_value() -> None:
    settings: dict[str, Any] = {"where": "*", "epochs": 2, "distill": None, "progress": False}
    quick = sp.compress(net(), data(), LOSS, 0.7, tuning=sp.Tuning(steps_per_epoch=2), **settings).history
    assert quick.last["learning_rate"] < 1e-4, "one cycle ends near zero, also where an epoch is two batches"
    flat = sp.Tuning(scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
    assert [line["learning_rate"] for line in sp.compress(net(), data(), LOSS, 0.7, tuning=flat, **settings).history.epochs] == [1e-3] * 2
    best = sp.compress(net(), data(), LOSS, 0.7, tuning=sp.Tuning(keep_best=True), eval_data=data(2), **settings)
    assert best.scores["final"]["loss"] == pytest.approx(min(line["eval_loss"] for line in best.history.epochs), rel=1e-4)  # merged


def test_a_phase_has_no_defaults_of_its_own() -> None:
    phase, default = Phase(), sp.Tuning()
    assert all(getattr(phase, name) == getattr(default, name) for name in ("scheduler_steps", "accumulate", "clip"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": torch.optim.Adam(net().parameters())}, "Tuning: optimizer must be a function that makes an optimizer"),
        ({"scheduler": torch.optim.lr_scheduler.StepLR}, r"Tuning: scheduler must be a function \(optimizer, steps\)"),
        ({"precision": "float16"}, "Tuning: precision must be 'no', 'bf16' or 'fp16', got 'float16'"),
        ({"execution": "fast"}, "Tuning: execution must be 'macs' or 'measured', got 'fast'"),
        ({"keep_best": "mine"}, "Tuning: keep_best must be True, a name"),
    ],
)
def test_fields_are_checked_at_birth(settings: dict[str, Any], message: str, as_users_call: None) -> None:
    with pytest.raises(SettingError, match=message):
        sp.Tuning(**settings)


def test_an_optimizer_is_given_once() -> None:
    model = net()
    with pytest.raises(SettingError, match="fit: optimizer must be None where tuning names one"):
        sp.fit(model, data(), LOSS, torch.optim.Adam(model.parameters()), tuning=sp.Tuning(torch.optim.Adam), progress=False)


def test_compress_needs_the_validation_split_for_the_best_epoch() -> None:
    with pytest.raises(SettingError, match="compress: keep_best must be given with eval_data"):
        sp.compress(net(), data(), LOSS, 0.7, epochs=1, tuning=sp.Tuning(keep_best=True), progress=False)
