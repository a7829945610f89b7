"""What an older version of the library costs beside this one: ``python benchmarks/micro/rebuild.py FOLDER [linear|plan|steps]``.

FOLDER is a checkout of the older version (``git worktree add FOLDER COMMIT``). Both run the same work in processes that take turns, on one
thread each; ratios are of processor seconds in the same round. Peak memory is what the process holds beyond the model and its factors.
With ``linear`` or ``plan`` only these rows are measured; the others stay as they are in the result file, with the commit that they are of.

With ``steps`` nothing runs: the result files of ``step.py`` and ``latency.py`` in both checkouts, run one after the other on one machine,
are joined. Each of their ratios is to the dense network in the same round, so that they can be compared.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from harness import ROOT, write

ROUNDS = 2
WORK = '''
import gc, json, resource, sys, threading, time
import psutil, torch
from torch import nn
import spectrim as sp

torch.set_num_threads(1)
torch.manual_seed(0)
everything = sp.match("*")
me = psutil.Process()


def held():
    gc.collect()
    return me.memory_info().rss


class Peak(threading.Thread):
    """Samples resident memory while it is entered."""

    def __enter__(self):
        self.most, self.go = held(), True
        self.start()
        return self

    def run(self):
        while self.go:
            self.most = max(self.most, me.memory_info().rss)
            time.sleep(0.002)

    def __exit__(self, *_):
        self.go = False
        self.join()


def timed(name, work):
    start = time.process_time()
    made = work()
    found[name] = time.process_time() - start
    return made


found = {}
if sys.argv[1] == "linear":
    count, width = 48, 1024
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))
    weights = count * width * width * 4
    low = timed("factorize", lambda: sp.factorize(model, where=everything))
    before = held()
    with Peak(daemon=True) as peak:
        ranks = timed("allocate", lambda: sp.allocate(low, sp.Budget(macs=0.5), torch.zeros(1, width)))
    found["allocate, peak memory over the weights"] = (peak.most - before) / weights
    timed("prune", lambda: sp.prune(low, ranks))
    found["all three"] = found["factorize"] + found["allocate"] + found["prune"]
else:
    import torch._dynamo  # torch imports it at the first count of operations, in both versions

    model, x = nn.Sequential(*(nn.Linear(16, 16) for _ in range(500))), torch.randn(4, 16)
    timed("plan of 500 layers, 3 budgets", lambda: sp.plan(model, x, budgets=[0.7, 0.5, 0.35], where=everything))
    timed("plan of 500 layers", lambda: sp.plan(model, x, where=everything))
    data = [(torch.randn(4, 16), torch.randint(16, (4,))) for _ in range(2)]
    timed("plan of 500 layers, with a loss", lambda: sp.plan(model, x, data, nn.functional.cross_entropy, where=everything))
    model, x = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(500))), torch.randn(4, 16, 4, 4)
    timed("plan of 500 convolutions", lambda: sp.plan(model, x, where=everything))
print(json.dumps(found))
'''


def run(source: Path, case: str) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", WORK, case], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def commit(folder: Path) -> str:
    return subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def summary(values: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": float(median), "q1": float(low), "q3": float(high)}


def _ratios(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield what a result file says of each variant: its ratio to dense, with the quartiles."""
    parts = ("low", "median", "high")
    for variant, entry in found.get("ratios", {}).items():
        yield f"step, {found['network']}, {variant}", {part: round(entry[part], 3) for part in parts}
    for point in found.get("points", []):
        for runtime in ("onnx", "eager", "compiled"):
            for variant, entry in point.get(runtime, {}).items():
                yield f"latency, {point['network']}, {runtime}, {variant}", {part: round(entry[part], 3) for part in parts}


def steps(older: Path) -> None:
    """Join the results of ``step.py`` and ``latency.py`` in both checkouts: the ratio to dense of every variant, older and this."""
    here, rows = Path("benchmarks/micro/results"), dict[str, Any]()
    for path in sorted([*(ROOT / here).glob("step-*.json"), ROOT / here / "latency.json"]):
        held = {side: folder / here / path.name for side, folder in (("older", older), ("this", ROOT))}
        sides = {side: json.loads(file.read_text()) for side, file in held.items() if file.exists()}
        if len(sides) < 2 or sides["older"]["environment"]["commit"] != commit(older):
            continue  # not run there
        tables = {side: dict(_ratios(found)) for side, found in sides.items()}
        for name in tables["this"]:
            if name in tables["older"]:
                rows[name] = {side: table[name] for side, table in tables.items()}
    write("rebuild-steps", {"kind": "rebuild-steps", "older": commit(older), "rows": rows})


def main(older: Path, cases: list[str]) -> None:
    sides = {"older": older, "this": ROOT}
    file = ROOT / "benchmarks/micro/results/rebuild.json"
    held = json.loads(file.read_text())["rows"] if file.exists() else {}
    seen: dict[str, dict[str, list[float]]] = {side: {} for side in sides}
    for turn in range(ROUNDS):
        for side in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            for case in cases:
                for name, value in run(sides[side], case).items():
                    seen[side].setdefault(name, []).append(value)
        write("rebuild", {"kind": "rebuild", "older": commit(older), "rows": held | rows(seen, turn + 1)})


def rows(seen: dict[str, dict[str, list[float]]], rounds: int) -> dict[str, Any]:
    """Return the rows of what was measured: both versions and their ratio, of the rounds so far."""
    found: dict[str, Any] = {}
    told = {"rounds": rounds, "commit": commit(ROOT), "seconds": "processor"}
    for name, new in seen["this"].items():
        old = seen["older"][name]
        ratios = summary([a / b for a, b in zip(old, new, strict=True)])
        found[name] = {"older": summary(old), "this": summary(new), "older over this": ratios, **told}
    if "factorize" in found:
        parts = {side: zip(table["all three"], table["factorize"], strict=True) for side, table in seen.items()}
        found["all three over factorize"] = {side: summary([a / b for a, b in pairs]) for side, pairs in parts.items()} | told
    return found


if __name__ == "__main__":
    cases = sys.argv[2:] or ["linear", "plan"]
    steps(Path(sys.argv[1]).resolve()) if "steps" in cases else main(Path(sys.argv[1]).resolve(), cases)
