"""Kills, damaged files, full disks and two writers: what became of the work, counted.

    python benchmarks/faults/run.py --kills 100 --corruptions 60

Every trial runs in a process that is forked, so that it costs no import. The result is `result.json` beside this file.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import spectrim as sp
from spectrim.budget.plan_table import Plan
from spectrim.errors import RecipeError, SpectrimError, WriteError
from spectrim.files import write_text
from spectrim.locks import locked
from spectrim.metrics.calls import call_model
from spectrim.pipeline.environment import environment
from spectrim.pipeline.folders import contents
from spectrim.pipeline.recipe import parse_recipe, read_recipe
from spectrim.pipeline.run import Run
from spectrim.report import text_report
from spectrim.runtimes import run_exported
from spectrim.runtimes.export import export
from spectrim.storage.folder import PLAN, WEIGHTS
from spectrim.training.statefile import read_state

HERE = Path(__file__).parent
STAGES = ("1-dense", "2-train", "3-prune", "4-finetune", "5-merge")
OPERATIONS = ("replace", "unlink", "fsync", "rename", "open", "mkdir")


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


def run(out: Path) -> None:
    """Run the recipe in a folder."""
    Run(parse_recipe(experiment()), out, progress=False).run()


def bits(out: Path) -> dict[str, str]:
    """Return a digest of the network of each stage."""
    found = {}
    for stage in STAGES:
        state = sp.load(out / stage, net()).state_dict()
        found[stage] = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()
    return found


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


def killed_at(operation: int, work: Callable[[], None]) -> str:
    """Do some work in a process that kills itself just before its n-th operation on files."""

    def begin() -> None:
        count = 0

        def counting(original: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **options)

            return counted

        for name in OPERATIONS:
            setattr(os, name, counting(getattr(os, name)))
        work()

    return forked(begin)


def kills_of_runs(folder: Path, count: int) -> dict[str, Any]:
    """Kill runs at random and at operations on files spread over the whole run; then let each end."""
    start = time.perf_counter()
    assert forked(partial(run, folder / "whole")) == "done"
    seconds, expected, draw = time.perf_counter() - start, bits(folder / "whole"), random.Random(0)
    seen: Counter[str] = Counter()
    for trial in range(2 * count):
        out = folder / f"killed-{trial}"
        for _ in range(draw.randint(1, 2)):
            if trial % 2:
                killed_at(draw.randint(1, 400), partial(run, out))
            else:
                forked(partial(run, out), draw.uniform(0.0, seconds))
        ended = forked(partial(run, out))
        if ended != "done":
            seen[f"not resumed: {ended}"] += 1
            continue
        seen["same bits" if bits(out) == expected else "other bits"] += 1
        seen["temporary files left"] += len(list(out.rglob("*.tmp"))) + len(list(out.rglob("*.lock")))
        shutil.rmtree(out)
    return {"runs killed at random": count, "runs killed at an operation on files": count, **seen}


def kills_of_save(folder: Path) -> dict[str, Any]:
    """Kill `save` over an older model at every operation on files; load what stands there."""
    old, new, seen, operation = sp.factorize(net(), rank=2), sp.factorize(net(), rank=3), Counter[str](), 0
    while True:
        operation += 1
        out = sp.save(old, folder / "model")
        ended = killed_at(operation, lambda out=out: (sp.save(new, out), None)[1])
        state = sp.load(out, net()).state_dict()
        matches = [name for name, model in (("old", old), ("new", new)) if same(state, model.state_dict())]
        seen[f"the {matches[0]} model, whole" if matches else "neither model"] += 1
        if ended == "done":
            break
    sp.save(old, folder / "model")
    return {"saves killed, at every operation": operation - 1, **seen, "files in the end": sorted(os.listdir(folder / "model"))}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return whether two states are equal."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Return a file's content with bits flipped, a part missing, or a part set to zero."""
    place = draw.randrange(len(content))
    kind = draw.randrange(3)
    if kind == 0:
        return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
    if kind == 1:
        return content[:place]
    size = min(len(content) - place, draw.randint(1, 64))
    return content[:place] + bytes(size) + content[place + size :]


