"""The forms of a convolution side by side at equal multiply-accumulates: three SVD folds, Tucker-2, CP, tensor trains, and `auto`.

.venv/bin/python benchmarks/forms.py            # writes benchmarks/results/forms/*.json, one file a row; a finished row is skipped
.venv/bin/python benchmarks/forms.py --speed    # times the cut networks side by side, one process alone; results/forms/speed/*.json
.venv/bin/python benchmarks/forms.py --table    # renders docs/forms.md from them

Ranks and cuts by spectral energy (``cut="plain"``), the same data, steps and learning rates for all. The refit to the dense outputs exists
for matrices only: in a row of another form it changes the other layers. So it is a column beside those that all forms have. The
validation split (5,000 images) scores every stage, the test split is read once, by the finished row.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectrim as sp
from cells import mean_std
from micro.harness import environment
from spectrim import zoo
from spectrim.budget.costs import calls
from spectrim.budget.cut_to import Workbench
from spectrim.budget.ladder import ladder
from spectrim.budget.schemes import AMONG, at_budget
from spectrim.budget.ways import WAYS
from spectrim.errors import SettingError
from spectrim.files import write_text
from spectrim.layers import named_layers

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results" / "forms", HERE.parent / "docs" / "forms.md"
SCHEMES = ("channel", "spatial", "input", "tucker", "cp", "tt", "auto", "all")
NETWORKS = {"resnet8": "ResNet-8, CIFAR-10", "lenet5": "LeNet-5, Fashion-MNIST"}
BUDGETS, SEEDS, EPOCHS, IMAGES, EXAMPLES, DENSE_EPOCHS = (0.5, 0.33), (0, 1, 2), 2, 10_000, 512, 5


def data_of(network: str, seed: int, limit: int | None = None) -> zoo.data.Splits:
    """Return the splits of a network's task."""
    if network == "resnet8":
        return zoo.cifar10(batch_size=128, normalize="raw", augment=False, seed=seed, limit=limit)
    return zoo.fashion_mnist(batch_size=128, seed=seed, limit=limit)


def dense_of(network: str) -> nn.Module:
    """Return the dense network: published weights of ResNet-8; LeNet-5 trained here once, kept in the results' folder."""
    if network == "resnet8":
        return zoo.mlperftiny_resnet8(pretrained=True).eval()
    torch.manual_seed(0)
    model, path = zoo.lenet5(), RESULTS / "lenet5.safetensors"
    from safetensors.torch import load_model, save_model

    if path.exists():
        load_model(model, path)
        return model.eval()
    data = data_of(network, 0)
    sp.fit(model, data.train, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), 1e-3), DENSE_EPOCHS, progress=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, path)
    return model.eval()


def rows() -> Iterator[tuple[str, float, str, int | None]]:
    """Yield ``(network, budget, scheme, seed)``; None for calibration only, which draws nothing."""
    for budget in BUDGETS:
        for network in NETWORKS:
            yield from ((network, budget, scheme, None) for scheme in SCHEMES)
    for seed in SEEDS:
        for network in NETWORKS:
            yield from ((network, BUDGETS[0], scheme, seed) for scheme in SCHEMES)


def run(network: str, budget: float, scheme: str, seed: int | None) -> dict[str, Any]:
    """Compress once; with a seed, fine-tune on a part of the training split."""
    torch.manual_seed(seed or 0)
    data, dense, loss = data_of(network, seed or 0), dense_of(network), nn.CrossEntropyLoss()
    train = data.train if seed is None else data_of(network, seed, IMAGES + 5000).train
    settings: dict[str, Any] = {"cut": "plain", "examples": EXAMPLES, "eval_data": data.val, "distill": None, "progress": False}
    made = sp.compress(dense, train, loss, sp.Budget(macs=budget), 0 if seed is None else EPOCHS, scheme=scheme, **settings)
    convolutions = [layer for _, layer in named_layers(made.low) if hasattr(layer, "kernel_size")]
    return {
        "macs": made.measured["final"].macs,
        "dense_macs": made.measured["dense"].macs,
        "params": made.measured["final"].params,
        "schemes": dict(Counter(layer.scheme for layer in convolutions)),
        "val": {stage: dict(scores) for stage, scores in made.scores.items()},
        "tried": {stage: dict(scores) for stage, scores in made.dropped.items()},
        "test": sp.evaluate(made.model, data.test, loss),
        "dense_test": sp.evaluate(dense, data.test, loss),
    }


def cut(network: str, scheme: str, x: torch.Tensor) -> nn.Module:
    """Return the network that `run` makes without training, but for the refit and the statistics: it runs the same operations."""
    dense, budget = dense_of(network), sp.Budget(macs=BUDGETS[0])
    low = sp.factorize(dense, scheme, example_inputs=x)
    prices = ladder(low, x, dense_model=dense)
    if scheme in AMONG:
        low, prices = at_budget(low, budget, x, prices, dense, calls(low, x), among=AMONG[scheme])
    bench = Workbench(low, x, prices=prices)
    bench.cut(bench.ranks(budget, WAYS["plain"]), WAYS["plain"])
    return sp.merge(bench.network).eval()


def speed(network: str) -> dict[str, Any]:
    """Time the cut networks and the dense one in turns: seconds of a call, by batch size."""
    torch.manual_seed(0)
    x = next(iter(data_of(network, 0).val))[0]
    models = {"dense": dense_of(network)} | {scheme: cut(network, scheme, x[:1]) for scheme in SCHEMES}
    found: dict[str, Any] = {}
    for batch in (1, 32):
        times = sp.compare_latency(models, x[:batch], repeats=7)
        found[str(batch)] = {name: {"median_s": time.median_s, "iqr_s": time.iqr_s} for name, time in times.items()}
    return {"network": network, "budget": BUDGETS[0], "environment": environment(), "seconds": found}


