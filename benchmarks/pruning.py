"""Prune the LeNet-5 of Caffe (430,500 weights) on MNIST: ADMM, one-shot and gradual magnitude pruning from one dense start, equal epochs.

OMP_NUM_THREADS=1 python benchmarks/pruning.py                                 # all rows; what is there is skipped
OMP_NUM_THREADS=1 python benchmarks/pruning.py --rates 85x --seeds 0 --methods admm,one-shot

A row is one file, ``benchmarks/results/pruning/METHOD-RATE-SEED.json``, written when it has finished and skipped as long as its settings
are the same; a stopped run goes on from its last epoch. The dense network of a seed is trained once, on all 60,000 images. Nothing is
chosen by a score: the test split is read once for each row, at its end.
"""

import argparse
import copy
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectrim as sp
from micro.harness import environment
from spectrim import zoo
from spectrim.files import write_text
from spectrim.projections import Levels, Structured, Then, TopK, entropy_bits
from spectrim.storage.pack import coded
from spectrim.training import ADMM, Gradual, Hold, OneShot
from spectrim.training.statefile import read_state

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "pruning"
RUNS = HERE.parent / "runs" / "pruning"
CARD = HERE.parent / "docs" / "methods" / "admm.md"
TRAINING = {"optimizer": "Adam", "peak": 1e-3, "batch_size": 128, "augment": "crops, padding 2", "images": 60_000}
DENSE = {"epochs": 24, "constant": 0.25}
"""The learning rate is constant for a share of the training, then falls to zero along a cosine."""


METHODS: dict[str, dict[str, Any]] = {
    "admm": {"epochs": 12, "constant": 7 / 12, "rounds": 14},
    "admm with a ramp": {"epochs": 12, "constant": 7 / 12, "rounds": 14, "ramp": 0.75},
    "admm longer": {"epochs": 24, "constant": 7 / 12, "rounds": 14},
    "one-shot": {"epochs": 12, "constant": 0.25},
    "gradual": {"epochs": 12, "constant": 7 / 12, "cuts": 42},
    "gradual taught": {"epochs": 12, "constant": 7 / 12, "cuts": 42, "teach": {"temperature": 4.0, "weight": 0.7}},
    "gradual taught longer": {"epochs": 24, "constant": 7 / 12, "cuts": 84, "teach": {"temperature": 4.0, "weight": 0.7}},
    "gradual taught mixed": {
        "epochs": 24,
        "constant": 7 / 12,
        "cuts": 84,
        "teach": {"temperature": 4.0, "weight": 0.7, "mix": 0.5},
        "peak": 2e-3,
    },
    "gradual taught narrow": {
        "narrow": {"rows": {"conv1": 12, "conv2": 32, "fc1": 100}, "epochs": 8, "constant": 0.6, "cuts": 30},
        "epochs": 24,
        "constant": 7 / 12,
        "cuts": 60,
        "teach": {"temperature": 4.0, "weight": 0.7},
    },
}
"""ADMM and the ramp of gradual pruning end, at the latest, where the learning rate begins to fall; one-shot pruning comes first. A round of
`admm longer` is one epoch. `narrow` prunes whole filters and neurons first, in epochs of its own: fewer places are left to point at."""

RATES = {
    "67x": {"conv1": 200, "conv2": 2600, "fc1": 3200, "fc2": 400},
    "85x": {"conv1": 100, "conv2": 1250, "fc1": 3360, "fc2": 350},
    "167x": {"conv1": 75, "conv2": 700, "fc1": 1600, "fc2": 195},
    "balanced-85x": {"conv1": 150, "conv2": 2000, "fc1": 2600, "fc2": 310},
    "balanced-167x": {"conv1": 110, "conv2": 1130, "fc1": 1140, "fc2": 190},
}
"""Weights kept of 500, 25,000, 400,000 and 5,000. Those of 85x and 167x are the papers'; `balanced` keeps more of the convolutions."""

LEVELS = {"conv*": Levels(3, zero=False), "fc*": Levels(2, zero=False)}
"""What the kept weights are rounded to in the end, without training."""


