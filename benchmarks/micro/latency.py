"""Whole networks at half the multiply-accumulates by the clock: ``python benchmarks/micro/latency.py [NETWORK ...]``.

Batch 1, one thread. ``macs``: ranks and forms by multiply-accumulates alone; ``timed``: by the latency table of ONNX Runtime on this
machine. Both under the same budget, or, where the layers that are faster as pairs cannot reach it, under the smallest one that they can.
All variants of a network run in turns. Outputs are compared before anything is timed.
"""

import logging
import sys
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as sp
from harness import Step, in_turns, ratios, session_of, write
from networks import INFERENCE, Case
from spectrim.errors import SettingError
from spectrim.metrics.macs import count_macs

BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def onnx_step(model: nn.Module, x: Tensor) -> Step:
    session = session_of(model, (x,))
    feed = {session.get_inputs()[0].name: x.numpy()}
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), model(x), rtol=1e-3, atol=1e-3)  # another library's sums
    return lambda: session.run(None, feed)


def torch_step(model: nn.Module, x: Tensor, compiled: bool) -> Step:
    run = torch.compile(model) if compiled else model

    def step() -> Any:
        with torch.no_grad():
            return run(x)

    step()
    return step


def cut(low: nn.Module, x: Tensor, latency: Any) -> tuple[nn.Module, float]:
    """Return the merged network under the first budget that can be met, and that budget."""
    for budget in BUDGETS:
        try:
            ranks = sp.allocate(low, sp.Budget(macs=budget), x, latency=latency)
        except SettingError:
            continue
        return sp.merge(sp.prune(low, ranks), latency=latency).eval(), budget
    raise AssertionError("a budget of everything can always be met")


def measure(name: str, case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    dense, x = case.make().eval(), case.inputs(1)
    low = sp.factorize(dense, case.scheme)
    table = sp.latency_table(low, x, backend="onnx", threads=1)
    networks = {"dense": (dense, 1.0), "macs": cut(low, x, None), "timed": cut(low, x, table)}
    macs = {key: count_macs(model, x) for key, (model, _) in networks.items()}
    entry: dict[str, Any] = {"network": name, "budgets": {key: budget for key, (_, budget) in networks.items()}}
    entry["mac_reduction"] = {key: macs["dense"] / value for key, value in macs.items()}
    for backend in ("onnx", "eager", "compiled"):
        steps = {}
        for key, (model, _) in networks.items():
            steps[key] = onnx_step(model, x) if backend == "onnx" else torch_step(model, x, backend == "compiled")
        entry[backend] = ratios(in_turns(steps, rounds=9, min_time=0.1), "dense", speedup=True)
        print(
            f"{name:24} {backend:9}",
            {key: (round(macs["dense"] / macs[key], 2), round(row["median"], 2)) for key, row in entry[backend].items()},
            flush=True,
        )
    return entry


def main(names: list[str]) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    write("latency", {"kind": "latency", "points": [measure(name, case) for name, case in INFERENCE.items() if not names or name in names]})


if __name__ == "__main__":
    main(sys.argv[1:])
