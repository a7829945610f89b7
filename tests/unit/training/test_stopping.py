"""Ending early, keeping the best epoch, plateau schedules, and SIGTERM."""

import copy
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.training.history import History
from spectrim.training.signals import ending_cleanly


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def batches(seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(3)]


def tuned(settings: dict[str, Any]) -> dict[str, Any]:
    """Put the settings of a `Tuning` into one."""
    names = {entry.name for entry in fields(sp.Tuning)} & settings.keys()
    return {name: value for name, value in settings.items() if name not in names} | {"tuning": sp.Tuning(**{n: settings[n] for n in names})}


def run(model: nn.Module, epochs: int = 4, optimizer: Any = None, **settings: Any) -> History:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
    return sp.fit(model, batches(), nn.CrossEntropyLoss(), optimizer, epochs, progress=False, **tuned(settings))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("answer", [True, np.bool_(True), torch.tensor(True)], ids=repr)
def test_a_callback_that_returns_true_ends_training(answer: Any, tmp_path: Path) -> None:
    whole, model = net(), net()
    run(whole, 2)
    stop = lambda epoch, line, model: answer if epoch == 2 else False  # noqa: E731
    history = run(model, 5, callbacks=[stop], checkpoint=tmp_path)
    assert len(history.epochs) == 2
    assert history.stopped == {"epoch": 2, "epochs": 5}
    assert history.to_dict()["stopped"] == history.stopped
    assert same(weights(model), weights(whole))
    again = net()
    assert run(again, 5, checkpoint=tmp_path).stopped == history.stopped, "it has ended: the same call gives the same end"
    assert same(weights(again), weights(whole))
    more = run(net(), 6, checkpoint=tmp_path)
    assert (len(more.epochs), more.stopped) == (6, None), "more epochs were asked for"


@pytest.mark.parametrize("answer", [None, False, 1, "stop", [True]], ids=repr)
def test_other_answers_do_not(answer: Any) -> None:
    assert len(run(net(), 2, callbacks=[lambda epoch, line, model: answer]).epochs) == 2


class Script:
    """A callback that gives each epoch a number and keeps its weights."""

    def __init__(self, numbers: list[float]) -> None:
        self.numbers, self.weights = numbers, dict[int, dict[str, Tensor]]()

    def __call__(self, epoch: int, line: dict[str, float], model: nn.Module) -> None:
        line["mine"] = self.numbers[epoch - 1]
        self.weights[epoch] = weights(model)


@pytest.mark.parametrize(
    ("keep_best", "best"), [("min mine", 2), ("max mine", 4), ("min learning_rate", 1)], ids=["min", "max", "the first of equals"]
)
def test_the_best_epochs_weights_are_left(keep_best: str, best: int) -> None:
    model, script = net(), Script([3.0, 1.0, float("nan"), 5.0])
    history = run(model, callbacks=[script], keep_best=keep_best)
    assert len(history.epochs) == 4
    assert history.best is not None
    assert history.best["epoch"] == best
    assert same(weights(model), script.weights[best])


def test_the_default_is_the_loss_of_the_validation_split() -> None:
    model, script = net(), Script([0.0] * 30)
    history = run(model, 30, torch.optim.SGD(model.parameters(), 1.0), eval_data=batches(9), callbacks=[script], keep_best=True)
    losses = [line["eval_loss"] for line in history.epochs]
    best = losses.index(min(losses)) + 1
    assert history.best == {"epoch": best, "monitor": "eval_loss", "value": min(losses)}
    assert best < 30, "else nothing is shown"
    assert same(weights(model), script.weights[best])
    assert sp.evaluate(model, batches(9), nn.CrossEntropyLoss())["loss"] == min(losses)


def test_the_best_epoch_is_resumed(tmp_path: Path) -> None:
    numbers = [3.0, 1.0, 2.0, 5.0, 4.0]
    whole = net()
    history = run(whole, 5, callbacks=[Script(numbers)], keep_best="min mine")
    for epochs in (1, 3, 5, 5):
        model = net()
        resumed = run(model, epochs, callbacks=[Script(numbers)], keep_best="min mine", checkpoint=tmp_path)
    assert resumed.best == history.best == {"epoch": 2, "monitor": "mine", "value": 1.0}
    assert same(weights(model), weights(whole))


def test_epochs_before_the_last_cut_do_not_count() -> None:
    model, script = sp.factorize(net(), where=sp.match("*")), Script([0.0, 3.0, 2.0, 4.0])
    cut = lambda model, inputs, step, steps: {"0": 2} if step == 4 else None  # noqa: E731
    history = run(model, courses=[cut], callbacks=[script], keep_best="min mine")
    assert history.best == {"epoch": 3, "monitor": "mine", "value": 2.0}
    assert same(weights(model), script.weights[3])
    assert model[0].rank == 2