def name_of(network: str, budget: float, scheme: str, seed: int | None) -> str:
    """Return the name of a row's file."""
    return f"{network}-{budget}-{scheme}-{'calibrated' if seed is None else f'seed{seed}'}.json"


def main() -> None:
    """Run what is missing, or render the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows of these networks and schemes, such as lenet5 cp tt")
    parser.add_argument("--calibrated", action="store_true", help="rows without training alone")
    parser.add_argument("--speed", action="store_true", help="time the cut networks, compress nothing")
    parser.add_argument("--table", action="store_true", help="write docs/forms.md from the result files")
    parser.add_argument("--check", action="store_true", help="is docs/forms.md what --table would write?")
    given = parser.parse_args()
    if given.check:
        sys.exit(
            None if PAGE.read_text(encoding="utf-8") == page() else "docs/forms.md is not up to date: python benchmarks/forms.py --table"
        )
    if given.table:
        write_text(PAGE, page())
        return
    torch.set_num_threads(1)
    if given.speed:
        (RESULTS / "speed").mkdir(parents=True, exist_ok=True)
        for network in NETWORKS:
            write_text(RESULTS / "speed" / f"{network}.json", json.dumps(speed(network), indent=1) + "\n")
        return
    chosen = {*given.only}
    for row in rows():
        left_out = any(names & chosen and name not in chosen for name, names in ((row[0], {*NETWORKS}), (row[2], {*SCHEMES})))
        if left_out or (given.calibrated and row[3] is not None):
            continue
        path = RESULTS / name_of(*row)
        if path.exists():
            continue
        settings = dict(zip(("network", "budget", "scheme", "seed"), row, strict=True))
        more = {"epochs": 0 if row[3] is None else EPOCHS, "images": None if row[3] is None else IMAGES, "examples": EXAMPLES}
        try:
            measured = run(*row)
        except SettingError as error:  # a budget below the smallest network of this scheme
            measured = {"problem": str(error)}
        found = {"settings": settings | more, "environment": environment()} | measured
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found, indent=1) + "\n")
        print(path.name, found.get("problem") or f"{100 * found['test']['accuracy']:.2f} %", flush=True)


def page() -> str:
    """Render the page from the files that are there."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    groups: dict[Any, list[Any]] = defaultdict(list)
    for row in found:
        settings = row["settings"]
        groups[settings["network"], settings["budget"], settings["scheme"], settings["epochs"]].append(row)
    lines = [
        "# Forms of a convolution, measured",
        "",
        "<!-- written by benchmarks/forms.py --table -->",
        "",
        "Ranks and cuts by spectral energy at equal multiply-accumulates. *As cut* and *BatchNorm renewed* are on the validation split,",
        "for all forms; the refit to the dense network's outputs leaves Tucker, CP and tensor-train layers as they are. *Test* is the",
        "finished network on 10,000 test images.",
    ]
    for network, title in NETWORKS.items():
        for budget in BUDGETS:
            times = _speedups(network) if budget == BUDGETS[0] else {}
            some = [groups[network, budget, scheme, 0] for scheme in SCHEMES]
            if not any(some):
                continue
            dense = next(row for group in some for row in group if "dense_test" in row)["dense_test"]["accuracy"]
            lines += ["", f"## {title}, {100 * budget:g} % of the MACs (dense {100 * dense:.1f} %)", ""]
            heads = ["form", "layers", "as cut", "BatchNorm renewed", "refitted", "test, no training", "test, fine-tuned"]
            heads += ["times the dense speed"] * bool(times)
            lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
            for scheme, group in zip(SCHEMES, some, strict=True):
                tuned = groups[network, budget, scheme, EPOCHS]
                if group:
                    lines.append(_line(scheme, group[0], tuned, times.get(scheme)))
    lines += [
        "",
        f"Fine-tuned: {EPOCHS} epochs on {IMAGES:,} training images, no teacher; mean and standard deviation over the seeds given. "
        "`auto` is what `compress` does by default: it chooses among the folds of matrices for each layer together with all ranks; `all` "
        "chooses among all forms."
        + (" Times the dense speed: medians at batches of 1 and 32, one thread, all in turns." if any(map(_speedups, NETWORKS)) else ""),
        "",
    ]
    return "\n".join(lines)


def _speedups(network: str) -> dict[str, str]:
    """Return by scheme how many times as fast as the dense network it is, at batches of 1 and 32."""
    path = RESULTS / "speed" / f"{network}.json"
    if not path.exists():
        return {}
    seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"]
    return {
        scheme: " / ".join(f"{each['dense']['median_s'] / each[scheme]['median_s']:.2f}" for each in seconds.values()) for scheme in SCHEMES
    }


def _line(scheme: str, row: Any, tuned: list[Any], speedup: str | None) -> str:
    if "problem" in row:
        return f"| {scheme} | no ranks reach this budget | | | | | |" + " |" * (speedup is not None)
    stages = row["val"] | row["tried"]
    parts = [_percent(stages.get(stage)) for stage in ("cut", "recalibrated", "corrected")]
    layers = ", ".join(f"{count} {name}" for name, count in row["schemes"].items())
    accuracies = [100 * one["test"]["accuracy"] for one in tuned]
    after = f"{mean_std(accuracies)} (n={len(accuracies)})" if accuracies else ""
    return f"| {scheme} | {layers} | {' | '.join(parts)} | {_percent(row['test'])} | {after} |" + (f" {speedup} |" if speedup else "")


def _percent(scores: Any) -> str:
    return "" if scores is None else f"{100 * scores['accuracy']:.1f} %"


if __name__ == "__main__":
    main()
