"""Kills, damaged files, full disks and two writers: what became of the work, counted.

    python benchmarks/faults/run.py --kills 100 --corruptions 60

Every trial runs in a process that is forked, so that it costs no import. The result is `result.json` beside this file; it is written after
each trial, and parts that stand there are not done again.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from damage import corruptions
from kills import kills_at_operations, kills_at_random, kills_of_writers
from torch import nn
from work import JOBS, forked, net

import spectrim as sp
from spectrim.errors import WriteError
from spectrim.files import write_text
from spectrim.locks import locked
from spectrim.pipeline.environment import environment
from spectrim.runtimes.export import export
from spectrim.storage.pack import pack

HERE = Path(__file__).parent
SHARES = {"fit": 0.6, "compress": 0.2, "run": 0.2}
"""Of the kills at random, by job."""


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return whether two states are equal."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def full_disks(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """Write with a limit on the size of files, over an older file; it must stay, and the error must be clear."""
    low, x = sp.factorize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), rank=8), torch.zeros(2, 64)
    target = folder / "full"
    work: dict[str, Callable[[], Any]] = {
        "save": lambda: sp.save(low, target / "model"),
        "pack": lambda: pack(low, target / "net.spz"),
        **{
            f"export to {suffix}": partial(export, low, x, target / f"net{suffix}", progress=False)
            for suffix in (".pt2", ".onnx", ".pte", ".xml")
        },
        "text": lambda: write_text(target / "text", "x" * 50_000),
    }
    found: dict[str, Any] = {}
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
        yield found


def two_writers(folder: Path, count: int) -> Iterator[dict[str, Any]]:
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
    yield {"saves by two processes": 2 * count, **seen}
    told = {}
    for name, job in JOBS.items():
        place = folder / f"taken-{name}"
        place.mkdir()
        with locked(place):
            said = forked(partial(job, place))
        told[f"a second {name} in one folder"] = "refused" if "is being written by process" in said else said
    yield {"saves by two processes": 2 * count, **seen, **told}


def parts(kills: int, damages: int, states: int) -> dict[str, Callable[[Path], Iterator[dict[str, Any]]]]:
    """Return the parts of the result, by name."""
    found: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {"full disks": lambda folder: full_disks(folder, max(4, damages // 6))}
    found["writers killed at each operation"] = kills_of_writers
    for name in JOBS:
        found[f"{name} killed at operations"] = partial(kills_at_operations, name=name, most=states)
    found["damaged files"] = partial(corruptions, count=damages)
    found["two writers"] = lambda folder: two_writers(folder, max(10, kills // 2))
    found |= {f"{name} killed at random": partial(kills_at_random, name=name, count=round(kills * share)) for name, share in SHARES.items()}
    return found


def main() -> None:
    """Do the parts that are not in the result, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--corruptions", type=int, default=60)
    parser.add_argument("--states", type=int, default=1000, help="states of the disk from which each job is resumed, at most")
    parser.add_argument("--parts", nargs="*", help="names of parts; all of them when omitted")
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.modules["spectrim.metrics.measurement"].compare_latency = partial(sp.compare_latency, repeats=1, min_time=1e-4)  # type: ignore[attr-defined]
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    done = result.setdefault("finished", [])
    for name, part in parts(arguments.kills, arguments.corruptions, arguments.states).items():
        if name in done or (arguments.parts and name not in arguments.parts):
            continue
        start = time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        with tempfile.TemporaryDirectory() as place:
            for found in part(Path(place)):
                spent = time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - start
                result[name] = {**found, "processor seconds": round(spent)}
                write_text(arguments.out, json.dumps(result | {"environment": environment()}, indent=1) + "\n")
        done.append(name)
        write_text(arguments.out, json.dumps(result | {"environment": environment()}, indent=1) + "\n")
        print(name, json.dumps(result[name]), flush=True)


if __name__ == "__main__":
    main()
