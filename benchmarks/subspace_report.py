"""Render ``benchmarks/results/subspace`` into ``docs/methods/subspace.md`` and its picture; no number is typed."""

import json
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "subspace"
CARD, PICTURE = HERE.parent / "docs" / "methods" / "subspace.md", HERE.parent / "docs" / "plots" / "subspace-balance.svg"
TITLES = {
    "sgd": "SGD, all epochs",
    "short-sgd": "SGD, rate x0.1 after the sampled epochs",
    "mean": "mean of the later half of the samples, BatchNorm recalibrated",
    "p-sgd": "P-SGD from the start",
    "p-bfgs": "P-BFGS from the start",
    "random": "P-SGD in random directions",
}
NAMES = {"batch_size": "batches of", "recalibrated": "BatchNorm recalibrated on"}
Row = dict[str, Any]


def read(folder: Path) -> list[Row]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def spread(values: list[float], digits: int = 2) -> str:
    """Return mean and, of two values or more, sample standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 2 + "---:|" * (len(head) - 2)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def percent(row: Row, split: str) -> float:
    return 100 * float(row[split]["accuracy"])


def by_seed(rows: list[Row], form: str, method: str) -> dict[int, Row]:
    return {row["settings"]["seed"]: row for row in rows if (row["settings"]["form"], row["settings"]["method"]) == (form, method)}


def size_of(row: Row) -> tuple[int, int]:
    """Return images and epochs of the whole training."""
    return row["settings"]["images"], row["settings"]["epochs"]


def table(rows: list[Row]) -> str:
    """Return the rows of methods for one number of images and epochs."""
    lines = []
    for form in ("dense", "factors"):
        whole = by_seed(rows, form, "sgd")
        for method, title in TITLES.items():
            own = by_seed(rows, form, method)
            if not own:
                continue
            both = sorted(set(own) & set(whole))
            behind = [percent(own[seed], "test") - percent(whole[seed], "test") for seed in both]
            (epochs,) = {row["epochs"] for row in own.values()}
            seconds = [row["cpu_seconds"] + row["cpu_seconds_before"] for row in own.values()]
            values = [spread([percent(row, split) for row in own.values()]) for split in ("val", "test")]
            difference = "" if method == "sgd" else spread(behind)
            shown = [form, title, str(len(own)), f"{epochs}", f"{epochs / size_of(rows[0])[1]:.0%}", *values, difference]
            lines.append([*shown, f"{statistics.fmean(seconds):.0f}"])
    head = ["weights", "method", "seeds", "epochs", "of SGD's", "validation, %", "test, %", "to SGD, points", "processor s"]
    return markdown(head, lines)


def comparison(rows: list[Row]) -> str:
    """Return the tables of methods, and what they have in common."""
    task, parts = rows[0]["settings"], []
    knobs = f"rate {task['rate']}, momentum {task['momentum']}, decay {task['weight_decay']}"
    parts.append(
        f"ResNet-8, CIFAR-10, crops and flips, batches of {task['batch_size']}, {knobs}. The first {task['sampled']:.0%} of SGD's epochs, "
        f"at a constant rate, are the same for all rows of a seed; {task['samples_per_epoch']} samples an epoch are taken there. Epochs "
        "count all passes that compute gradients, sampling and line search included; so do processor seconds. Mean ± sample standard "
        "deviation over seeds; differences are within a seed."
    )
    for images, epochs in sorted({size_of(row) for row in rows}, reverse=True):
        own = [row for row in rows if size_of(row) == (images, epochs)]
        parts.append(f"{images:,} training images, {epochs} epochs of SGD:\n\n{table(own)}")
    return "\n\n".join(parts)


def tried(rows: list[Row]) -> str:
    """Return the settings that were tried on the validation split."""
    lines = []
    for row in sorted(rows, key=lambda row: (row["settings"]["method"] != "p-sgd", -percent(row, "val"))):
        settings, knobs = row["settings"], row["settings"]["knobs"]
        shown = ", ".join(f"{NAMES.get(key, key)} {value}" for key, value in knobs.items() if key not in ("share", "falls"))
        first = round(settings["sampled"] * settings["epochs"])
        kept, found = f"{100 * row['kept']:.1f}", f"{percent(row, 'val'):.2f}"
        lines.append([TITLES[settings["method"]].partition(" ")[0], shown, f"{first} + {row['epochs'] - first}", kept, found])
    return markdown(["method", "settings", "epochs", "variance kept, %", "validation, %"], lines)


def cell(rows: list[Row], rank: float | None, sampled: int, size: int | None, split: str = "val") -> list[float]:
    """Return the accuracies of a cell, by seed, in %."""
    found = []
    for row in (row for row in rows if row["settings"]["rank"] == rank):
        found += [100 * c[split] for c in row["rows"] if (c["sampled"], c["size"]) == (sampled, size)]
    return found


def axes(rows: list[Row]) -> tuple[list[float | None], list[int], list[int | None]]:
    """Return ranks, numbers of sampled epochs and sizes, None for SGD."""
    ranks = sorted({row["settings"]["rank"] for row in rows}, key=lambda rank: -(rank or 9))
    cells = [c for row in rows for c in row["rows"]]
    sizes = sorted({c["size"] for c in cells if c["size"]})
    return ranks, sorted({c["sampled"] for c in cells}), [*sizes, None]


def best(rows: list[Row]) -> str:
    """Return the table of the space-time balance: the best size by validation of each rank and number of epochs, beside SGD."""
    ranks, epochs, sizes = axes(rows)
    lines = []
    for rank in ranks:
        own = [row for row in rows if row["settings"]["rank"] == rank]
        shown = ["dense" if rank is None else f"{rank:g} of the full rank", f"{own[0]['params']:,}", str(len(own))]
        for sampled in epochs:
            means = {s: statistics.fmean(cell(rows, rank, sampled, s)) for s in sizes if s and cell(rows, rank, sampled, s)}
            size = max(means, key=lambda s: means[s])
            shown += [f"{spread(cell(rows, rank, sampled, size, 'test'))} ({size})", spread(cell(rows, rank, sampled, None, "test"))]
        lines.append(shown)
    further = rows[0]["settings"]["epochs"]
    head = ["weights", "parameters", "seeds"]
    for sampled in epochs:
        head += [f"P-SGD, {sampled} + {further} epochs (size)", f"SGD, {sampled} + {further}"]
    return markdown(head, lines)


def picture(rows: list[Row]) -> None:
    """Draw validation accuracy by rank and size, one panel for each number of sampled epochs."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "spectrim", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot as plt

    ranks, epochs, sizes = axes(rows)
    grids = {e: [[cell(rows, rank, e, size) for size in sizes] for rank in ranks] for e in epochs}
    means = [statistics.fmean(values) for grid in grids.values() for line in grid for values in line if values]
    figure, panels = plt.subplots(1, len(epochs), figsize=(3.2 * len(epochs) + 1, 3.2), sharey=True, layout="constrained")
    for sampled, panel in zip(epochs, panels, strict=True):
        grid = [[statistics.fmean(values) if values else float("nan") for values in line] for line in grids[sampled]]
        panel.imshow(grid, vmin=min(means), vmax=max(means), cmap="viridis", aspect="auto")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if value == value:
                    dark = value < (min(means) + max(means)) / 2
                    panel.text(x, y, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black")
        panel.set_xticks(range(len(sizes)), [str(size or "SGD") for size in sizes])
        panel.set_title(f"{sampled} sampled + {rows[0]['settings']['epochs']} epochs")
        panel.set_xlabel("size of the subspace")
    params = {row["settings"]["rank"]: row["params"] for row in rows}
    panels[0].set_yticks(range(len(ranks)), [f"{'dense' if r is None else f'rank {r:g}'}\n{params[r]:,}" for r in ranks])
    figure.suptitle("validation accuracy, %")
    figure.savefig(PICTURE, metadata={"Date": None})


def render(text: str) -> str:
    """Return the card with today's tables."""
    rows, balance, trials = read(RESULTS), read(RESULTS / "balance"), read(RESULTS / "tried")
    parts = [comparison(rows)] if rows else []
    if trials:
        about = "Settings that were tried on the validation split, seed 0, dense weights, before any test score was read:"
        parts.append(f"{about}\n\n{tried(trials)}")
    if balance:
        images, seeds = balance[0]["settings"]["images"], ", ".join(sorted({str(row["settings"]["seed"]) for row in balance}))
        about = (
            f"LeNet-5, Fashion-MNIST, {images:,} training images, seeds {seeds}: rank of the weights (all but the last layer's), size "
            "of the subspace, and sampled epochs. Every cell counts its sampled epochs and those after them. *SGD* goes on from the end of "
            "the same sampled epochs at a tenth of the rate."
        )
        link = f"![Accuracy by rank, size of the subspace and epochs](../plots/{PICTURE.name})"
        below = "Test accuracy in %, for the size that is best on the validation split:"
        parts.append(f"### Space and time\n\n{about}\n\n{link}\n\n{below}\n\n{best(balance)}")
    before, _, rest = text.partition("<!-- results -->")
    return f"{before}<!-- results -->\n\n" + "\n\n".join(parts) + f"\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


def main() -> None:
    """Write the card and the picture."""
    CARD.write_text(render(CARD.read_text(encoding="utf-8")), encoding="utf-8")
    if balance := read(RESULTS / "balance"):
        picture(balance)


if __name__ == "__main__":
    main()
