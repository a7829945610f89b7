"""Data that count their own passes: a run that is stopped anywhere ends with the bits of one that was not."""

import random
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import spectrim as sp
from spectrim.pipeline import run as runs
from spectrim.pipeline import stages
from spectrim.pipeline.data import Source, replayed
from spectrim.pipeline.recipe import read_recipe
from spectrim.pipeline.run import Run
from spectrim.pipeline.stages import make_model

MODULE = '''
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from spectrim.zoo import Batches, Splits


class Counting:
    """Each pass is another augmentation: of its number, and of a generator that is its own."""

    def __init__(self, x, y):
        self.x, self.y, self.passes, self.own = x, y, 0, np.random.default_rng(4)

    def __len__(self):
        return 3

    def __iter__(self):
        self.passes += 1
        order = self.own.permutation(len(self.x))
        for part in np.array_split(order, 3):
            yield self.x[part] * (1 + 0.1 * self.passes) + 0.01 * torch.randn(()), self.y[part]


class Items(Dataset):
    def __init__(self, x, y):
        self.x, self.y, self.drawn = x, y, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.drawn += 1
        return self.x[index] * (1 + self.drawn / 1000), self.y[index]


class Data:
    def __init__(self, kind):
        x = torch.randn(72, 8)
        y = x[:, :3].argmax(1)
        order = torch.randperm(72)  # a random split
        parts = [(x[chosen], y[chosen]) for chosen in order.split(24)]
        if kind == "counting":
            self.train, self.val, self.test = (Counting(*part) for part in parts)
        elif kind == "items":
            self.train, self.val, self.test = (DataLoader(Items(*part), 8, shuffle=n == 0) for n, part in enumerate(parts))
        elif kind == "batches":
            self.train, self.val, self.test = (Batches(*part, 8, shuffle=True, augment=jitter) for part in parts)
        else:
            self.train, self.val, self.test = (DataLoader(TensorDataset(*part), 8, shuffle=True) for part in parts)


def jitter(batch, generator):
    return batch + torch.randn(batch.shape, generator=generator)


def data(kind: str = "counting"):
    return Data(kind)


def net():
    return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
'''
KINDS = ("counting", "items", "batches", "tensors")
STAGES = ("1-dense", "2-train", "3-prune", "4-finetune", "5-merge", "b1-truncated", "b2-continued")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "countingdata.py").write_text(MODULE)
    phase = {"epochs": 2, "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}}
    recipe = {
        **{"model": "countingdata.net", "data": "countingdata.data", "loss": "torch.nn.CrossEntropyLoss", "dense": phase},
        "train": [phase, phase],
        "prune": {"ranks": {"0": 3, "4": 4}, "cut": "whitened", "correct": True, "examples": 16, "recalibrate": True},
        **{"finetune": phase, "truncated": phase, "continued": phase},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys.modules["spectrim.metrics.measurement"], "compare_latency", partial(sp.compare_latency, repeats=1, min_time=1e-3)
    )
    yield tmp_path
    sys.modules.pop("countingdata", None)


class Stopped(BaseException):
    pass


def ran(kind: str, out: Path) -> dict[str, Any]:
    return Run(read_recipe("base.yaml", [f"data.init_args.kind={kind}"]), out, progress=False).run()


def stopped(kind: str, out: Path, place: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run until a place, stop there, and run again; places are numbered calls of functions."""
    name, moment = place
    module = runs if hasattr(runs, name) else stages
    original, calls = getattr(module, name), 0

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != moment:
            return original(*args, **kwargs)
        if name == "fit":  # inside: after the first epoch
            original(*args, **kwargs | {"epochs": 1})
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stopping)
        with pytest.raises(Stopped):
            ran(kind, out)
    random.seed(9), torch.manual_seed(9)  # what another process begins with
    return ran(kind, out)


def bits(out: Path, kind: str) -> dict[str, torch.Tensor]:
    model = make_model(read_recipe("base.yaml", [f"data.init_args.kind={kind}"]))
    return {f"{stage}.{key}": value for stage in STAGES for key, value in sp.load(out / stage, model).state_dict().items()}


PLACES = [("fit", moment) for moment in range(1, 7)] + [("save", moment) for moment in (1, 4, 6)]
PLACES += [("first_examples", 1), ("recalibrate", 1), ("evaluate", 3), ("measure_together", 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_anywhere_ends_with_the_same_bits(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ran(kind, folder / "whole")
    expected = bits(folder / "whole", kind)
    places = PLACES if kind == "counting" else PLACES[1::5]
    for index, place in enumerate(places):
        out = folder / f"stopped-{index}"
        again = stopped(kind, out, place, monkeypatch)
        found = bits(out, kind)
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == [], place
        for name in ("dense", "final", "truncated", "continued"):
            assert {key: again[name][key] for key in ("loss", "accuracy")} == {key: whole[name][key] for key in ("loss", "accuracy")}, place


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_data_are_the_same_and_leave_the_global_generators_alone(kind: str) -> None:
    recipe = read_recipe("base.yaml", [f"data.init_args.kind={kind}"])
    source, passes = Source(recipe.data, recipe.seed), []
    for _ in range(2):
        torch.manual_seed(1)
        data, before = source.fresh(3), torch.get_rng_state()
        assert torch.equal(before, torch.manual_seed(1).get_state())
        passes.append([inputs for split in (data.train, data.train, data.val) for inputs, _ in split])
    assert all(map(torch.equal, *passes))


def test_only_data_that_need_it_are_read_again(folder: Path) -> None:
    said: list[str] = []
    for kind in KINDS:
        recipe = read_recipe("base.yaml", [f"data.init_args.kind={kind}"])
        data = Source(recipe.data, recipe.seed).data
        train = replayed(data.train, data.val, said.append)
        assert (train is data.train) == (kind in ("batches", "tensors"))
        assert len(train) == 3
    assert said == []