def corruptions(folder: Path, count: int) -> dict[str, Any]:
    """Damage each kind of file and read it; what is read must be refused, or be what it was."""
    out, x = folder / "whole", torch.zeros(2, 8)
    low = sp.factorize(net().eval(), rank=2)
    model = sp.save(low, folder / "model")
    made = export(low, x, folder / "net.pt2").path
    graph = export(low, x, folder / "net.onnx").path
    counted = sp.plan(net().eval(), x, where="*", budgets=[0.9])
    counted.save(folder / "plan.json")
    checkpoint = next(out.glob("4-finetune/**/checkpoint.pt"))

    def outputs(path: Path) -> list[Any]:
        return [tensor.tolist() for tensor in call_model(lambda *a: run_exported(path, a[0] if len(a) == 1 else a), x)]

    readers: dict[Path, Callable[[], Any]] = {
        model / WEIGHTS: lambda: hashed(sp.load(model, net()).state_dict()),
        model / PLAN: lambda: hashed(sp.load(model, net()).state_dict()),
        checkpoint: lambda: hashed(read_state(checkpoint, "")["model"]),
        made: lambda: outputs(made),
        graph: lambda: outputs(graph),
        folder / "plan.json": lambda: Plan.load(folder / "plan.json").to_dict(),
        out / "result.json": lambda: text_report(out),
        out / "manifest.json": lambda: (str(contents(out).coverage), contents(out).networks),
        out / "4-finetune" / "stage.json": lambda: text_report(out),
        out / "recipe.yaml": lambda: (contents(out), read_recipe(out / "recipe.yaml")),
    }
    found = {}
    for path, reader in readers.items():
        whole, draw, seen = path.read_bytes(), random.Random(1), Counter[str]()
        expected = forked(lambda reader=reader: repr(reader()))
        for _ in range(count):
            path.write_bytes(damaged(whole, draw))
            got = forked(lambda reader=reader: repr(reader()))
            kind = got.split(":")[0]
            if got == expected:
                kind = "the same as before"
            elif kind not in ("clear error", "other error") and not kind.startswith("killed"):
                kind = "another content, accepted"
            seen[kind] += 1
        path.write_bytes(whole)
        found[path.name] = {"damaged": count, **seen}
    return found


def hashed(state: dict[str, torch.Tensor]) -> str:
    """Return a digest of a state."""
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()


def full_disks(folder: Path, count: int) -> dict[str, Any]:
    """Write with a limit on the size of files, over an older file; it must stay, and the error must be clear."""
    low, x = sp.factorize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), rank=8), torch.zeros(2, 64)
    target = folder / "full"
    work: dict[str, Callable[[], Any]] = {
        "save": lambda: sp.save(low, target / "model"),
        "export to .pt2": lambda: export(low, x, target / "net.pt2"),
        "export to .onnx": lambda: export(low, x, target / "net.onnx"),
        "text": lambda: write_text(target / "text", "x" * 50_000),
    }
    found = {}
    for name, write in work.items():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        if forked(lambda write=write: (write(), None)[1]) != "done":
            found[name] = "not tried: the runtime is not installed"
            continue
        before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
        largest, seen = max(map(len, before.values())), Counter[str]()

        def limited(size: int, write: Callable[[], Any] = write) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            write()

        for trial in range(count):
            said = forked(partial(limited, (trial + 1) * largest // (count + 2)))
            seen["clear error" if said.startswith(f"clear error: {WriteError.__name__}") else said[:80]] += 1
            kept = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
            seen["the old files stayed" if kept else "the old files did not stay"] += 1
        found[name] = {"tried": count, **seen}
    return found


def two_writers(folder: Path, count: int) -> dict[str, Any]:
    """Let two processes save to one folder while this one loads from it, and two runs share a folder."""
    models, out, seen = [sp.factorize(net(), rank=rank) for rank in (2, 3)], folder / "shared", Counter[str]()
    sp.save(models[0], out)
    children = []
    for model in models:
        child = os.fork()
        if child == 0:
            for _ in range(count):
                sp.save(model, out)
            os._exit(0)
        children.append(child)
    running = set(children)
    while running:
        state = sp.load(out, net()).state_dict()
        whole = any(same(state, model.state_dict()) for model in models)
        seen["loads of one whole model" if whole else "loads of a mixture"] += 1
        running -= {child for child in running if os.waitpid(child, os.WNOHANG)[0]}
    job = Run(parse_recipe(experiment()), folder / "taken", progress=False)
    with job.hold():
        second = forked(partial(run, folder / "taken"))
    (folder / "held").mkdir()
    with locked(folder / "held"):
        third = forked(partial(compress, folder / "held"))
    told = [said if "is being written by process" not in said else "refused" for said in (second, third)]
    taken = {"a second run in one folder": told[0], "a second call of compress in one folder": told[1]}
    return {"saves by two processes": 2 * count, **seen, **taken}


def compress(folder: Path) -> None:
    """Compress in a folder."""
    batches = [(torch.randn(8, 8), torch.randint(3, (8,)))]
    sp.compress(net(), batches, nn.CrossEntropyLoss(), 0.9, where="*", folder=folder, progress=False)


def main() -> None:
    """Run all trials and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--corruptions", type=int, default=60)
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.modules["spectrim.metrics.measurement"].compare_latency = partial(sp.compare_latency, repeats=1, min_time=1e-4)  # type: ignore[attr-defined]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        result = {
            "kills of runs": kills_of_runs(folder, arguments.kills),
            "kills of save": kills_of_save(folder),
            "damaged files": corruptions(folder, arguments.corruptions),
            "full disks": full_disks(folder, max(4, arguments.corruptions // 6)),
            "two writers": two_writers(folder, arguments.kills),
        }
    result |= {"seconds": round(time.perf_counter() - start), "environment": environment()}
    write_text(arguments.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        sys.exit(str(error))
