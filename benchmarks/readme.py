"""Render the tables of ``README.md``, and the picture above them, from result files of ``compare`` and ``micro``; no number is typed.

``--check`` compares the table.
"""

import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from compare_report import Result, gather, markdown, merit_of, results, settings

PAGE = Path(__file__).resolve().parents[1] / "README.md"
NETWORKS = {
    "lenet5": ("LeNet-5, Fashion-MNIST", 0.33),
    "resnet8": ("ResNet-8, CIFAR-10", 0.33),
    "resnet20": ("ResNet-20, CIFAR-10", 0.455),
    "vit": ("small ViT, Fashion-MNIST", 0.33),
    "ptb_lstm": ("LSTM, Penn Treebank", 0.33),
}
"""One row for each network, at one budget."""

REAL = Path(__file__).resolve().parent / "results" / "real"
WHEEL = ("crepe_few", "CREPE tiny from a wheel, pitch, %, no labels, no training", 0.35)
"""The network that others trained, and its budget."""

METHODS = {"ours": "`compress`", "truncated": "truncated SVD", "filters": "filter pruning"}
INSTEAD = {"truncated": "truncated_distilled"}
"""What stands in for a method that was run in that form alone."""

CURVE = "resnet8"
"""The network whose trade-off the picture shows."""

SECONDS = Path(__file__).resolve().parent / "micro" / "results" / "latency.json"
RUNTIMES = {"onnx": "ONNX Runtime", "compiled": "torch, compiled"}
"""Where seconds are measured."""

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "plots" / "first-screen.svg"


def shown(values: Sequence[float]) -> str:
    """Return mean and sample standard deviation; one value without a deviation."""
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(set(values)) > 1 else "")


def found(name: str) -> list[Result]:
    """Return the trained results of a network by the methods shown."""
    wanted = {*METHODS, *INSTEAD.values()}
    return [result for result in results(name) if result["epochs"] and result["method"] in wanted]


def row(name: str, title: str, budget: float) -> list[str]:
    """Return the row of one network: each cell with its number of seeds where it is not that of the row."""
    task, all_results = settings(name), [result for result in found(name) if result["budget"] == budget]
    cells = gather(all_results, lambda result: merit_of(task, result["final"]["test"]))
    dense = {result["seed"]: merit_of(task, result["dense"]["test"]) for result in all_results}
    texts = []
    for method in METHODS:
        instead = method not in cells
        values = cells.get(INSTEAD.get(method, "") if instead else method, {}).get(budget)
        notes = ["distilled"] if instead else []
        notes += [f"{len(values)} seed{'s' if len(values) > 1 else ''}"] if values and len(values) != len(dense) else []
        texts.append(shown(values) + (f" ({', '.join(notes)})" if notes else "") if values else "-")
    unit = {"accuracy": "%", "perplexity": "perplexity", "loss": "nats per token"}[task.get("merit", "accuracy")]
    return [f"{title}, {unit}", f"{budget:.0%}", str(len(dense)), shown(list(dense.values())), *texts]


def from_a_wheel() -> list[str]:
    """Return the row of a network that others trained: calibration alone, no labels."""
    name, title, budget = WHEEL
    content = json.loads((REAL / f"{name}.json").read_text(encoding="utf-8"))
    rows = [entry for entry in content["rows"] if entry["budget"] == {"macs": budget}]
    ours, truncated = ([entry["score"] for entry in rows if entry["method"] == method] for method in ("refit", "truncated"))
    return [title, f"{budget:.0%}", str(len(ours)), shown([content["dense"]["score"]]), shown(ours), shown(truncated), "-"]


def table() -> str:
    """Return the table."""
    lines = [row(name, title, budget) for name, (title, budget) in NETWORKS.items()] + [from_a_wheel()]
    return markdown(["network", "MACs kept", "seeds", "dense", *METHODS.values()], lines)


def speed() -> str:
    """Return the speed-ups at half the multiply-accumulates, ranks by seconds: a row for each runtime, a column for each network."""
    points = json.loads(SECONDS.read_text(encoding="utf-8"))["points"]
    rows = [[title, *(f"{point[key]['timed']['median']:.2f}x" for point in points)] for key, title in RUNTIMES.items()]
    return markdown(["faster by", *(point["network"].replace(" channels", "") for point in points)], rows)


def picture() -> None:
    """Draw a weight as two thin ones, and the trade-off of one network by the committed results."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    mpl.rcParams.update({"svg.hashsalt": "spectrim", "svg.fonttype": "none", "font.size": 10})
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    parts = ((0, 0, 4, 4, "W\nout x in"), (6, 0, 1, 4, "out x r"), (7.6, 3, 4, 1, "r x in"))
    for (x, y, width, height, text), color in zip(parts, ("#9aa3ad", "#0072b2", "#0072b2"), strict=True):
        left.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white"))
        inside = width > 1 and height > 1
        place = (x + width / 2, y + height / 2 if inside else y - 0.35)
        left.text(*place, text, ha="center", va="center" if inside else "top", color="white" if inside else "#57606a")
    left.text(5, 2, "≈", ha="center", va="center", fontsize=22, color="#57606a")
    left.set(xlim=(-0.3, 12), ylim=(-1, 4.4), aspect="equal", title="a weight becomes two thin ones")
    left.axis("off")
    task = settings(CURVE)
    cells = gather(found(CURVE), lambda result: merit_of(task, result["final"]["test"]))
    for (method, title), color, mark in zip(METHODS.items(), ("#0072b2", "#d55e00", "#009e73"), "o^s", strict=True):
        budgets = sorted(cells[method])
        values = [statistics.fmean(cells[method][budget]) for budget in budgets]
        spread = [statistics.stdev(cells[method][budget]) for budget in budgets]
        right.errorbar([100 * budget for budget in budgets], values, spread, color=color, marker=mark, capsize=3, label=title.strip("`"))
    dense = statistics.fmean(merit_of(task, result["dense"]["test"]) for result in found(CURVE))
    right.axhline(dense, color="#57606a", linestyle="--", linewidth=1, label="dense")
    right.set(xlabel="multiply-accumulates kept, %", ylabel="test accuracy, %", title=f"{NETWORKS[CURVE][0]}: three seeds")
    right.legend(frameon=False, fontsize=9)
    right.grid(alpha=0.3)
    figure.savefig(PICTURE, metadata={"Date": None})


def render(page: str) -> str:
    """Return the page with today's table between its marks."""
    page = re.sub(r"(<!-- results -->\n\n).*?(\n<!-- end -->)", lambda match: match[1] + table() + match[2], page, flags=re.DOTALL)
    return re.sub(r"(<!-- speed -->\n\n).*?(\n<!-- end -->)", lambda match: match[1] + speed() + match[2], page, flags=re.DOTALL)


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(0 if text == render(text) else f"{PAGE} is out of date: run python benchmarks/readme.py")
    PAGE.write_text(render(text), encoding="utf-8")
    picture()
