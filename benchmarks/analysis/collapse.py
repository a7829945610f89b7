"""Neural collapse while training on 2,000 MNIST images, and what cuts do to it; three minutes of one core.

python benchmarks/analysis/collapse.py           # writes benchmarks/results/analysis/collapse.json, then the figure
python benchmarks/analysis/collapse.py --plot    # docs/plots/collapse.svg alone
"""

import copy
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import SEEDS, read, write

PLOT = Path(__file__).resolve().parents[2] / "docs" / "plots" / "collapse.svg"
EXAMPLES, BATCH, EPOCHS, EVERY, TUNE, DEPTH, RATE, DECAY = 2000, 50, 60, 5, 10, 4, 0.05, 1e-3
RANKS = (128, 64, 32, 16, 9, 6, 3)
BUDGETS = (0.75, 0.5, 0.33)
METRICS = ("nc1", "nc2", "nc3", "nc4", "effective_rank", "accuracy")


def main() -> None:
    import torch

    torch.set_num_threads(1)
    write(
        "collapse",
        {
            "settings": {"examples": EXAMPLES, "epochs": EPOCHS, "tune": TUNE, "hidden": DEPTH, "rate": RATE, "decay": DECAY},
            "mnist": mnist(),
            "resnet20": resnet20(),
        },
    )


def mnist() -> list[dict[str, Any]]:
    """Train dense and factorized networks to the end, then cut the dense one to one rank in all hidden layers."""
    import torch
    from torch import nn

    import spectrim as sp
    from spectrim import zoo
    from spectrim.analysis.collapse import LogCollapse, neural_collapse
    from spectrim.budget.rules import Fixed

    splits = zoo.mnist(batch_size=EXAMPLES)
    x, y = next(iter(splits.train))
    test = list(splits.test)
    train = list(zip(x.split(500), y.split(500), strict=True))
    loss = nn.CrossEntropyLoss()

    def network() -> nn.Module:
        hidden = [layer for _ in range(DEPTH - 1) for layer in (nn.Linear(256, 256), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), *hidden, nn.Linear(256, 10))

    def trained(model: nn.Module, epochs: int, rate: float, penalties: tuple[Any, ...] = (), log: bool = False) -> list[dict[str, float]]:
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), BATCH, shuffle=True)
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        callbacks = [LogCollapse(train, EVERY)] if log else []
        tuning = sp.Tuning(scheduler=schedule)
        history = sp.fit(model, data, loss, optimizer, epochs, tuning=tuning, penalties=penalties, callbacks=callbacks, progress=False)
        kept = ("nc1", "nc2", "nc3", "nc4", "effective_rank", "loss")
        return [{"epoch": i + 1} | {name: line[name] for name in kept} for i, line in enumerate(history.epochs) if "nc1" in line]

    def scores(model: nn.Module) -> dict[str, float]:
        made = asdict(neural_collapse(model, train))
        return {name: made[name] for name in METRICS} | {"test_accuracy": sp.evaluate(model, test, loss)["accuracy"]}

    rows = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        dense = network()
        start = copy.deepcopy(dense)
        row: dict[str, Any] = {"seed": seed, "start": scores(dense), "dense_log": trained(dense, EPOCHS, RATE, log=True)}
        row["dense"] = scores(dense)
        svd = sp.factorize(start)
        row["svd_log"] = trained(svd, EPOCHS, RATE, (sp.Orthogonality(1.0), sp.Hoyer(0.01)), log=True)
        row["svd"] = scores(svd)
        low = sp.factorize(dense)
        for rank in RANKS:
            cut = sp.prune(low, Fixed(rank))
            row[f"cut {rank}"] = scores(cut)
            trained(cut, TUNE, RATE / 5)
            row[f"tuned {rank}"] = scores(cut)
        rows.append(row)
    return rows


def resnet20() -> list[dict[str, Any]]:
    """Measure a published ResNet-20 on training images, whole and cut without training."""
    import spectrim as sp
    from spectrim import zoo
    from spectrim.analysis.collapse import neural_collapse

    x, y = next(iter(zoo.cifar10(batch_size=1000, augment=False).train))
    batches = list(zip(x.split(250), y.split(250), strict=True))
    dense = zoo.resnet20(pretrained="akamaster")
    low = sp.factorize(dense)
    rows = []
    for budget in (None, *BUDGETS):
        model = dense if budget is None else sp.prune(low, sp.allocate(low, sp.Budget(macs=budget), x[:1]))
        rows.append({"macs": budget or 1.0} | asdict(neural_collapse(model, batches)))
    return rows


def plot() -> None:
    """Draw NC1 and the distance from the simplex against epochs, and against the rank of a cut."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "spectrim"
    from matplotlib import pyplot as plt

    rows = read("collapse")["mnist"]

    def middle(values: list[float]) -> tuple[float, float, float]:
        return min(values), statistics.mean(values), max(values)

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for log, color, label in (("dense_log", "C0", "dense"), ("svd_log", "C1", "SVD training")):
        epochs = [line["epoch"] for line in rows[0][log]]
        bands = [middle([row[log][i]["nc1"] for row in rows]) for i in range(len(epochs))]
        left.plot(epochs, [band[1] for band in bands], color=color, label=label)
        left.fill_between(epochs, [band[0] for band in bands], [band[2] for band in bands], color=color, alpha=0.25)
    for kind, color, label in (("cut", "C2", "dense, cut"), ("tuned", "C3", f"cut, {TUNE} epochs more")):
        bands = [middle([row[f"{kind} {rank}"]["nc1"] for row in rows]) for rank in RANKS]
        right.plot(RANKS, [band[1] for band in bands], color=color, marker="o", label=label)
        right.fill_between(RANKS, [band[0] for band in bands], [band[2] for band in bands], color=color, alpha=0.25)
    right.axhline(statistics.mean(row["dense"]["nc1"] for row in rows), color="C0", linestyle=":", label="dense, whole")
    right.axvline(9, color="gray", linewidth=0.8, linestyle="--")
    right.text(9.3, right.get_ylim()[1], "C - 1", va="top", fontsize=8)
    left.set(xlabel="epoch", ylabel="NC1, training images", yscale="log")
    right.set(xlabel="rank of the hidden layers", xscale="log")
    right.set_xticks(RANKS, [str(rank) for rank in RANKS])
    right.minorticks_off()
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    if "--plot" not in sys.argv:
        main()
    plot()
