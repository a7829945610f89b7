"""What an older version of the library costs beside this one: ``python benchmarks/micro/rebuild.py FOLDER``.

FOLDER is a checkout of the older version (``git worktree add FOLDER COMMIT``). Both run the same work in processes that take turns, on one
thread each; ratios are of seconds in the same round. Peak memory is what the process holds beyond the model and its factors.
"""

import json
import os
import subprocess
import sys
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
    start = time.perf_counter()
    made = work()
    found[name] = time.perf_counter() - start
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
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(500)))
    timed("plan of 500 layers", lambda: sp.plan(model, torch.randn(4, 16), budgets=[0.7, 0.5, 0.35], where=everything))
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


def main() -> None:
    older = Path(sys.argv[1]).resolve()
    sides, cases = {"older": older, "this": ROOT}, ("linear", "plan")
    seen: dict[str, dict[str, list[float]]] = {side: {} for side in sides}
    for turn in range(ROUNDS):
        for side in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            for case in cases:
                for name, value in run(sides[side], case).items():
                    seen[side].setdefault(name, []).append(value)
    rows: dict[str, Any] = {}
    for name in seen["this"]:
        old, new = seen["older"][name], seen["this"][name]
        rows[name] = {
            "older": summary(old),
            "this": summary(new),
            "older over this": summary([a / b for a, b in zip(old, new, strict=True)]),
        }
    rows["all three over factorize"] = {
        side: summary([a / b for a, b in zip(seen[side]["all three"], seen[side]["factorize"], strict=True)]) for side in sides
    }
    write("rebuild", {"kind": "rebuild", "older": commit(older), "rounds": ROUNDS, "rows": rows})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
