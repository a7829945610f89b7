"""Layers at equal cost by the clock: ``python benchmarks/micro/interpolative.py``. One thread; the dense layer is the unit.

``pair`` has the rank that its cost allows, the others the higher one of ``r (m + n - r)``. ``end``: a window at the start, two pieces;
``middle``: three; ``gather``: free pivots. Weights are random: the time does not depend on them. All variants of a layer run in turns.
"""

import logging
import math
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from harness import in_turns, ratios, write
from latency import onnx_step, torch_step
from spectrim.plain.chain import PlainPair
from spectrim.plain.interpolative import PlainColumns, PlainRows

KEPT = (0.5, 0.75)
LINEAR = [(256, 1), (256, 128), (768, 1), (768, 128)]
CONVOLUTION = [(64, 32), (128, 16)]


def ranks(out: int, in_: int, kept: float) -> tuple[int, int]:
    """Return the largest ranks of the pair and of the interpolative writing at a fraction of the dense cost."""
    most, total = kept * out * in_, out + in_
    return math.floor(most / total), math.floor((total - math.sqrt(total**2 - 4 * most)) / 2)


def places(size: int, rank: int) -> dict[str, dict[str, Any]]:
    return {"end": {"start": 0}, "middle": {"start": (size - rank) // 2}, "gather": {"order": torch.randperm(size)}}


def linear(width: int, kept: float) -> dict[str, nn.Module]:
    pair, rank = ranks(width, width, kept)
    made: dict[str, nn.Module] = {"dense": nn.Linear(width, width)}
    made["pair"] = PlainPair(nn.Linear(width, pair, bias=False), nn.Linear(pair, width))
    for place, given in places(width, rank).items():
        made[f"rows, {place}"] = PlainRows(nn.Linear(width, rank), nn.Linear(rank, width - rank), **given)
        made[f"columns, {place}"] = PlainColumns(nn.Linear(rank, width), nn.Linear(width - rank, rank, bias=False), **given)
    return made


def convolution(width: int, kept: float) -> dict[str, nn.Module]:
    pair, rank = ranks(width, 9 * width, kept)
    made: dict[str, nn.Module] = {"dense": nn.Conv2d(width, width, 3, padding=1)}
    made["pair"] = PlainPair(nn.Conv2d(width, pair, 3, padding=1, bias=False), nn.Conv2d(pair, width, 1))
    for place, given in places(width, rank).items():
        made[f"rows, {place}"] = PlainRows(nn.Conv2d(width, rank, 3, padding=1), nn.Conv2d(rank, width - rank, 1), **given)
    return made


def point(name: str, made: dict[str, nn.Module], x: Tensor, kept: float) -> dict[str, Any]:
    dense = made["dense"].weight.numel()  # type: ignore[operator]
    parts = {key: sum(p.numel() for p in layer.parameters() if p.dim() > 1) / dense for key, layer in made.items()}
    entry: dict[str, Any] = {"layer": name, "kept": kept, "params": parts}
    for backend in ("eager", "onnx"):
        steps = {key: onnx_step(m.eval(), x) if backend == "onnx" else torch_step(m.eval(), x, False) for key, m in made.items()}
        entry[backend] = ratios(in_turns(steps, rounds=9, min_time=0.05), "dense", speedup=True)
        print(f"{name:22} {kept} {backend:6}", {key: round(row["median"], 2) for key, row in entry[backend].items()}, flush=True)
    return entry


def main() -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    points = []
    for kept in KEPT:
        points += [point(f"linear {width}, {rows} rows", linear(width, kept), torch.randn(rows, width), kept) for width, rows in LINEAR]
        for width, size in CONVOLUTION:
            points.append(point(f"conv 3x3, {width} at {size}", convolution(width, kept), torch.randn(1, width, size, size), kept))
    write(sys.argv[1] if sys.argv[1:] else "interpolative", {"kind": "interpolative", "load": os.getloadavg(), "points": points})


if __name__ == "__main__":
    main()
