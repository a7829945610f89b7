"""SIGKILL at random moments of training and saving: the resumed run ends with the same bits, and nothing half-written is ever loaded."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import spectrim as sp

KILLS, EPOCHS, AT_MOST = 10, 42, 3  # killed in one of its first epochs, so that no run ends before the last, on a fast machine, too
PROGRAM = """
import hashlib, random, sys
import numpy as np
import torch
from torch import nn
import spectrim as sp


def dense():
    return nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


def digest(model):
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())).hexdigest()


class Data(list):
    def __iter__(self):
        order = random.sample(range(len(self)), len(self))
        scale = float(np.random.rand())
        return (self[i] if torch.rand(()) < 0.5 else (self[i][0] * scale, self[i][1]) for i in order)


def main(folder):
    torch.set_num_threads(1)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    x, y = torch.randn(128, 12), torch.randint(3, (128,))
    data = Data(zip(x.split(16), y.split(16)))
    model = sp.factorize(dense())
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)

    def after(epoch, line, model):
        for _ in range(2):
            sp.save(model, folder + "/model")
        print(epoch, digest(model), flush=True)

    penalties = [sp.Orthogonality(), sp.Hoyer(0.01)]
    sp.fit(model, data, nn.CrossEntropyLoss(), optimizer, EPOCHS, penalties=penalties, eval_data=data,
           tuning=sp.Tuning(scheduler=scheduler), checkpoint=folder, callbacks=[after], progress=False)
"""


SERVER = """
import os, traceback

for line in sys.stdin:
    folder, pipe = line.rstrip("\\n").split("\\t")
    process = os.fork()
    if not process:
        ended = 1
        try:
            sys.stdout = open(pipe, "w")
            main(folder)
            ended = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(ended)
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""
"""Imports once and runs the program in a process for each folder; prints its number, and how it ended."""


@pytest.fixture
def server() -> Iterator["subprocess.Popen[str]"]:
    """A process without the type checks of these tests (which draw random numbers)."""
    code = f"EPOCHS = {EPOCHS}\n{PROGRAM}\n{SERVER}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


class Child:
    """One run of the program: its number and its output."""

    def __init__(self, server: "subprocess.Popen[str]", folder: Path) -> None:
        assert server.stdin is not None
        assert server.stdout is not None
        pipe = folder.with_name(f"{folder.name}.out")
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        server.stdin.write(f"{folder}\t{pipe}\n")
        server.stdin.flush()
        self.server, self.number, self.output = server.stdout, int(server.stdout.readline()), pipe.open()

    def ended(self) -> int:
        """Wait for its end, and return its code."""
        self.output.close()
        return int(self.server.readline())


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in ("seconds", "examples_per_s"))
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else bool(a == b)


@pytest.mark.slow
def test_killed_runs_resume_and_end_with_the_same_bits(server: "subprocess.Popen[str]", tmp_path: Path) -> None:
    scope: dict[str, Any] = {}
    exec(PROGRAM, scope)
    child = Child(server, tmp_path / "whole")
    whole = dict(line.split() for line in child.output)
    assert child.ended() == 0
    assert list(whole) == [str(epoch) for epoch in range(1, EPOCHS + 1)]
    assert len(set(whole.values())) == EPOCHS

    draw, folder, seen = random.Random(1), tmp_path / "killed", {}
    for _ in range(KILLS):
        child = Child(server, folder)
        for _ in range(draw.randint(1, AT_MOST)):
            epoch, digest = child.output.readline().split()
            seen[epoch] = digest
        time.sleep(draw.uniform(0, 0.1))  # anywhere in writing the checkpoint, training or saving: an epoch takes about as long
        os.kill(child.number, signal.SIGKILL)
        assert child.ended() == -signal.SIGKILL, "it was under way"
        file = folder / "checkpoint.pt"
        done = len(torch.load(file, weights_only=True)["history"]) if file.exists() else 0
        assert int(epoch) - 1 <= done < EPOCHS, "the checkpoint is that of the last epoch, or of the one before"
        model = scope["digest"](sp.load(folder / "model", scope["dense"]()))
        assert model in (whole.get(str(done)), whole[str(done + 1)]), "a whole model: of the checkpoint's epoch, or of the one after it"
    child = Child(server, folder)
    seen |= dict(line.split() for line in child.output)
    assert child.ended() == 0
    assert seen == {epoch: whole[epoch] for epoch in seen}, "every epoch, in every process, had the bits of the run that was left alone"
    assert str(EPOCHS) in seen
    ends = [torch.load(path / "checkpoint.pt", weights_only=True) for path in (tmp_path / "whole", folder)]
    assert same(*ends), "weights, optimizer, schedule, generators and history"
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["checkpoint.pt", "model.safetensors", "spectrim.json"]
