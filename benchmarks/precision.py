"""Training in few bits, simulated: learned, cyclic and static precision beside float, at a given share of the cost of static 8 bits.

OMP_NUM_THREADS=1 python benchmarks/precision.py lenet5                # all rows and seeds; what is there is skipped
OMP_NUM_THREADS=1 python benchmarks/precision.py resnet8 --seeds 0 --methods static-8,learned
OMP_NUM_THREADS=1 python benchmarks/precision.py resnet8 --full        # every image, and more epochs: hours on one core
python benchmarks/precision.py --render                                # the table of the card and the plot of the bits

A row is one file, ``benchmarks/results/precision/NETWORK-METHOD-SEED.json``. Settings were chosen on the validation split of another seed;
the test split is read once for each row: in float, in the bits of the last step, and by ONNX Runtime in int8.
"""

import argparse
import hashlib
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectrim as sp
from micro.harness import environment
from spectrim import zoo
from spectrim.errors import ExportError
from spectrim.files import write_text
from spectrim.runtimes.int8 import Int8
from spectrim.training import CyclicPrecision, LearnedPrecision, StaticPrecision, bits_of, float_in_int8, rounding

HERE = Path(__file__).resolve().parent
RESULTS, DOCS = HERE / "results" / "precision", HERE.parent / "docs"
CARD, PLOT = DOCS / "methods" / "learned-precision.md", DOCS / "plots" / "learned-precision.svg"

NETWORKS: dict[str, dict[str, Any]] = {
    "lenet5": {"title": "LeNet-5, Fashion-MNIST, from random weights", "epochs": 10, "images": 20_000, "batch": 128, "rate": 1e-3},
    "resnet8": {"title": "ResNet-8, CIFAR-10, from published weights", "epochs": 3, "images": 10_000, "batch": 128, "rate": 5e-4},
}
FULL: dict[str, dict[str, Any]] = {"lenet5": {"epochs": 24, "images": 55_000}, "resnet8": {"epochs": 40, "images": 45_000}}
METHODS: dict[str, dict[str, Any]] = {
    "float": {},
    "static-8": {"bits": 8},
    "static-5": {"bits": 5},
    "static-4": {"bits": 4},
    "cyclic": {},
    "learned": {"cost": 0.6},
    "learned-0.4": {"cost": 0.4},
    "learned-rising": {"cost": 0.6, "rise": 0.5},
    "learned-factors": {"cost": 0.6, "macs": 0.5},
}
"""The last one trains factors, and cuts their ranks to half of the multiply-accumulates in the first half of the training."""


def course_of(method: str) -> list[Any]:
    """Return the courses of a method."""
    knobs = METHODS[method]
    if method.startswith("learned"):
        cuts = [sp.Ramp(sp.Budget(macs=knobs["macs"]), end=0.5, cuts=4)] if "macs" in knobs else []
        return [*cuts, LearnedPrecision(knobs["cost"], rise=knobs.get("rise", 0.0))]
    if method.startswith("static"):
        return [StaticPrecision(**knobs)]
    return [CyclicPrecision(**knobs)] if method == "cyclic" else []


def settings_of(network: str, method: str, seed: int, full: bool) -> dict[str, Any]:
    """Return everything that a row depends on."""
    run = NETWORKS[network] | (FULL[network] if full else {})
    defaults = {course.__class__.__name__: repr(course) for course in course_of(method)}
    defaults = {name: text.replace(", settle=0.0", "") for name, text in defaults.items()}
    if "macs" not in METHODS[method]:  # nothing is cut, and it has no effect
        defaults = {name: text.replace(", most_after_cuts=16", "") for name, text in defaults.items()}
    return {"network": network, "method": method, "seed": seed, "full": full, **run, "knobs": METHODS[method], "courses": defaults}


def digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def task(settings: dict[str, Any]) -> tuple[nn.Module, zoo.data.Splits]:
    """Return the network at its start, and its data."""
    torch.manual_seed(settings["seed"])
    size = {"batch_size": settings["batch"], "seed": settings["seed"]}
    if settings["network"] == "lenet5":
        return zoo.lenet5(), zoo.fashion_mnist(**size, limit=settings["images"] + 5000)
    data = zoo.cifar10(**size, normalize="raw", augment=True, limit=settings["images"] + 5000)
    return zoo.mlperftiny_resnet8(pretrained=not settings["full"]), data


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Train once, and score what came out."""
    model, data = task(settings)
    loss = nn.CrossEntropyLoss()
    if "macs" in settings["knobs"]:
        model = sp.factorize(model)
    optimizer = torch.optim.Adam(model.parameters(), settings["rate"])
    steps = settings["epochs"] * len(data.train)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))
    tuning = sp.Tuning(scheduler=cosine, scheduler_steps="batch")
    penalties = [sp.Orthogonality(1.0)] if "macs" in settings["knobs"] else []
    start = time.process_time()
    courses = course_of(settings["method"])
    parts = {"tuning": tuning, "penalties": penalties, "courses": courses, "eval_data": data.val, "progress": False}
    history = sp.fit(model, data.train, loss, optimizer, settings["epochs"], callbacks=[say], **parts)
    seconds, bits = time.process_time() - start, bits_of(history.last)
    found = {"cpu_seconds": round(seconds, 1), "val": {"float": sp.evaluate(model, data.val, loss)}}
    with rounding(model, bits or 32):
        found["val"]["bits"] = sp.evaluate(model, data.val, loss)
        found["test"] = {"bits": sp.evaluate(model, data.test, loss)}
    found["test"]["float"] = sp.evaluate(model, data.test, loss)
    found |= {"int8": int8(model, bits, data), "log": history.epochs, "cuts": history.cuts}
    return found


def int8(model: nn.Module, bits: dict[str, int], data: zoo.data.Splits) -> dict[str, Any]:
    """Write the network in int8, and score that file in ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = sp.quantize(model.eval(), data.train, Path(folder) / "int8.onnx", Int8(weight_bits=8), keep=float_in_int8(model, bits))
        except ExportError as problem:
            return {"problem": str(problem)}
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(made.path, options)
        name = session.get_inputs()[0].name
        right = [(session.run(None, {name: x.numpy()})[0].argmax(1) == y.numpy()).sum() for x, y in data.test]
        return {"accuracy": float(sum(right)) / data.test.examples, "size_bytes": made.size_bytes, "float_bytes": made.float_bytes}


def say(epoch: int, line: dict[str, float], model: nn.Module) -> None:
    print(epoch, {key: round(value, 4) for key, value in line.items()}, flush=True)


def path_of(network: str, method: str, seed: int, full: bool) -> Path:
    return RESULTS / f"{network}{'-full' if full else ''}-{method}-{seed}.json"


def rows(network: str, method: str, full: bool = False) -> list[dict[str, Any]]:
    """Return the rows of one method that are there, by seed."""
    prefix = f"{network}{'-full' if full else ''}-{method}-"
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(f"{prefix}[0-9].json"))]


def cost_of(row: dict[str, Any], name: str) -> float | None:
    """Return an entry of the last line of a row's log that a course wrote; None in float."""
    return next((value for key, value in row["log"][-1].items() if key.endswith(f"Precision {name}")), None)


def table() -> str:
    """Return the tables of all rows that are there."""
    parts = []
    for network, about in NETWORKS.items():
        for full in (False, True):
            found = {method: group for method in METHODS if (group := rows(network, method, full))}
            if not found:
                continue
            given = next(iter(found.values()))[0]["settings"]
            heads = [
                "method",
                "seeds",
                "cost",
                "ratio",
                "MBOPs",
                "test, in bits",
                "test, float",
                "test, int8",
                "to static-8, in bits",
                "float",
                "int8",
            ]
            parts += [
                f"{about['title']}: {given['images']:,} images, {given['epochs']} epochs, Adam at {given['rate']:g} with a cosine. "
                "Test accuracy in %, mean ± sample standard deviation; last columns: points to static 8 bits of the same seeds.",
                "",
                f"| {' | '.join(heads)} |",
                "|---|---|" + "---:|" * (len(heads) - 2),
                *(line(method, group, found.get("static-8", [])) for method, group in found.items()),
                "",
            ]
    return "\n".join(parts).rstrip()


