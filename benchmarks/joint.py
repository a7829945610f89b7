"""Rank, zeros and step of each weight by one knapsack, beside each alone, at equal coded bytes: ``python benchmarks/joint.py [--render]``.

ResNet-8 with its published weights, without training and without labels. Rows are written to ``benchmarks/results/joint/resnet8.json``
one by one; those that are there are skipped. The divergence is on held-out training images, the accuracy on all test images, which are
read once for each row.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import coded
import spectrim as sp
from cells import put
from run import git_state
from spectrim.budget.rounding.attempts import Search
from spectrim.budget.rounding.pairs import with_pairs
from spectrim.budget.rounding.round_to import round_to
from spectrim.files import make_folder, write_json
from spectrim.metrics.macs import count_macs
from spectrim.pipeline.environment import environment
from spectrim.storage.pack import coded as coded_size
from spectrim.surgery.constrain import constrain
from spectrim.surgery.exchange import duplicate
from spectrim.surgery.observing import isolated

ROOT = Path(__file__).resolve().parents[1]
RESULT, CARD = ROOT / "benchmarks" / "results" / "joint" / "resnet8.json", ROOT / "docs" / "methods" / "rounding.md"
BEGIN, END = "<!-- joint: written by benchmarks/joint.py --render -->", "<!-- joint: end -->"
MACS = 0.6
Made = tuple[nn.Module, dict[str, Any]]


def inputs(seed: int) -> list[torch.Tensor]:
    return [x for x, _ in coded.known(seed)]


def steps_alone(limit: int, seed: int) -> Made:
    return round_to(coded.dense(), inputs(seed), limit, progress=False).model, {}


def together(limit: int, seed: int, budget: sp.Budget, *, low_rank: bool = True, sparse: bool = True) -> Made:
    """Take what the knapsack chooses, whether the outputs on the calibration set change less so or not."""
    network = duplicate(coded.folded()).eval()
    with isolated(network):
        search = Search(network, inputs(seed), True, False)
        options = search.together(limit, budget, sparse=sparse, low_rank=low_rank)
        pairs = {name: option for name, option in options.items() if option.rank is not None}
        keeps = {name: option.keep for name, option in options.items() if option.keep < 1}
        cut, counterparts = with_pairs(network, pairs) if pairs else (network, {})
        with isolated(cut):
            again = Search(cut, inputs(seed), True, False, (search, counterparts) if pairs else None)
            again.keep_(keeps)
            made = again.within(limit).model
    return made, {"ranks": {name: option.rank for name, option in pairs.items()}, "keeps": keeps}


def zeros_alone(limit: int) -> Made:
    """Keep the same share of the largest entries of each weight, in 8 bits: the largest share whose file meets the bytes."""
    low = sp.factorize(coded.folded(), "dense", where="*")
    least, most, found, share = 0.001, 1.0, coded.folded(), 1.0
    for _ in range(8):
        middle = (least * most) ** 0.5
        made = sp.merge(constrain(low, keep=middle, bits=8))
        least, most = (middle, most) if len(coded_size(made)[0]) <= limit else (least, middle)
        if least == middle:
            found, share = made, middle
    return found, {"share": share}


def ranks_first(limit: int, seed: int) -> Made:
    """Cut to the multiply-accumulates, with all ways of `compress`, and round the cut network last."""
    made = sp.compress(coded.dense(), coded.known(seed), nn.CrossEntropyLoss(), sp.Budget(macs=MACS), progress=False)
    return round_to(made.model.eval(), inputs(seed), limit, progress=False).model, {}


def rows() -> dict[str, Callable[[], Made]]:
    """Return how each row is made, by its name."""
    made: dict[str, Callable[[], Made]] = {}
    for seed in (0, 1, 2):
        for limit in (14_000, 24_000, 9_000):
            made[f"steps {limit} seed {seed}"] = lambda limit=limit, seed=seed: steps_alone(limit, seed)
            made[f"joint {limit} seed {seed}"] = lambda limit=limit, seed=seed: together(limit, seed, sp.Budget(coded_bytes=limit))
            if limit == 9_000:
                continue
            under = sp.Budget(coded_bytes=limit, macs=MACS)
            made[f"macs joint {limit} seed {seed}"] = lambda limit=limit, seed=seed, under=under: together(limit, seed, under)
            made[f"macs first {limit} seed {seed}"] = lambda limit=limit, seed=seed: ranks_first(limit, seed)
        if seed == 0:
            for limit in (14_000, 24_000):
                made[f"zeros {limit} seed 0"] = lambda limit=limit: zeros_alone(limit)
                made[f"ranks {limit} seed 0"] = lambda limit=limit: coded.rank_alone(0, limit)
    return made


def run(part: str) -> None:
    """Make the rows that are missing and have a part of a name."""
    coded.NETWORK[0] = "resnet8"
    make_folder(RESULT.parent)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}}
    for name, make in rows().items():
        if name in result["rows"] or part not in name:
            continue
        began = time.process_time()
        model, more = make()
        seconds = time.process_time() - began
        with tempfile.TemporaryDirectory() as folder:
            row = coded.sizes(model, Path(folder)) | coded.judged(model) | {"seconds": seconds} | more
        image = torch.zeros(1, *inputs(0)[0].shape[1:])
        row |= {"macs": count_macs(model, image) / count_macs(coded.dense(), image), "git": git_state()}
        result = {"rows": result["rows"] | {name: row}, "environment": environment(), "examples": 1024, "macs": MACS}
        write_json(RESULT, result)
        print(name, {key: row[key] for key in ("bytes", "kl", "accuracy", "seconds")}, more, flush=True)


NOTES = {
    "steps": "steps alone: `round_to`",
    "zeros": "zeros alone, one share for all weights, 8-bit levels",
    "ranks": "ranks alone, 8-bit levels",
    "joint": "ranks, zeros and steps by one knapsack",
    "macs first": "ranks for 0.6 of the operations first, then steps",
    "macs joint": "the same by one knapsack under both limits",
}


def page() -> list[str]:
    """Return the lines of the table, and of what was chosen."""
    result = json.loads(RESULT.read_text())
    lines = [
        "| method | calibration draw | bytes | operations | divergence | test accuracy | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    kinds = sorted(NOTES, key=len, reverse=True)

    def kind(name: str) -> str:
        return next(one for one in kinds if name.startswith(one))

    def place(item: tuple[str, Any]) -> tuple[int, int, str]:
        *_, limit, _, seed = item[0].split()
        return list(NOTES).index(kind(item[0])), -int(limit), seed

    for name, row in sorted(result["rows"].items(), key=place):
        shown = f"{row['bytes']:,} | {row['macs']:.2f} | {row['kl']:.4f} | {row['accuracy']:.2f} | {row['seconds']:.0f}"
        lines.append(f"| {NOTES[kind(name)]} | {name[-1]} | {shown} |")
    lines += ["", "What the knapsack chose beside steps:", ""]
    for name, row in result["rows"].items():
        if "ranks" in row:
            ranks = [f"{layer} in rank {rank}" for layer, rank in row["ranks"].items()]
            keeps = [f"{layer} keeps {share:.0%}" for layer, share in row["keeps"].items()]
            lines.append(f"- `{name}`: {', '.join(ranks + keeps) or 'nothing'}.")
    return lines


def render() -> None:
    put(CARD, BEGIN, END, "\n".join(["", *page(), ""]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="", help="a part of the names of the rows to make")
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if not asked.render:
        run(asked.rows)
    render()
