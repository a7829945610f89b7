"""How cost grows with width, depth and rank, for one kind of layer at a time: ``python benchmarks/micro/growth.py [training|factorize]``.

The page draws what multiply-accumulates alone would give beside it.
"""

import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import spectrim as sp
from harness import in_turns, ratios, write
from step import always, layer_by_layer, step_of

FRACTIONS = (1.0, 0.5, 0.25, 0.125)
ROWS, SIDE, BATCH = 1024, 16, 8
EVERYTHING = sp.match("*")


def linear(width: int, depth: int = 1) -> tuple[nn.Module, torch.Tensor]:
    """Return a stack of square layers and its input."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))), torch.randn(ROWS, width)


def conv(width: int, depth: int = 1) -> tuple[nn.Module, torch.Tensor]:
    layers = nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth)))
    return layers, torch.randn(BATCH, width, SIDE, SIDE).contiguous(memory_format=torch.channels_last)


def random_factors(dense: nn.Module, rank: int) -> nn.Module:
    """Factorize without a decomposition: what a step costs does not depend on the values."""
    low = sp.factorize(copy.deepcopy(dense).to("meta"), "channel", EVERYTHING, rank=rank).to_empty(device="cpu")
    for parameter in low.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return low


def training() -> None:
    rows: list[dict[str, Any]] = []
    cases: list[tuple[str, Callable[..., Any], int, int]] = [("linear", linear, width, 1) for width in (64, 256, 1024, 4096)]
    cases += [("conv 3x3, channel", conv, width, 1) for width in (64, 128, 256, 512)]
    cases += [("linear", linear, 256, depth) for depth in (4, 16)]
    for kind, make, width, depth in cases:
        torch.manual_seed(0)
        dense, x = make(width, depth)
        steps = {"dense": step_of(dense, x, [])}
        for fraction in FRACTIONS:
            rank = round(fraction * width)
            low = random_factors(dense, rank)
            steps[f"auto {fraction}"] = step_of(low, x, [sp.Orthogonality(1.0), sp.Hoyer(0.01)])
            steps[f"factored {fraction}"] = step_of(always(low, False), x, [layer_by_layer])
        table = ratios(in_turns(steps, rounds=5, min_time=0.05), "dense")
        rows.append({"kind": kind, "width": width, "depth": depth, "ratios": table})
        print(kind, width, depth, {key: round(entry["median"], 3) for key, entry in table.items()}, flush=True)
    write("growth-training", {"kind": "growth", "rows": ROWS, "positions": BATCH * SIDE * SIDE, "points": rows})


def factorize() -> None:
    points = []
    for width in (64, 256, 1024, 2048):
        torch.manual_seed(0)
        dense, entry = nn.Sequential(nn.Linear(width, width)), {"width": width}
        for method in ("exact", "randomized"):
            times = []
            for _ in range(3 if width <= 1024 else 1):
                start = time.perf_counter()
                sp.factorize(dense, where=EVERYTHING, rank=max(4, width // 16), method=method)
                times.append(time.perf_counter() - start)
            entry[method] = sorted(times)[len(times) // 2]
        points.append(entry)
        print(entry, flush=True)
    write("growth-factorize", {"kind": "factorize", "rank": "width / 16", "points": points})


if __name__ == "__main__":
    for part in (training, factorize):
        if len(sys.argv) < 2 or part.__name__ in sys.argv[1:]:
            part()