def line(method: str, group: list[dict[str, Any]], static: list[dict[str, Any]]) -> str:
    """Return one line of a table."""
    seeds = {row["settings"]["seed"]: row for row in static}
    pairs = [(row, seeds[row["settings"]["seed"]]) for row in group if row["settings"]["seed"] in seeds and method != "static-8"]
    costs = [[cost_of(row, name) for row in group] for name in ("cost", "ratio", "BOPs")]
    cells = [
        method,
        ", ".join(str(row["settings"]["seed"]) for row in group),
        *(
            "" if None in values else f"{statistics.fmean(values) / scale:.{digits}f}"
            for values, scale, digits in zip(costs, (1, 1, 1e6), (3, 4, 1), strict=True)
        ),
        mean([accuracy(row, "bits") for row in group]),
        mean([accuracy(row, "float") for row in group]),
        mean([accuracy(row, "int8") for row in group if in_int8(row)]),
        *(gain(pairs, how) for how in ("bits", "float", "int8")),
    ]
    return f"| {' | '.join(cells)} |"


def gain(pairs: list[tuple[dict[str, Any], dict[str, Any]]], how: str) -> str:
    """Return the mean difference of rows to those of static 8 bits of the same seeds."""
    pairs = [pair for pair in pairs if how != "int8" or in_int8(pair[0])]
    return f"{statistics.fmean(accuracy(row, how) - accuracy(other, how) for row, other in pairs):+.2f}" if pairs else ""


def in_int8(row: dict[str, Any]) -> bool:
    """Return whether an int8 file was written: none is where every layer learned more than 8 bits."""
    return "accuracy" in row["int8"]


def accuracy(row: dict[str, Any], how: str) -> float:
    return 100 * float((row["int8"] if how == "int8" else row["test"][how])["accuracy"])


def mean(values: list[float]) -> str:
    """Return mean and sample standard deviation, the latter of two values or more."""
    if not values:
        return ""
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def render(text: str) -> str:
    """Return a card with today's table."""
    before, _, rest = text.partition("<!-- results -->")
    return f"{before}<!-- results -->\n\n{table()}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


def plot() -> None:
    """Draw the bits of each layer after each epoch, of the first seed."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "spectrim", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot as plt

    shown = [(network, method) for network in NETWORKS for method in ("learned", "learned-factors") if rows(network, method)]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.2), squeeze=False, layout="constrained")
    for axis, (network, method) in zip(axes[0], shown, strict=True):
        row = rows(network, method)[0]
        lines = [bits_of(one) for one in row["log"]]
        for index, name in enumerate(lines[0]):
            shift = 0.06 * (index - len(lines[0]) / 2)
            axis.plot(range(1, len(lines) + 1), [bits[name] + shift for bits in lines], marker="o", markersize=3, label=name)
        axis.set(
            title=f"{network}, {method}, seed {row['settings']['seed']}",
            xlabel="epoch",
            ylim=(2.5, max(8, *(bits for one in lines for bits in one.values())) + 0.6),
        )
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=6, frameon=False, ncols=2)
    axes[0][0].set_ylabel("bits after the epoch")
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    """Run what is asked for and not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", choices=list(NETWORKS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--full", action="store_true", help="every image, more epochs, and ResNet-8 from random weights")
    parser.add_argument("--render", action="store_true", help="write the table into the method card and draw the plot, run nothing")
    given = parser.parse_args()
    if given.render:
        write_text(CARD, render(CARD.read_text(encoding="utf-8")))
        plot()
        return
    if given.network is None:
        parser.error("name a network, or give --render")
    torch.set_num_threads(1)
    for seed in map(int, given.seeds.split(",")):
        for method in given.methods.split(","):
            settings = settings_of(given.network, method, seed, given.full)
            path = path_of(given.network, method, seed, given.full)
            if path.exists() and json.loads(path.read_text(encoding="utf-8"))["digest"] == digest(settings):
                continue
            print(path.name, flush=True)
            row = {"settings": settings, "digest": digest(settings), "environment": environment(), **run(settings)}
            RESULTS.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(row, indent=1) + "\n")
            print(path.name, row["test"], row["int8"], flush=True)


if __name__ == "__main__":
    main()
