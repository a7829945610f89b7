"""Render ``benchmarks/results/compare`` into ``docs/comparison.md`` and its plots; no number is typed. ``--check`` compares the page."""

import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from cells import mean_std

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "compare"
TASKS = HERE / "compare"
DOCS = HERE.parent / "docs"
PAGE, PLOTS = DOCS / "comparison.md", DOCS / "plots"
CARD, SCRATCH = DOCS / "methods" / "svd-training.md", "<!-- from scratch -->"
ORDER = ("resnet8", "lenet5", "vit", "resnet20", "resnet20_full", "resnet56", "resnet56_full", "stories260k", "ptb_lstm", "resnet8_scratch")
TITLES = {
    "resnet8": "MLPerf-Tiny ResNet-8, CIFAR-10",
    "lenet5": "LeNet-5, Fashion-MNIST",
    "vit": "Small ViT (transformers), Fashion-MNIST",
    "resnet20": "ResNet-20, CIFAR-10",
    "resnet20_full": "ResNet-20, CIFAR-10, full length",
    "resnet56": "ResNet-56, CIFAR-10",
    "resnet56_full": "ResNet-56, CIFAR-10, full length",
    "stories260k": "stories260K language model",
    "ptb_lstm": "LSTM language model, Penn Treebank",
    "resnet8_scratch": "MLPerf-Tiny ResNet-8, CIFAR-10, from random weights, 120 epochs",
}
METHODS = {
    "truncated": "truncated SVD",
    "truncated_distilled": "truncated SVD, distilled",
    "whitened": "activation-whitened SVD",
    "whitened_distilled": "activation-whitened SVD, distilled",
    "paper": "SVD training, Hoyer (the paper)",
    "paper_distilled": "SVD training, Hoyer (the paper), distilled",
    "l1": "SVD training, L1",
    "polar_hoyer": "PolarHoyer on dense weights",
    "ours": "`compress` (ours)",
    "ours_squeezed": "`compress`, first half toward the budget",
    "ours_squeezed_fast": "`compress`, toward the budget at four times the rate",
    "ours_orthogonal": "`compress`, orthogonality on",
    "ours_decayed": "`compress`, decay of the product",
    "ours_undistilled": "`compress`, no teacher",
    "ours_taught": "`compress`, distilled by logits only",
    "ours_hinted": "`compress`, distilled by features throughout",
    "ours_whitened": "`compress`, ranks by whitened energy",
    "narrow": "narrower network, from scratch",
    "narrow_distilled": "narrower network, from scratch, distilled",
    "filters": "filter pruning (torch-pruning)",
    "scratch": "SVD training from scratch, Hoyer (the paper)",
    "scratch_squeezed": "SVD training from scratch, `Squeeze`",
    "scratch_ramp": "SVD training from scratch, cuts along a ramp",
    "preset": "low rank from scratch",
    "ours_interpolative": "`compress`, written interpolatively",
    "longer": "dense, trained on",
}
CALIBRATION_ONLY = ("truncated", "whitened", "ours")
MERITS = {"accuracy": "accuracy, %", "loss": "loss, nats per token", "perplexity": "perplexity"}
UNITS = {"accuracy": "points of accuracy lost", "loss": "nats per token added", "perplexity": "perplexity added"}
HEAD = """# Comparison

This page is written by `python benchmarks/compare_report.py` from the files in `benchmarks/results/compare`, which
`python benchmarks/compare.py TASK` wrote. All methods of a task start from the same dense network (the narrower one from random weights),
and get the same epochs, optimizer, batches and shape of learning-rate schedule, and at most the stated fraction of the dense network's
multiply-accumulates. Fine-tuning without a penalty on the factors balances those of weights with a side above 1,024 (`balance_`), in all
rows alike. Numbers are those of the test split, which is read once, at the end of a run, unless a table says validation; mean `±`
sample standard deviation over `n` seeds. With n=1 there is no deviation, and differences below about 0.3 point are not significant. The
best value of a column is bold. A dash marks a run that has not been made; the number of missing runs is below each table. Each file names
the commit that made it. If only the library has changed since, and no setting, the row is kept until it is run again. The rules of
`compress` were chosen by trials on networks of this page, judged by validation scores. The last change of its rule for ranks was made after
test scores of LeNet-5 had been seen, and that of its choice between cuts without training after those of ResNet-8, so these rows are not
blind. No rule was chosen on the ViT.

- **truncated SVD**: cut at once, ranks by the knapsack over spectral energy; *distilled*: fine-tuned with the dense network as the teacher.
- **activation-whitened SVD**: the cut minimizes the change of each layer's output on training examples, ranks by the same distortion.
- **SVD training**: half of the epochs with orthogonality and a sparsity penalty, then the energy threshold that meets the budget, then
  fine-tuning with orthogonality.
- **PolarHoyer**: half of the epochs with the penalty on the dense weights, then as truncated SVD.
- **`compress`**: ours, with its defaults. If the loss gap to the dense network is large, the dense network is the teacher: logits
  throughout (temperature 2, half of the loss; rows marked *distilled* use 4 and 0.7 on images), intermediate features for the first half
  of training. A dense network that memorized its training images (ResNet-20 and 56) is used as in the rows marked *distilled*. *Logits
  only*: never features, and whatever the loss gap; *features throughout*: in the second half, too.
- **narrower network**: all widths scaled by the largest factor that fits, trained from random weights, with a separate peak learning rate.
- **filter pruning**: whole channels by group norm, uniformly or globally, whichever is better on the validation split before fine-tuning.

In short: without training `compress` leads on ResNet-8 and LeNet-5 at every budget, and on the ViT at a fifth. Fine-tuned, it
leads on ResNet-8 and the LSTM at every budget, and on the language model at 0.85; there it is level with whitening at 0.7. On LeNet-5 it is
behind whitening at half and level at a third, both within the noise, and ahead at a fifth. On the ViT all low-rank rows are close to the
dense network. On ResNet-20 and 56 the differences to truncated SVD with the same teacher are within the noise. That is after the few
epochs of each section. After 40 epochs of fine-tuning, ResNet-8 from random weights, plain truncation is ahead of `compress`, by 0.4
points at half and a point at a third; at a third `compress` without its teacher is level with it (one seed).
"""