def course(method: str, counts: dict[str, int]) -> Any:
    """Return the course of a method."""
    knobs, projections = METHODS[method], {layer: TopK(count) for layer, count in counts.items()}
    if method.startswith("admm"):
        return ADMM(projections, rounds=knobs["rounds"], end=knobs["constant"], ramp=knobs.get("ramp", 0.0))
    if method.startswith("gradual"):
        return Gradual(projections, end=knobs["constant"], cuts=knobs["cuts"])
    return OneShot(projections)


def label(method: str, size: str) -> str:
    """Return the name of the files of a method at a rate."""
    return f"{method.replace(' ', '-')}-{size}"


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 1}


def sizes(model: nn.Module, rounded: bool) -> dict[str, Any]:
    """Return counts and bits of the weights: values, and positions by gaps and by the entropy of the mask."""
    found: dict[str, Any] = {"kept": {}, "data_bits": 0, "index_bits": 0, "index_entropy_bits": 0.0}
    for name, parameter in weights_of(model).items():
        projection = Then(TopK(1.0), LEVELS["conv*" if name.startswith("conv") else "fc*"]) if rounded else TopK(1.0)
        bits = projection.stored_bits(parameter.detach())
        found["kept"][name] = int(parameter.count_nonzero())
        found["data_bits"] += bits.data
        found["index_bits"] += bits.index
        found["index_entropy_bits"] += round(entropy_bits(parameter.detach() != 0), 1)
    return found | {"total_kept": sum(found["kept"].values())}


def rounded(model: nn.Module) -> nn.Module:
    """Return a copy whose kept weights are rounded to `LEVELS`."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for layer, parameter in weights_of(made).items():
            parameter.copy_(LEVELS["conv*" if layer.startswith("conv") else "fc*"](parameter.detach().clone()))
    return made


def measured(model: nn.Module, dense: nn.Module) -> dict[str, Any]:
    """Return the share of the kept weights that were among as many largest ones before, and the bytes of the rounded network's file."""
    shares = {}
    for (name, now), (_, before) in zip(weights_of(model).items(), weights_of(dense).items(), strict=True):
        largest = TopK(int(now.count_nonzero()))(before.detach()) != 0
        shares[name] = round(float(largest[now != 0].float().mean()), 4)
    _, file = coded(rounded(model))
    return {"kept_of_the_largest": shares, "file": {key: file.to_dict()[key] for key in ("coded_bytes", "data_bytes", "index_bytes")}}


