"""Damaged files of every kind: what is read is refused in words, or is what it was."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from work import LOSS, data, forked, hashed, net, run

import spectrim as sp
from spectrim.budget.plan_table import Plan
from spectrim.budget.table_file import read_table, save_table
from spectrim.files import read_json
from spectrim.metrics.calls import call_model
from spectrim.pipeline.folders import contents
from spectrim.pipeline.recipe import read_recipe
from spectrim.report import text_report
from spectrim.runtimes import run_exported
from spectrim.runtimes.export import export
from spectrim.storage.folder import PLAN, WEIGHTS
from spectrim.storage.pack import pack, unpack
from spectrim.training.statefile import read_state

KINDS = ("a bit flipped", "cut off", "zeros", "two parts swapped")


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Return a file's content with a bit flipped, cut off, with a part set to zero, or with two parts swapped."""
    place, kind = draw.randrange(len(content)), draw.choice(KINDS)
    if kind == "a bit flipped":
        return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
    if kind == "cut off":
        return content[:place]
    size = draw.randint(1, min(64, len(content) // 2))
    place = draw.randrange(len(content) - size)
    if kind == "zeros":
        return content[:place] + bytes(size) + content[place + size :]
    other = draw.randrange(len(content) - size)
    first, second = sorted((place, other))
    second = max(second, first + size)
    parts = content[:first], content[first : first + size], content[first + size : second], content[second : second + size]
    return parts[0] + parts[3] + parts[2] + parts[1] + content[second + size :]


def readers(folder: Path) -> dict[Path, Callable[[], Any]]:
    """Write a file of each kind, and return what reads it."""
    out, x = folder / "whole", torch.zeros(2, 8)
    run(out)
    low = sp.factorize(net().eval(), rank=2)
    model, packed = sp.save(low, folder / "model"), pack(low, folder / "net.spz").path
    counted = sp.plan(net().eval(), x, where="*", budgets=[0.9])
    counted.save(folder / "plan.json")
    save_table(sp.latency_table(low, x, time_box=0.001), folder / "table.json")
    made = folder / "compressed"
    sp.compress(net(), data().train, LOSS, 0.9, where="*", folder=made, progress=False)
    checkpoint = next(out.glob("4-finetune/**/checkpoint.pt"))

    def outputs(path: Path) -> list[Any]:
        return [tensor.tolist() for tensor in call_model(lambda *a: run_exported(path, a[0] if len(a) == 1 else a), x)]

    found: dict[Path, Callable[[], Any]] = {
        model / WEIGHTS: lambda: hashed(sp.load(model, net()).state_dict()),
        model / PLAN: lambda: hashed(sp.load(model, net()).state_dict()),
        folder / "net.spz": lambda: hashed(unpack(packed, net()).state_dict()),
        checkpoint: lambda: hashed(read_state(checkpoint, "")["model"]),
        folder / "plan.json": lambda: Plan.load(folder / "plan.json").to_dict(),
        folder / "table.json": lambda: read_table(folder / "table.json").to_dict(),
        out / "result.json": lambda: text_report(out),
        out / "manifest.json": lambda: (str(contents(out).coverage), contents(out).networks),
        out / "4-finetune" / "stage.json": lambda: text_report(out),
        out / "recipe.yaml": lambda: (contents(out), read_recipe(out / "recipe.yaml")),
        made / "settings.json": lambda: read_json(made / "settings.json"),
        made / "cut" / "cut.json": lambda: read_json(made / "cut" / "cut.json"),
    }
    for suffix in (".pt2", ".onnx", ".pte", ".xml"):
        with suppress(ImportError):
            path = export(low, x, folder / f"net{suffix}", progress=False).path
            found[path] = lambda path=path: outputs(path)
            if suffix == ".xml":
                found[path.with_suffix(".bin")] = lambda path=path: outputs(path)
    found |= external(folder, low, outputs)
    return found


def external(folder: Path, low: Any, outputs: Callable[[Path], list[Any]]) -> dict[Path, Callable[[], Any]]:
    """Return what reads a graph of ONNX whose weights lie in a file beside it, and these weights."""
    import onnx

    from spectrim.runtimes import onnx_digest

    graph, path = onnx.load(folder / "net.onnx"), folder / "apart" / "net.onnx"
    path.parent.mkdir()
    onnx.save(graph, path, save_as_external_data=True, location="net.onnx.data", size_threshold=0)
    onnx_digest.seal(path)
    return {path: lambda: outputs(path), path.with_name("net.onnx.data"): lambda: outputs(path)}


def corruptions(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """Damage each kind of file and read it; what is read must be refused, or be what it was."""
    found: dict[str, Any] = {}
    for path, reader in readers(folder).items():
        whole, draw, seen = path.read_bytes(), random.Random(1), Counter[str]()
        expected = forked(lambda reader=reader: repr(reader()))
        assert not expected.startswith(("clear error", "other error", "killed")), expected
        for _ in range(count):
            path.write_bytes(damaged(whole, draw))
            got = forked(lambda reader=reader: repr(reader()))
            kind = got.split(":")[0]
            if got == expected:
                kind = "the same as before"
            elif kind == "other error" or kind.startswith("killed"):
                kind = got[:120]
            elif kind != "clear error":
                kind = "another content, accepted"
            elif path.name not in got and path.parent.name not in got:
                kind = f"clear error that does not name the file: {got[:120]}"
            seen[kind] += 1
        path.write_bytes(whole)
        found[str(path.relative_to(folder))] = {"damaged": count, **seen}
        yield found
