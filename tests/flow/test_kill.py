"""SIGKILL at random moments of training and saving: the resumed run ends with the same bits, and nothing half-written is ever loaded."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch

import spectrim as sp

KILLS, EPOCHS, AT_MOST = 10, 120, 5  # killed in one of its first epochs, so that no run ends before the last, on a fast machine, too
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


@contextmanager
def child(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", IO[str]]]:
    """Run the program in a process of its own, without the type checks of these tests (which draw random numbers)."""
    code = f"EPOCHS = {EPOCHS}\n{PROGRAM}\nmain(sys.argv[1])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"}
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout
        finally:
            process.kill()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in ("seconds", "examples_per_s"))
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else bool(a == b)


@pytest.mark.slow
def test_killed_runs_resume_and_end_with_the_same_bits(tmp_path: Path) -> None:
    scope: dict[str, Any] = {}
    exec(PROGRAM, scope)
    with child(tmp_path / "whole") as (process, output):
        whole = dict(line.split() for line in output)
        assert process.wait() == 0
    assert list(whole) == [str(epoch) for epoch in range(1, EPOCHS + 1)]
    assert len(set(whole.values())) == EPOCHS

    draw, folder, seen = random.Random(1), tmp_path / "killed", {}
    for _ in range(KILLS):
        with child(folder) as (process, output):
            for _ in range(draw.randint(1, AT_MOST)):
                epoch, digest = output.readline().split()
                seen[epoch] = digest
            time.sleep(draw.uniform(0, 0.1))  # anywhere in writing the checkpoint, training or saving: an epoch takes about as long
            assert process.poll() is None, "it is under way"
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        file = folder / "checkpoint.pt"
        done = len(torch.load(file, weights_only=True)["history"]) if file.exists() else 0
        assert int(epoch) - 1 <= done < EPOCHS, "the checkpoint is that of the last epoch, or of the one before"
        model = scope["digest"](sp.load(folder / "model", scope["dense"]()))
        assert model in (whole.get(str(done)), whole[str(done + 1)]), "a whole model: of the checkpoint's epoch, or of the one after it"
    with child(folder) as (process, output):
        seen |= dict(line.split() for line in output)
        assert process.wait() == 0
    assert seen == {epoch: whole[epoch] for epoch in seen}, "every epoch, in every process, had the bits of the run that was left alone"
    assert str(EPOCHS) in seen
    ends = [torch.load(path / "checkpoint.pt", weights_only=True) for path in (tmp_path / "whole", folder)]
    assert same(*ends), "weights, optimizer, schedule, generators and history"
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["checkpoint.pt", "model.safetensors", "spectrim.json"]
