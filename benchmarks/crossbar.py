"""Networks on simulated crossbars: accuracy against the deviation of the device, and tiles.

.venv/bin/python benchmarks/crossbar.py            # writes benchmarks/results/crossbar/lenet5-SEED.json; a finished file is skipped
.venv/bin/python benchmarks/crossbar.py --render   # writes table and picture of the method card from them

LeNet-5 on Fashion-MNIST (its dense weights lie in ``results/forms``), 32 x 32 tiles of 4-bit cells. Three networks: dense and mapped after
training; trained on for an epoch with weights on the levels of the mapping (a sign and 4 bits); low rank at half the parameters, trained
on for an epoch. Ten draws of the device for each deviation, 1,000 images of the test split, on which nothing is chosen.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping as Keyed
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectrim as sp
from cells import mean_std, put
from forms import dense_of
from micro.harness import environment
from spectrim import zoo
from spectrim.files import write_text
from spectrim.projections import Levels
from spectrim.runtimes.crossbar import Device, Mapping, monte_carlo, price_on_crossbars
from spectrim.training import StraightThrough

HERE = Path(__file__).resolve().parent
RESULTS, CARD, PLOT = (
    HERE / "results" / "crossbar",
    HERE.parent / "docs" / "methods" / "crossbars.md",
    HERE.parent / "docs" / "plots" / "crossbar.svg",
)
START, END = "<!-- crossbar -->", "<!-- end -->"
SIGMAS, DRAWS, TESTED, TILE, BITS, IMAGES, SEEDS = (0.0, 0.05, 0.1, 0.2, 0.3), 10, 1000, 32, 4, 20_000, (0, 1, 2)
PARAMS = 0.5
NETWORKS = ("dense", "trained on levels", "low rank")


def networks(seed: int) -> dict[str, nn.Module]:
    """Return the three networks; two of them are trained on for an epoch each."""
    torch.manual_seed(seed)
    dense, loss = dense_of("lenet5"), nn.CrossEntropyLoss()
    data = zoo.fashion_mnist(batch_size=128, seed=seed, limit=IMAGES + 5000)

    def trained(model: nn.Module, courses: Any = ()) -> nn.Module:
        sp.fit(model, data.train, loss, torch.optim.Adam(model.parameters(), 3e-4), 1, courses=courses, progress=False)
        return model.eval()

    made = {"dense": dense, "trained on levels": trained(dense_of("lenet5").train(), [StraightThrough({"*": Levels(BITS + 1)})])}
    images = next(iter(data.val))[0][:1]
    low = sp.factorize(dense)
    low = sp.prune(low, sp.allocate(low, sp.Budget(params=PARAMS), images))
    return made | {"low rank": sp.merge(trained(low.train()))}


def run(seed: int) -> list[dict[str, Any]]:
    """Return a row for each network and deviation."""
    test = zoo.fashion_mnist(batch_size=500, seed=0).test
    known = [batch for batch, _ in zip(test, range(TESTED // 500), strict=False)]
    mapping, loss, rows = Mapping(TILE, TILE, BITS), nn.CrossEntropyLoss(), []
    for name, model in networks(seed).items():
        price = price_on_crossbars(model, Device(bits=BITS), mapping)
        digital = sp.evaluate(model, known, loss)["accuracy"]
        for sigma in SIGMAS:
            found = monte_carlo(model, known, loss, Device(bits=BITS, programming=sigma), mapping, draws=DRAWS if sigma else 1)
            rows.append({"network": name, "sigma": sigma, "tiles": price.tiles, "digital": digital, "accuracies": list(found.accuracies)})
            print(seed, name, sigma, f"{100 * found.accuracy[0]:.2f}", flush=True)
    return rows


def groups() -> dict[tuple[str, float], list[dict[str, Any]]]:
    """Return the rows of all seeds by network and deviation."""
    found = defaultdict(list)
    for path in sorted(RESULTS.glob("lenet5-*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            found[row["network"], row["sigma"]].append(row)
    return found


def table() -> str:
    """Return the table of all seeds: means over seeds and draws, and the standard deviation over both."""
    found = groups()
    lines = [
        "| network | tiles | digital | " + " | ".join(f"deviation {sigma:g}" for sigma in SIGMAS) + " |",
        "|---|--:|--:|" + "--:|" * len(SIGMAS),
    ]
    for name in NETWORKS:
        first, cells = found[name, SIGMAS[0]], []
        for sigma in SIGMAS:
            values = [100 * value for row in found[name, sigma] for value in row["accuracies"]]
            cells.append(mean_std(values))
        tiles = sorted({row["tiles"] for row in first})
        digital = statistics.mean(100 * row["digital"] for row in first)
        lines.append(f"| {name} | {', '.join(map(str, tiles))} | {digital:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_deviations(curves: Keyed[str, Sequence[Sequence[float]]], path: Path) -> None:
    """Draw accuracies in % against the deviations `SIGMAS`: mean and standard deviation, side by side by a little."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "spectrim"
    from matplotlib.figure import Figure

    made = Figure(figsize=(6.4, 4), layout="constrained")
    axes = made.subplots()
    for shift, (name, curve) in enumerate(curves.items()):
        spread, places = [statistics.stdev(some) if len(some) > 1 else 0.0 for some in curve], [x + 0.003 * (shift - 2) for x in SIGMAS]
        axes.errorbar(places, [statistics.fmean(some) for some in curve], spread, label=name, marker="o", capsize=3)
    axes.set_xlabel("standard deviation of log conductance")
    axes.set_ylabel("accuracy, %")
    axes.legend()
    made.savefig(path, metadata={"Date": None})


def draw() -> None:
    """Draw accuracy against deviation."""
    found = groups()
    values = {name: [[100 * value for row in found[name, sigma] for value in row["accuracies"]] for sigma in SIGMAS] for name in NETWORKS}
    draw_deviations(values, PLOT)


def main() -> None:
    """Run what is missing, or render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="write table and picture of the method card from the result files")
    if parser.parse_args().render:
        put(CARD, START, END, table())
        draw()
        return
    torch.set_num_threads(1)
    for seed in SEEDS:
        path = RESULTS / f"lenet5-{seed}.json"
        if path.exists():
            continue
        settings = {"seed": seed, "draws": DRAWS, "tested": TESTED, "tile": TILE, "bits": BITS, "images": IMAGES, "params": PARAMS}
        rows = run(seed)
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"settings": settings, "environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
