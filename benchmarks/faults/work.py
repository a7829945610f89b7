"""The jobs that are killed: a run of a recipe, `compress` with training, `fit` with a checkpoint; and processes for them."""

import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import spectrim as sp
from spectrim.errors import SpectrimError
from spectrim.pipeline.recipe import parse_recipe
from spectrim.pipeline.run import Run
from spectrim.storage.folder import WEIGHTS

LOSS = nn.CrossEntropyLoss()


class Counting:
    """Data that count their own passes and change with them."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.passes, self.own = x, 0, np.random.default_rng(4)

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        self.passes += 1
        for part in np.array_split(self.own.permutation(len(self.x)), 3):
            yield self.x[part] * (1 + 0.1 * self.passes) + 0.01 * torch.randn(()), self.x[part][:, :3].argmax(1)


class Splits:
    """Three splits."""

    def __init__(self) -> None:
        self.train, self.val, self.test = (Counting(part) for part in torch.randn(72, 8).split(24))


def net() -> nn.Module:
    """Return a network with every kind of state that matters here."""
    layers = (nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    return nn.Sequential(*layers)


def data() -> Splits:
    """Return the data."""
    return Splits()


def experiment() -> dict[str, Any]:
    """Return the recipe of every run here."""
    phase = {"epochs": 2, "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}}
    cut = {"ranks": {"0": 3, "4": 4}, "cut": "whitened", "correct": True, "examples": 16, "recalibrate": True}
    named = {"model": f"{__name__}.net", "data": f"{__name__}.data", "loss": "torch.nn.CrossEntropyLoss"}
    return {**named, "dense": phase, "train": [phase], "prune": cut, "finetune": phase}


def adam(parameters: Any) -> torch.optim.Optimizer:
    """Return the optimizer of every job."""
    return torch.optim.Adam(parameters, lr=0.01)


def run(out: Path) -> None:
    """Run the recipe in a folder."""
    Run(parse_recipe(experiment()), out, progress=False).run()


def compress(out: Path) -> None:
    """Compress with training toward the budget and fine-tuning, in a folder."""
    torch.manual_seed(3)
    splits, model = data(), net()
    tuning = sp.Tuning(optimizer=adam)
    sp.compress(
        model, splits.train, LOSS, 0.8, epochs=4, eval_data=splits.val, where="*", squeeze=0.5, tuning=tuning, folder=out, progress=False
    )


def fit(out: Path) -> None:
    """Fit a factorized network that a course cuts, with a checkpoint, and save it."""
    torch.manual_seed(3)
    splits, low = data(), sp.factorize(net(), where="*")
    course = sp.Ramp(0.8, begin=0.2, end=0.6, cuts=3)
    sp.fit(low, splits.train, LOSS, adam(low.parameters()), 4, eval_data=splits.val, courses=[course], checkpoint=out, progress=False)
    sp.save(low, out / "fitted")


JOBS: dict[str, Callable[[Path], None]] = {"run": run, "compress": compress, "fit": fit}


def bits(out: Path) -> dict[str, str]:
    """Return a digest of the tensors of each network in a folder of a job."""
    return {str(path.relative_to(out)): hashed(sp.storage.folder.read(path.parent)[1]) for path in sorted(out.rglob(WEIGHTS))}


def hashed(state: dict[str, torch.Tensor]) -> str:
    """Return a digest of a state."""
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()


def forked(work: Callable[[], str | None], after: float | None = None) -> str:
    """Return what work says in a process of its own; that process is killed `after` seconds, if given."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            said = work() or "done"
        except BaseException as error:
            said = f"{'clear' if isinstance(error, SpectrimError) else 'other'} error: {type(error).__name__}: {error}"
        os.write(writer, said[:2000].encode())
        os._exit(0)
    os.close(writer)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    said = os.read(reader, 4000).decode(errors="replace")
    os.close(reader)
    return said or f"killed by signal {os.WTERMSIG(status)}"