def measure_again() -> None:
    """Add what `measured` finds to rows whose checkpoints are still there."""
    for path in sorted(RESULTS.glob("*x-*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        start = next(RESULTS.glob(f"dense-{row['settings']['seed']}.json"))
        models = []
        for stem, held in ((path.stem, row), (start.stem, json.loads(start.read_text(encoding="utf-8")))):
            model = zoo.caffe_lenet5()
            model.load_state_dict(read_state(RUNS / f"{stem}-{held['digest']}" / "checkpoint.pt", "run it again")["model"])
            models.append(model)
        log = row.pop("log")
        write_text(path, json.dumps(row | measured(*models) | {"log": log}, indent=1) + "\n")


@torch.no_grad()
def trimmed(model: Any) -> Any:
    """Return the same function without weights and biases that no output depends on.

    A feature that nothing reads goes; one without inputs is a constant, which the next bias takes up. No convolution is padded.
    """
    made = copy.deepcopy(model)
    layers, taps = [made.conv1, made.conv2, made.fc1, made.fc2], [25, 16, 1]
    for _ in layers:
        for layer, following, size in zip(layers, layers[1:], taps, strict=False):
            weight, bias = layer.weight.flatten(1), layer.bias
            outgoing = following.weight.reshape(len(following.weight), len(bias), size)
            unread, constant = (outgoing == 0).all(2).all(0), (weight == 0).all(1)
            gone = unread | constant
            following.bias += outgoing.sum(2) @ (bias.relu() * constant)
            layer.weight[gone], layer.bias[gone] = 0, 0
            outgoing = outgoing.masked_fill(gone[:, None], 0)
            following.weight.copy_(outgoing.reshape(following.weight.shape))
    return made


def pruned(method: str, size: str, seed: int, dense: nn.Module, data: Any) -> None:
    """Run one row unless it is there."""
    settings = {"method": method, "rate": size, "seed": seed, "counts": RATES[size], **TRAINING, **METHODS[method], "dense": DENSE}
    if is_written(RESULTS / f"{label(method, size)}-{seed}.json", settings):
        return
    torch.manual_seed(seed)
    model, name = copy.deepcopy(dense), f"{label(method, size)}-{seed}-{digest(settings)}"
    knobs = METHODS[method]
    lessons = [sp.Distillation(dense, **knobs["teach"])] if "teach" in knobs else []
    courses, peak, before = [course(method, RATES[size])], knobs.get("peak", TRAINING["peak"]), 0.0
    if "narrow" in knobs:
        first = knobs["narrow"]
        rows = {layer: Structured(count, along="rows") for layer, count in first["rows"].items()}
        narrowing = [Gradual(rows, end=first["constant"], cuts=first["cuts"])]
        _, before = train(model, data, f"{name}-narrow", first["epochs"], first["constant"], narrowing, lessons, peak)
        model, courses = trimmed(model), [Hold(), *courses]
    history, seconds = train(model, data, name, knobs["epochs"], knobs["constant"], courses, lessons, peak)
    small = rounded(model)
    found = {"plain": sizes(model, rounded=False), **measured(model, dense)}
    found["rounded"] = sizes(small, rounded=True) | {"test": sp.evaluate(small, data.test, nn.CrossEntropyLoss())}
    write_row(label(method, size), seed, settings, model, data, history, before + seconds, found)


def rate(constant: float) -> Callable[[float], float]:
    """Return the factor of the learning rate by the share of training that is done."""
    return lambda done: 1.0 if done < constant else 0.5 * (1 + math.cos(math.pi * min(1.0, (done - constant) / (1 - constant))))


def digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def train(
    model: nn.Module,
    data: Any,
    name: str,
    epochs: int,
    constant: float,
    courses: Any = (),
    lessons: Any = (),
    peak: float = TRAINING["peak"],
) -> tuple[Any, float]:
    """Train in place; return the history and the processor time in seconds of what was not resumed."""
    optimizer = torch.optim.Adam(model.parameters(), peak)
    factor, steps = rate(constant), epochs * len(data.train)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step / steps))
    tuning = sp.Tuning(scheduler=scheduler, scheduler_steps="batch")
    parts = {"tuning": tuning, "courses": courses, "lessons": lessons, "checkpoint": RUNS / name}
    start = time.process_time()
    history = sp.fit(model, data.train, nn.CrossEntropyLoss(), optimizer, epochs, progress=False, callbacks=[say(name)], **parts)
    return history, time.process_time() - start


def say(name: str) -> Callable[[int, dict[str, float], nn.Module], None]:
    """Return a callback that prints the line of each epoch."""

    def printed(epoch: int, line: dict[str, float], model: nn.Module) -> None:
        print(name, epoch, {key: round(value, 5) for key, value in line.items()}, flush=True)

    return printed


def dense_start(seed: int) -> tuple[nn.Module, Any]:
    """Return the dense network of a seed, trained now unless it was before, and its data."""
    torch.manual_seed(seed)
    model = zoo.caffe_lenet5().to(memory_format=torch.channels_last)
    data = zoo.mnist(batch_size=TRAINING["batch_size"], val=0, augment=True, seed=seed)
    settings = {"method": "dense", "seed": seed, **TRAINING, **DENSE}
    history, seconds = train(model, data, f"dense-{seed}-{digest(settings)}", **DENSE)
    write_row("dense", seed, settings, model, data, history, seconds, {})
    return model, data