def test_a_number_that_the_log_has_not_is_refused() -> None:
    with pytest.raises(SettingError, match=r"fit: keep_best must be a number of the log: loss, .*, got 'gain'"):
        run(net(), keep_best="max gain")


def test_a_plateau_schedule_sees_the_monitored_number() -> None:
    for settings, mode, expected in (
        ({"keep_best": "max mine"}, "max", [0.1, 0.1, 0.05, 0.025]),
        ({"eval_data": batches(9)}, "min", None),
        ({}, "min", None),
    ):
        model = net()
        optimizer, seen = torch.optim.SGD(model.parameters(), 0.1), []
        scheduler = ReduceLROnPlateau(optimizer, mode, 0.5, patience=0)  # type: ignore[arg-type]
        step = scheduler.step
        scheduler.step = lambda metric, seen=seen, step=step: (seen.append(metric), step(metric))[1]  # type: ignore[method-assign]
        script = Script([1.0, 2.0, 1.5, 1.0])
        history = run(model, 4, optimizer, scheduler=scheduler, callbacks=[script], **settings)  # type: ignore[arg-type]
        name = "mine" if "keep_best" in settings else "eval_loss" if settings else "loss"
        assert seen == [line[name] for line in history.epochs]
        if expected:
            assert [line["learning_rate"] for line in history.epochs] == [0.1, 0.1, 0.1, 0.05]


@pytest.mark.parametrize(
    ("mode", "settings", "message"),
    [
        ("min", {"scheduler_steps": "batch"}, "scheduler_steps must be 'epoch' for ReduceLROnPlateau"),
        ("max", {}, "scheduler must be mode='min' without eval_data"),
        ("max", {"keep_best": "min loss"}, "scheduler must be mode='min' for 'loss', which keep_best monitors"),
    ],
)
def test_a_plateau_schedule_that_looks_the_wrong_way_is_refused(mode: Any, settings: dict[str, Any], message: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if "keep_best" in settings:
        settings = settings | {"eval_data": batches(1)}
    with pytest.raises(SettingError, match=message):
        run(model, 1, optimizer, scheduler=ReduceLROnPlateau(optimizer, mode), **settings)


# SIGTERM

PROGRAM = """
import signal
import sys
import torch
from torch import nn
import spectrim as sp

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell inherits that it is ignored
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Linear(64, 64)
data = [(torch.randn(4, 64), torch.randn(4, 64)) for _ in range(4)]
say = lambda epoch, line, model: print(epoch, flush=True)
try:
    sp.fit(model, data, nn.MSELoss(), torch.optim.Adam(model.parameters()), 10**6, checkpoint=sys.argv[1], callbacks=[say], progress=False)
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(130)
finally:
    print("cleaned up", flush=True)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_sigterm_ends_a_run_as_cleanly_as_ctrl_c(tmp_path: Path, number: int, code: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"}
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        time.sleep(0.02)
        process.send_signal(number)
        rest = process.stdout.read().split("\n")
        assert process.wait() == code
    assert "cleaned up" in rest
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    done = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["history"]
    said = 3 + sum(line.isdigit() for line in rest)
    assert said - 1 <= len(done) <= said


class Finalized:
    """The signal comes where Python drops exceptions, as in the iterator of a loader with workers."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


def in_a_finalizer() -> None:
    Finalized()
    time.sleep(5)


def raising_afterwards() -> None:
    """As torch does where a worker of the loader got the signal, too."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    finally:
        raise RuntimeError("DataLoader worker is killed by signal: Terminated")


@pytest.mark.parametrize("trouble", [in_a_finalizer, raising_afterwards])
def test_a_signal_ends_training_whatever_it_interrupts(trouble: Any) -> None:
    told = signal.getsignal(signal.SIGCHLD)
    try:
        with pytest.raises(SystemExit, match="143"), ending_cleanly():
            trouble()
    finally:
        signal.signal(signal.SIGCHLD, told)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_that_is_set_already_stays() -> None:
    mine = lambda number, frame: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, mine)
    try:
        seen = []
        run(net(), 1, callbacks=[lambda epoch, line, model: seen.append(signal.getsignal(signal.SIGTERM))])
        assert seen == [mine]
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    run(copy.deepcopy(net()), 1)
    assert signal.getsignal(signal.SIGTERM) is before
