"""Kills at random, and at every operation on files."""

import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from work import JOBS, bits, forked, hashed, net

import spectrim as sp
from spectrim.runtimes.export import export
from spectrim.storage.pack import pack, unpack

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod", "os.utime"}
PATCHED = ("write", "fsync", "close", "posix_fallocate")


def watched(act: Callable[[str], None]) -> None:
    """Call `act` with its name just before each operation on files that this process makes from now on."""
    inside = False

    def told(name: str) -> None:
        nonlocal inside
        if not inside:
            inside = True
            try:
                act(name)
            finally:
                inside = False

    def audited(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
            told(event)

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            told(f"os.{name}")
            return original(*arguments, **options)

        return counted

    sys.addaudithook(audited)
    for name in PATCHED:
        setattr(os, name, counting(name, getattr(os, name)))


def state_of(folder: Path) -> str:
    """Return a digest of all files under a folder; random names of temporary files count as one name."""
    made = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        made.update(re.sub(r"\d+-[0-9a-f]{8}", "N", str(path.relative_to(folder))).encode())
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            made.update(b"lock" if path.name.endswith(".lock") else hashlib.sha256(content).digest())
    return made.hexdigest()


def stopped_states(work: Callable[[Path], Any], folder: Path, states: Path) -> dict[str, Any]:
    """Do some work in a process, and keep what lies in the folder just before each operation on files: what a kill would leave.

    A killed process leaves what it has handed to the system, which is what a copy of the folder holds at that moment. States that are
    equal are kept once. The process has ended when they are read, as a killed one has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    states.mkdir()

    def begin() -> str:
        count, seen = 0, dict[str, int]()

        def keep(name: str) -> None:
            nonlocal count
            count += 1
            found = state_of(folder)
            if found not in seen:
                seen[found] = count
                shutil.copytree(folder, states / f"{count}", symlinks=True)

        watched(keep)
        work(folder)
        return json.dumps({"operations": count, "states": len(seen)})

    said = forked(begin)
    if not said.startswith("{"):
        raise RuntimeError(said)
    return dict(json.loads(said))


def left_over(out: Path) -> int:
    """Return how many temporary files and locks lie in a folder."""
    return len([path for path in out.rglob("*") if path.suffix in (".tmp", ".lock")])


def kills_at_operations(folder: Path, name: str, most: int) -> Iterator[dict[str, Any]]:
    """Let a job go on from the state before each operation on files, and compare its bits with those of the undisturbed one."""
    job, whole = JOBS[name], folder / f"{name}-whole"
    counts, seen = stopped_states(job, whole, folder / f"{name}-states"), Counter[str]()
    expected = bits(whole)
    states = sorted((folder / f"{name}-states").iterdir(), key=lambda path: int(path.name))
    for state in states[:: -(-len(states) // most)]:
        ended = forked(partial(job, state))
        same = ended == "done" and bits(state) == expected
        seen["same bits" if same else "other bits" if ended == "done" else f"not resumed: {ended}"] += 1
        seen["temporary files left"] += left_over(state)
        shutil.rmtree(state)
        seen["resumed"] += 1
        yield {"operations on files": counts["operations"], "different states of the disk": counts["states"], **seen}


def kills_at_random(folder: Path, name: str, count: int) -> Iterator[dict[str, Any]]:
    """Kill a job once or twice, at random; then let it end and compare its bits with those of an undisturbed one."""
    job, draw, seen, start = JOBS[name], random.Random(0), Counter[str](), time.perf_counter()
    whole = folder / f"{name}-undisturbed"
    assert forked(partial(job, whole)) == "done"
    seconds, expected = time.perf_counter() - start, bits(whole)
    for trial in range(count):
        out = folder / f"{name}-killed-{trial}"
        for _ in range(draw.randint(1, 2)):
            seen["kills"] += forked(partial(job, out), draw.uniform(0.0, seconds)).startswith("killed")
        ended = forked(partial(job, out))
        same = ended == "done" and bits(out) == expected
        seen["same bits" if same else "other bits" if ended == "done" else f"not resumed: {ended}"] += 1
        seen["temporary files left"] += left_over(out)
        shutil.rmtree(out)
        yield {"jobs": trial + 1, **seen}


def writers() -> dict[str, tuple[Callable[[int, Path], Any], Callable[[Path], Any]]]:
    """Return, by name, what writes one of two networks to a folder, and what reads it back as a text."""
    x = torch.zeros(2, 8)
    models = [sp.factorize(net().eval(), rank=rank) for rank in (2, 3)]

    def file_of(suffix: str) -> tuple[Callable[[int, Path], Any], Callable[[Path], Any]]:
        def write(which: int, out: Path) -> None:
            export(models[which], x, out / f"net{suffix}", progress=False)

        return write, lambda out: repr(sp.runtimes.run_exported(out / f"net{suffix}", x).tolist())

    return {
        "save": (lambda which, out: sp.save(models[which], out / "model"), lambda out: hashed(sp.load(out / "model", net()).state_dict())),
        "pack": (lambda which, out: pack(models[which], out / "net.spz"), lambda out: hashed(unpack(out / "net.spz", net()).state_dict())),
        **{f"export to {suffix}": file_of(suffix) for suffix in (".pt2", ".onnx", ".pte", ".xml")},
    }


def kills_of_writers(folder: Path) -> Iterator[dict[str, Any]]:
    """Read what stands there before each operation on files while one network is written over another; then write it again."""
    found: dict[str, Any] = {}
    for name, (write, read) in writers().items():
        place = folder / re.sub(r"\W", "-", name)
        place.mkdir()
        said = forked(lambda write=write, place=place: (write(1, place), None)[1])
        new = forked(lambda read=read, place=place: read(place))
        shutil.rmtree(place)
        place.mkdir()
        if said != "done" or forked(lambda write=write, place=place: (write(0, place), None)[1]) != "done":
            found[name] = f"not tried: {said}"
            continue
        old, seen = forked(lambda read=read, place=place: read(place)), Counter[str]()
        counts = stopped_states(lambda out, write=write: write(1, out), place, place.with_suffix(".states"))
        for state in sorted(place.with_suffix(".states").iterdir(), key=lambda path: int(path.name)):
            got = forked(lambda read=read, state=state: read(state))
            seen["the old one" if got == old else "the new one" if got == new else got.partition(":")[0]] += 1
            again = forked(lambda write=write, state=state: (write(1, state), None)[1])
            seen[
                "written again" if again == "done" and forked(lambda read=read, state=state: read(state)) == new else f"not again: {again}"
            ] += 1
            seen["temporary files left"] += left_over(state)
            shutil.rmtree(state)
        found[name] = {"operations on files": counts["operations"], "different states of the disk": counts["states"], **seen}
        yield found