def write_row(
    label: str, seed: int, settings: dict[str, Any], model: nn.Module, data: Any, history: Any, seconds: float, found: Any
) -> None:
    """Write the row of a finished run unless it is there."""
    path = RESULTS / f"{label}-{seed}.json"
    if is_written(path, settings):
        return
    score = sp.evaluate(model, data.test, nn.CrossEntropyLoss())
    row = {"settings": settings, "digest": digest(settings), "test": score, "cpu_seconds": round(seconds, 1), **found}
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"environment": environment(), **row, "log": history.epochs}, indent=1) + "\n")
    print(path.name, score, flush=True)


def is_written(path: Path, settings: dict[str, Any]) -> bool:
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["digest"] == digest(settings)


def rows(size: str, method: str) -> list[dict[str, Any]]:
    """Return the rows of one method that are there, by seed."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(f"{label(method, size)}-*.json"))]


def mean(values: list[float], digits: int = 2) -> str:
    """Return mean and sample standard deviation, the latter of two values or more."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def table() -> str:
    """Return the table of all rows that are there."""
    dense = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("dense-*.json"))]
    seeds = ", ".join(str(row["settings"]["seed"]) for row in dense)
    heads = ["kept", "method", "seeds", "accuracy", "to 3 and 2 bits, untrained", "values, 32 bits", "values, 3 and 2 bits"]
    heads += ["positions, gaps", "positions, entropy", "coded file", "kept of the largest, fc1"]
    lines = [
        "LeNet-5 of Caffe (430,500 weights), MNIST, 60,000 training images; test accuracy in %, mean ± sample standard deviation. Dense: "
        f"{mean([score(row) for row in dense])} (seeds {seeds}; {DENSE['epochs']} epochs).",
        f"{METHODS['gradual']['epochs']} epochs for each method, {METHODS['gradual taught longer']['epochs']} for `longer`, `mixed` and "
        f"`narrow`, the last with {METHODS['gradual taught narrow']['narrow']['epochs']} before, in which whole filters and neurons go; "
        "from the same dense network, Adam. The file is that of the rounded network "
        "by `pack`, with its 580 biases in float32; last column: the share of the weights kept in fc1 that were among as many largest "
        "ones of the dense network.",
        "",
        f"| {' | '.join(heads)} |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size, counts in RATES.items():
        for method in METHODS:
            if found := rows(size, method):
                plain, levels = [row["plain"] for row in found], [row["rounded"] for row in found]
                cells = [
                    f"{sum(counts.values()):,} ({size})",
                    method,
                    ", ".join(str(row["settings"]["seed"]) for row in found),
                    mean([score(row) for row in found]),
                    mean([100 * part["test"]["accuracy"] for part in levels]),
                    *(f"{statistics.fmean(part[key] for part in parts) / 8:,.0f} B" for parts, key in columns(plain, levels)),
                    f"{statistics.fmean(row['file']['coded_bytes'] for row in found):,.0f} B",
                    f"{statistics.fmean(100 * row['kept_of_the_largest']['fc1.weight'] for row in found):.0f} %",
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def columns(plain: list[Any], levels: list[Any]) -> list[tuple[list[Any], str]]:
    """Return what the columns of bytes show."""
    return [(plain, "data_bits"), (levels, "data_bits"), (plain, "index_bits"), (plain, "index_entropy_bits")]


def score(row: dict[str, Any]) -> float:
    return 100 * float(row["test"]["accuracy"])


def render(text: str) -> str:
    """Return a card with today's table."""
    before, _, rest = text.partition("<!-- results -->")
    return f"{before}<!-- results -->\n\n{table()}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


def main() -> None:
    """Run what is asked for and not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rates", default=",".join(RATES))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--render", action="store_true", help="write the table into the method card, run nothing")
    parser.add_argument("--measure", action="store_true", help="add to the rows what their checkpoints say today, train nothing")
    given = parser.parse_args()
    if given.measure:
        measure_again()
        return
    if given.render:
        CARD.write_text(render(CARD.read_text(encoding="utf-8")), encoding="utf-8")
        return
    torch.set_num_threads(1)
    for seed in map(int, given.seeds.split(",")):
        dense, data = dense_start(seed)
        for size in given.rates.split(","):
            for method in given.methods.split(","):
                pruned(method, size, seed, dense, data)


if __name__ == "__main__":
    main()