Result = dict[str, Any]
Cells = dict[str, dict[float, list[float]]]


def results(task: str) -> list[Result]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((RESULTS / task).glob("*.json"))]


def settings(task: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((TASKS / f"{task}.yaml").read_text(encoding="utf-8"))
    return content


def merit_of(task: dict[str, Any], scores: dict[str, float]) -> float:
    """Return the number that the tables of a task show, from the scores of one evaluation."""
    merit = task.get("merit", "accuracy")
    if merit == "accuracy":
        return 100 * scores["accuracy"]
    return math.exp(scores["loss"]) if merit == "perplexity" else scores["loss"]


def digits_of(task: dict[str, Any]) -> int:
    return 4 if task.get("merit") == "loss" else 2


def gather(found: Iterable[Result], value: Callable[[Result], float | None]) -> Cells:
    """Return the values of all seeds by method and budget."""
    cells: Cells = {}
    for result in found:
        if (number := value(result)) is not None:
            cells.setdefault(result["method"], {}).setdefault(result["budget"], []).append(number)
    return cells


def cell(values: Sequence[float], digits: int, best: bool = False) -> str:
    if not values:
        return "-"
    text = mean_std(values, digits)
    return f"{f'**{text}**' if best else text} (n={len(values)})"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def grid(cells: Cells, methods: Sequence[str], budgets: Sequence[float], digits: int, better: Callable[..., float]) -> str:
    """Return methods in rows and budgets in columns; `better` is max or min; the best are bold."""
    best = {}
    for budget in budgets:
        means = {method: round(statistics.fmean(cells[method][budget]), digits) for method in cells if budget in cells[method]}
        best[budget] = [method for method, mean in means.items() if mean == better(means.values())]
    rows = []
    for method in methods:
        own = cells.get(method, {})
        shown = [cell(own.get(budget, []), digits, method in best.get(budget, [])) for budget in budgets]
        rows.append([METHODS[method], *shown])
    return markdown(["method", *(f"{budget:g}" for budget in budgets)], rows)


def missing(found: Sequence[Result], task: dict[str, Any], methods: Sequence[str]) -> str:
    """Say how many runs of a table have not been made."""
    done = {(result["method"], result["budget"], result["seed"]) for result in found}
    asked = set()
    for method in methods:
        own = task["methods"][method] or {}
        asked |= set(itertools.product([method], own.get("budgets", task["budgets"]), own.get("seeds", task["seeds"])))
    alone = [] if len({seed for _, _, seed in done}) > 1 else ["Every cell is of one seed, n=1."]
    lacking = len(asked - done)
    return " ".join([*alone, f"{lacking} of {len(asked)} runs are missing." if lacking else "Nothing is missing."]) + "\n"


def opening(task: dict[str, Any], found: Sequence[Result]) -> str:
    """Say what the runs of a task had in common."""
    optimizer = task["optimizer"] if isinstance(task["optimizer"], str) else task["optimizer"]["class_path"]
    shared = f"{task['epochs']} epochs in all, {optimizer.rpartition('.')[2]}, peak learning rate {task['peak']:g}"
    own = {name: knobs["peak"] for name, knobs in task["methods"].items() if knobs and knobs.get("peak", task["peak"]) != task["peak"]}
    others = "".join(f", {peak:g} for the {METHODS[name]}" for name, peak in own.items())
    batch = task["data"].get("init_args", {}).get("batch_size")
    limits = " and ".join({"macs": "MACs", "params": "parameters"}[name] for name in task.get("limits", ["macs"]))
    dense = {result["seed"]: merit_of(task, result["dense"]["test"]) for result in found}
    first = found[0]["dense"]
    half = ", bfloat16 where autocast says so" if task.get("precision") == "bf16" else ""
    head = f"{shared}{others}, batches of {batch}{half}. Columns: the fraction of the {limits} that may be kept. "
    values = cell(list(dict.fromkeys(dense.values())) if len(set(dense.values())) == 1 else list(dense.values()), digits_of(task))
    return (
        f"{head}Dense: {MERITS[task.get('merit', 'accuracy')]} {values}, {first['macs']:,} MACs, {first['params']:,} parameters."
        f"{' ' + task['note'] if task.get('note') else ''}\n"
    )


def lost_at_cut(task: dict[str, Any], moment: str) -> Callable[[Result], float | None]:
    """Return how much worse than just before the cut a network is at a moment, on the validation split."""
    sign = 1 if task.get("merit", "accuracy") == "accuracy" else -1

    def value(result: Result) -> float | None:
        scores = result["val"]
        if moment not in scores or "before_cut" not in scores:
            return None
        return sign * (merit_of(task, scores["before_cut"]) - merit_of(task, scores[moment]))

    return value


def machines(found: Sequence[Result]) -> str:
    """Say on what and from which commits the runs were made."""
    where: dict[str, list[str]] = {}
    for r in found:
        machine, device, threads = (r["environment"][name] for name in ("machine", "device", "threads"))
        row = f"{METHODS[r['method']]} at {r['budget']:g}"
        where.setdefault(f"{machine}, {device}, {threads} thread(s)", []).append(row)
    versions = sorted({r["environment"]["versions"]["torch"] for r in found})
    commits = sorted({r["git"]["commit"][:10] for r in found})
    hours = sum(r["seconds"] for r in found) / 3600
    several = len(where) > 1
    places = ". ".join(f"{place}: {'; '.join(dict.fromkeys(rows))}" if several else place for place, rows in sorted(where.items()))
    return f"\n*{places}, torch {', '.join(versions)}, commit {', '.join(commits)}; {hours:.1f} hours of one process in all.*\n"


def section(name: str) -> str:
    task, found = settings(name), results(name)
    title = f"\n## {TITLES.get(name, name)}\n\n"
    methods, budgets = list(task["methods"]), task["budgets"]
    if not found:
        return title + f"No run has been made yet{': it is meant for a GPU' if name.endswith('_full') else ''}.\n"
    budgets = sorted({*budgets, *(result["budget"] for result in found)}, reverse=True)
    trained = [result for result in found if result["epochs"]]
    untrained = [result for result in found if not result["epochs"]]
    digits, better = digits_of(task), max if task.get("merit", "accuracy") == "accuracy" else min
    parts = [title, opening(task, found)]
    if trained:
        tests = gather(trained, lambda result: merit_of(task, result["final"]["test"]))
        kept = gather(trained, lambda result: 100 * result["final"]["macs_fraction"])
        means = {method: {budget: f"{statistics.fmean(values):.2f}" for budget, values in row.items()} for method, row in kept.items()}
        parts += [f"\n{MERITS[task.get('merit', 'accuracy')]}:\n\n".capitalize(), grid(tests, methods, budgets, digits, better), "\n"]
        parts += [missing(trained, task, methods)]
        parts += [f"\n![Trade-off of {TITLES.get(name, name)}](plots/compare-{name}.svg)\n"]
        parts += ["\nMACs kept, % of dense:\n\n"]
        rows = [[METHODS[method], *(means.get(method, {}).get(budget, "-") for budget in budgets)] for method in methods]
        parts += [markdown(["method", *(f"{budget:g}" for budget in budgets)], rows)]
        parts += ["\n### Right after the cut, before any fine-tuning\n\n"]
        parts += [
            f"Validation split, {UNITS[task.get('merit', 'accuracy')]} against the same network just before the cut; smaller is better.\n"
        ]
        for moment, text in (("cut", "As cut"), ("recalibrated", "BatchNorm recalibrated"), ("corrected", "Refitted by least squares")):
            values = gather(trained, lost_at_cut(task, moment))
            same = moment == "recalibrated" and values == gather(trained, lost_at_cut(task, "cut"))
            if values and not same:
                parts += [f"\n{text}:\n\n", grid(values, [method for method in methods if method in values], budgets, digits, min)]
    if untrained:
        tests = gather(untrained, lambda result: merit_of(task, result["final"]["test"]))
        few = [method for method in methods if method in CALIBRATION_ONLY]
        parts += ["\n### Calibration only, no training\n\n", grid(tests, few, budgets, digits, better), "\n"]
        parts += [missing(untrained, task, few)]
    return "".join(parts) + machines(found)


def tasks() -> list[str]:
    names = sorted(path.stem for path in TASKS.glob("*.yaml"))
    return [*(name for name in ORDER if name in names), *(name for name in names if name not in ORDER)]


def render() -> str:
    return HEAD + "".join(section(name) for name in tasks())


def draw(name: str) -> None:
    """Draw merit against the MACs kept, one line a method, bars for the deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "spectrim"
    from matplotlib import pyplot as plt

    task = settings(name)
    found = [result for result in results(name) if result["epochs"]]
    if not found:
        return
    PLOTS.mkdir(exist_ok=True)
    tests = gather(found, lambda result: merit_of(task, result["final"]["test"]))
    kept = gather(found, lambda result: result["final"]["macs_fraction"])
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    colors, markers = plt.get_cmap("tab20").colors, "osD^v<>PhxX*dp8"
    for index, method in enumerate(METHODS):
        if method not in tests:
            continue
        budgets = sorted(tests[method])
        x = [statistics.fmean(kept[method][budget]) for budget in budgets]
        y = [statistics.fmean(tests[method][budget]) for budget in budgets]
        bars = [statistics.stdev(values) if len(values := tests[method][budget]) > 1 else 0.0 for budget in budgets]
        width = 2.4 if method == "ours" else 1.2
        text = METHODS[method].replace("`", "")
        axes.errorbar(
            x,
            y,
            bars,
            color=colors[index % len(colors)],
            marker=markers[index % len(markers)],
            linewidth=width,
            markersize=5,
            capsize=2,
            label=text,
        )
    dense = statistics.fmean({result["seed"]: merit_of(task, result["dense"]["test"]) for result in found}.values())
    axes.axhline(dense, color="black", linestyle="--", linewidth=0.8, label="dense")
    seeds = len({result["seed"] for result in found})
    title = f"{TITLES.get(name, name)}, {task['epochs']} epochs, {seeds} seed{'s' if seeds > 1 else ''}"
    axes.set(xlabel="MACs / dense MACs", ylabel=MERITS[task.get("merit", "accuracy")], title=title)
    axes.grid(alpha=0.3)
    figure.legend(fontsize="x-small", loc="outside right upper")
    figure.savefig(PLOTS / f"compare-{name}.svg", metadata={"Date": None})
    plt.close(figure)


def card() -> str:
    """Return the method card of SVD training with the table of the task from random weights."""
    text = CARD.read_text(encoding="utf-8")
    before, rest = text.split(SCRATCH, 1)
    task, found = settings("resnet8_scratch"), results("resnet8_scratch")
    tests = gather(found, lambda result: merit_of(task, result["final"]["test"]))
    budgets = sorted({budget for row in tests.values() for budget in row if budget < 1}, reverse=True)
    dense = {result["seed"]: merit_of(task, result["dense"]["test"]) for result in found}
    own = [["dense, 80 epochs", cell(list(dense.values()), 2), *[""] * (len(budgets) - 1)]] if dense else []
    own += [["dense, 120 epochs", cell(tests["longer"][1.0], 2), *[""] * (len(budgets) - 1)]] if "longer" in tests else []
    own += [
        [METHODS[name], *(cell(tests[name].get(budget, []), 2) for budget in budgets)]
        for name in task["methods"]
        if name in tests and name != "longer"
    ]
    table = markdown(["120 epochs in all, test accuracy, %", *(f"{budget:g} of the MACs" for budget in budgets)], own)
    return before + SCRATCH + "\n" + (table if budgets else "") + "<!-- end -->" + rest.split("<!-- end -->", 1)[1]


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8")
    CARD.write_text(card(), encoding="utf-8")
    for name in tasks():
        draw(name)


if __name__ == "__main__":
    if "--check" in sys.argv:
        late = [page for page, text in ((PAGE, render()), (CARD, card())) if page.read_text(encoding="utf-8") != text]
        sys.exit(f"out of date: {', '.join(map(str, late))}: run python benchmarks/compare_report.py" if late else 0)
    main()
