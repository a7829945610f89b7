"""The smallest file of LeNet-5: what `pruning.py` pruned, without what no output depends on, trained on 3 and 2 bits, coded.

OMP_NUM_THREADS=1 python benchmarks/pruning_levels.py --rates 85x --methods gradual --seeds 0,1,2

Each row is a file in ``benchmarks/results/pruning_levels``; those that are there are skipped. The pruned network is trained first where
``runs/pruning`` lacks it. The test split is read once for each row, at its end; the settings of ``fewer`` came after the score of the first
row was known, those of ``middle`` after both, those of ``mixed`` after all of them, those of ``bytes`` after these.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pruning
import spectrim as sp
from micro.harness import environment
from spectrim import zoo
from spectrim.budget.rounding.round_to import round_to
from spectrim.budget.rounding.vectors import round_vectors
from spectrim.files import write_text
from spectrim.metrics.inputs import first_examples
from spectrim.projections import LevelTable, Then, TopK
from spectrim.storage.pack import pack, unpack
from spectrim.training import Hold, StraightThrough
from spectrim.training.statefile import read_state

RESULTS = Path(__file__).resolve().parent / "results" / "pruning_levels"
TAUGHT = {"temperature": 4.0, "weight": 0.7}
LEVELS: dict[str, dict[str, Any]] = {
    "": {"epochs": 2, "peak": 3e-4, "constant": 0.25, "end": 0.9, "teach": TAUGHT, "bias_levels": 127},
    "fewer": {"epochs": 4, "peak": 1e-3, "constant": 0.25, "end": 0.9, "teach": TAUGHT, "bias_levels": 31, "keep": 0.85},
    "middle": {"epochs": 8, "peak": 1e-3, "constant": 0.25, "end": 0.9, "teach": TAUGHT, "bias_levels": 31, "keep": 0.93},
    "mixed": {
        "epochs": 12,
        "peak": 1e-3,
        "constant": 0.25,
        "end": 0.9,
        "teach": TAUGHT | {"mix": 0.5},
        "bias_levels": 31,
        "keep": 0.93,
    },
    "bytes": {
        "bytes": 5_640,
        "examples": 8_192,
        "epochs": 8,
        "peak": 1e-3,
        "constant": 0.25,
        "end": 0.9,
        "teach": TAUGHT,
        "bias_levels": 31,
    },
}
"""Bits are those of `pruning.LEVELS`; `end` is when levels are final and biases alone are trained. `keep` is the share of each layer's
weights that stays at all; it came after the score of the first row, which had 280x, was known. `bytes` has its levels from `round_to`,
which was given that many bytes and examples."""


def tables(model: nn.Module, steps: Mapping[str, float]) -> dict[str, Then]:
    """Return the levels of each weight, fixed: multiples of a given step, else those of the best step for the weights as they are."""
    made = {}
    for name, parameter in pruning.weights_of(model).items():
        if step := steps.get(name.removesuffix(".weight")):
            most = round(float(parameter.detach().abs().max()) / step)
            made[name] = Then(TopK(1.0), LevelTable(tuple(place * step for place in range(-most, most + 1) if place)))
            continue
        levels = pruning.LEVELS["conv*" if name.startswith("conv") else "fc*"].table(parameter.detach())
        made[name] = Then(TopK(1.0), LevelTable(levels.values))
    return made


@torch.no_grad()
def keep_largest(model: nn.Module, share: float) -> None:
    for parameter in pruning.weights_of(model).values():
        parameter.copy_(TopK(round(share * int(parameter.count_nonzero())))(parameter.detach()))


def pruned_network(method: str, size: str, seed: int, dense: nn.Module, data: Any) -> tuple[Any, dict[str, Any]]:
    """Return a network of `pruning.py`, trained now or before, and its row."""
    pruning.pruned(method, size, seed, dense, data)
    stem = f"{pruning.label(method, size)}-{seed}"
    row = json.loads((pruning.RESULTS / f"{stem}.json").read_text(encoding="utf-8"))
    model = zoo.caffe_lenet5().to(memory_format=torch.channels_last)
    model.load_state_dict(read_state(pruning.RUNS / f"{stem}-{row['digest']}" / "checkpoint.pt", "run pruning.py again")["model"])
    return model, row


def counts(model: nn.Module) -> dict[str, int]:
    return {name: int(parameter.count_nonzero()) for name, parameter in model.named_parameters()}


def difference(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((one(x) - other(x)).abs().max())


def file_row(method: str, size: str, variant: str, seed: int) -> None:
    """Run one row unless it is there."""
    knobs = LEVELS[variant]
    path = RESULTS / f"{pruning.label(method, size)}{'-' if variant else ''}{variant}-{seed}.json"
    settings = {"method": method, "rate": size, "seed": seed, **knobs}
    if pruning.is_written(path, settings):
        return
    dense, data = pruning.dense_start(seed)
    pruned, row = pruned_network(method, size, seed, dense, data)
    model = pruning.trimmed(pruned)
    changed = difference(model, pruned, next(iter(data.train))[0])
    if "keep" in knobs:
        keep_largest(model, knobs["keep"])
        model = pruning.trimmed(model)
    steps: Mapping[str, float] = {}
    if "bytes" in knobs:
        plain = zoo.mnist(batch_size=256, val=0, augment=False, seed=seed).train
        made = round_to(model.eval(), first_examples(plain, knobs["examples"]), knobs["bytes"], examples=knobs["examples"], progress=False)
        model, steps = made.model.to(memory_format=torch.channels_last), made.steps
    kept = counts(model)
    lessons = [sp.Distillation(dense, **knobs["teach"])]
    courses = [Hold(), StraightThrough(tables(model, steps), end=knobs["end"])]
    name = f"levels-{path.stem}-{pruning.digest(settings | {'start': row['digest']})}"
    history, seconds = pruning.train(model, data, name, knobs["epochs"], knobs["constant"], courses, lessons, knobs["peak"])
    model = round_vectors(model, biases=knobs["bias_levels"])
    packed = pack(model, pruning.RUNS / f"{path.stem}.spz")
    back = unpack(packed.path)
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
    found = {
        "start": row["digest"],
        "trimmed_changed": changed,
        "kept": kept,
        "distinct": {name: len(parameter.unique()) for name, parameter in model.named_parameters()},
        "dense": json.loads((pruning.RESULTS / f"dense-{seed}.json").read_text(encoding="utf-8"))["test"],
        "pruned": row["test"],
        "test": sp.evaluate(model, data.test, nn.CrossEntropyLoss()),
        "file": {key: packed.to_dict()[key] for key in ("coded_bytes", "data_bytes", "index_bytes")},
        "fp32_bytes": sum(parameter.nbytes for parameter in dense.parameters()),
        "cpu_seconds": round(seconds, 1),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    written = {"environment": environment(), "settings": settings, "digest": pruning.digest(settings), **found, "log": history.epochs}
    write_text(path, json.dumps(written, indent=1) + "\n")
    print(path.name, found["test"], found["file"], f"{found['fp32_bytes'] / packed.coded_bytes:.0f}x", flush=True)


def main() -> None:
    """Run what is asked for and not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rates", default="85x")
    parser.add_argument("--methods", default="gradual")
    parser.add_argument("--variants", default=",".join(LEVELS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    for seed in map(int, given.seeds.split(",")):
        for size in given.rates.split(","):
            for method in given.methods.split(","):
                for variant in given.variants.split(","):
                    file_row(method, size, variant, seed)


if __name__ == "__main__":
    main()
