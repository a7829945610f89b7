"""Formats of convolutions in three categories at equal multiply-accumulates and epochs: pre-train, pre-set, compression-aware.

python benchmarks/tensor_formats.py            # writes benchmarks/results/tensor_formats/*.json; rows that are there are skipped
python benchmarks/tensor_formats.py resnet8    # one case
python benchmarks/tensor_formats.py --table    # renders docs/tensor-formats.md

All start from random weights and take the same epochs in all, on the same images:

- *pre-train*: half of the epochs dense, then the cut, then half of them in the format;
- *pre-set*: all of them in the format, at sizes that the budget gives the random weights, from random parts at the scale of the dense
  initialization (`preset_`);
- *compression-aware*: half of them at full size with `L1` on the spectra of the unfoldings (singular values, norms of slices of Tucker's
  core, of components, of what is behind each cut of a train) and orthogonality where the format has it; the cut; then half of them.

Convolutions alone are factorized; the budget is on the multiply-accumulates of the network. The strength of the penalty is chosen on the
validation split by seed 0, each format by itself.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectrim as sp
from cells import mean_std
from micro.harness import environment
from spectrim import zoo
from spectrim.errors import DivergedError
from spectrim.files import write_text
from spectrim.penalties import L1
from spectrim.surgery.preset import preset_
from spectrim.training.rise import Rise

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results" / "tensor_formats", HERE.parent / "docs" / "tensor-formats.md"
FORMATS = {"channel": "SVD, channel", "spatial": "SVD, spatial", "tucker": "Tucker-2", "cp": "CP", "tt": "tensor train"}
CATEGORIES = ("pre-train", "pre-set", "compression-aware")
CLIP = 1.0
CASES: dict[str, dict[str, Any]] = {
    "lenet5": {
        "title": "LeNet-5, Fashion-MNIST",
        "images": 8000,
        "epochs": 6,
        "seeds": [0, 1, 2],
        "budget": 0.5,
        "rate": 2e-3,
        "strengths": [1e-3, 1e-2],
    },
    "resnet8": {
        "title": "ResNet-8, CIFAR-10",
        "images": 4000,
        "epochs": 6,
        "seeds": [0, 1, 2],
        "budget": 0.5,
        "rate": 4e-3,
        "strengths": [1e-3],
    },
}


HEAD = """# Formats in three categories, measured

<!-- written by benchmarks/tensor_formats.py --table -->

Convolutions of a network in five formats, at equal multiply-accumulates and equal epochs in all, dense ones included. All runs start from
random weights. Test accuracy of the merged network, mean and standard deviation over the seeds; *as cut* is on the validation split.

- *pre-train*: half of the epochs dense, the cut by spectral energy, half of them in the format.
- *pre-set*: all epochs in the format, from random parts at the scale of the dense initialization (`spectrim.surgery.preset.preset_`).
- *compression-aware*: half of the epochs at full size with `L1` on the spectra of the unfoldings (of CP: on the norms of the components) at
  a strength that the validation split chose on seed 0, the cut, half of them in the format.

`pre-train` and `compression-aware` choose ranks by spectra of trained weights, `pre-set` by those of random ones. Six epochs are short: no
network is near its final accuracy. Budgets are met by distortions as `allocate` has them: of CP those of leaving components out."""


def data_of(case: str, seed: int) -> tuple[Any, Any, Any]:
    """Return a part of the training split, and the whole validation and test splits."""
    load = partial(zoo.fashion_mnist) if case == "lenet5" else partial(zoo.cifar10, normalize="cifar10", augment=False)
    whole = load(batch_size=100, seed=seed)
    return load(batch_size=100, seed=seed, limit=CASES[case]["images"]).train, whole.val, whole.test


def network(case: str) -> nn.Module:
    """Return a network with random weights."""
    return zoo.lenet5() if case == "lenet5" else zoo.mlperftiny_resnet8()


class Runs:
    """Data and dense networks of one case, by seed."""

    def __init__(self, case: str) -> None:
        self.case, self.settings = case, CASES[case]
        self.data: dict[int, tuple[Any, Any, Any]] = {}
        self.half: dict[int, tuple[nn.Module, float]] = {}

    def of(self, seed: int) -> tuple[Any, Any, Any]:
        """Return the data of a seed."""
        if seed not in self.data:
            self.data[seed] = data_of(self.case, seed)
        return self.data[seed]

    def fit(self, model: nn.Module, seed: int, epochs: int, **more: Any) -> nn.Module:
        """Train in place by Adam along one cycle of rates, clipped; return the model in eval mode."""
        tuning = sp.Tuning(optimizer=partial(torch.optim.Adam, lr=self.settings["rate"]), clip=CLIP).with_schedule()
        sp.fit(model.train(), self.of(seed)[0], nn.CrossEntropyLoss(), None, epochs, tuning=tuning, progress=False, **more)
        return model.eval()

    def fresh(self, seed: int) -> nn.Module:
        """Return the random network of a seed."""
        torch.manual_seed(seed)
        return network(self.case)

    def dense_half(self, seed: int) -> tuple[nn.Module, float]:
        """Return the dense network after half of the epochs, trained once, and its processor seconds."""
        if seed not in self.half:
            began = time.process_time()
            self.half[seed] = self.fit(self.fresh(seed), seed, self.settings["epochs"] // 2), time.process_time() - began
        return self.half[seed]

    def factorized(self, model: nn.Module, scheme: Any) -> nn.Module:
        """Return the convolutions of a network in a format, at full size."""
        return sp.factorize(model, scheme, lambda name, module: isinstance(module, nn.Conv2d))

    def cut(self, low: nn.Module, seed: int) -> nn.Module:
        """Cut to the budget by spectral energy."""
        x = next(iter(self.of(seed)[1]))[0][:1]
        return sp.prune(low, sp.allocate(low, sp.Budget(macs=self.settings["budget"]), x))

    def row(self, category: str, scheme: str, seed: int, strength: float | None, final: bool) -> dict[str, Any]:
        """Train one network in one format and category."""
        epochs, half, found = self.settings["epochs"], self.settings["epochs"] // 2, {}
        row = {"category": category, "format": scheme, "seed": seed, "strength": strength, "final": final}
        orthogonal, (dense, before) = [sp.Orthogonality(1.0)], self.dense_half(seed) if category == "pre-train" else (self.fresh(seed), 0.0)
        began = time.process_time()
        try:
            if scheme == "dense":
                model = self.fit(dense, seed, epochs)
            elif category == "pre-train":
                low = self.cut(self.factorized(dense, scheme), seed)
                found["as_cut"] = self.score(sp.merge(low), seed, 1)
                model = sp.merge(self.fit(low, seed, half, penalties=orthogonal))
            elif category == "pre-set":
                low = self.cut(self.factorized(dense, scheme), seed)
                preset_(low, dense)
                model = sp.merge(self.fit(low, seed, epochs, penalties=orthogonal))
            else:
                low = self.factorized(dense, scheme)
                low = self.fit(low, seed, half, penalties=orthogonal, courses=[Rise(L1(strength or 0.0))])
                found["full"] = self.score(low, seed, 1)
                low = self.cut(low, seed)
                found["as_cut"] = self.score(sp.merge(low), seed, 1)
                model = sp.merge(self.fit(low, seed, half, penalties=orthogonal))
        except DivergedError as error:
            return row | {"problem": str(error).split(";")[0]}
        cpu = time.process_time() - began
        measured = sp.measure(model, next(iter(self.of(seed)[1]))[0][:1], latency=False)
        found |= {"macs": measured.macs, "params": measured.params, "val": self.score(model, seed, 1)}
        found |= {"test": self.score(model, seed, 2)} if final else {}
        return row | found | {"cpu_s": round(cpu + before, 1)}

    def score(self, model: nn.Module, seed: int, split: int) -> float:
        """Return the accuracy on the validation (1) or test split (2)."""
        return sp.evaluate(model, self.of(seed)[split], nn.CrossEntropyLoss())["accuracy"]


def chosen(rows: list[dict[str, Any]], scheme: str, strengths: list[float]) -> float | None:
    """Return the strength of the highest validation accuracy, of those tried on seed 0; the only one where there is no choice."""
    if len(strengths) == 1:
        return strengths[0]
    tried = [row for row in rows if row["format"] == scheme and row["category"] == CATEGORIES[2] and not row["final"] and "val" in row]
    return max(tried, key=lambda row: row["val"])["strength"] if tried else None


def wanted(case: str, rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, int, float | None, bool]]:
    """Yield the runs in their order: strengths on seed 0, then all categories, seed by seed."""
    strengths = CASES[case]["strengths"]
    if len(strengths) > 1:
        yield from ((CATEGORIES[2], scheme, 0, strength, False) for scheme in FORMATS for strength in strengths)
    for seed in CASES[case]["seeds"]:
        yield "dense", "dense", seed, None, True
        for scheme in FORMATS:
            for category in CATEGORIES:
                yield category, scheme, seed, chosen(rows, scheme, strengths) if category == CATEGORIES[2] else None, True


def measure_all(case: str) -> None:
    """Run what is missing of a case; its file is written after each run."""
    path, runs = RESULTS / f"{case}.json", Runs(case)
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    key = ("category", "format", "seed", "strength", "final")
    for run in wanted(case, held["rows"]):
        if run in [tuple(row[part] for part in key) for row in held["rows"]]:
            continue
        held["rows"].append(runs.row(*run[:4], run[4]))
        RESULTS.mkdir(parents=True, exist_ok=True)
        found = {"settings": CASES[case] | {"clip": CLIP}, "environment": environment()} | held
        write_text(path, json.dumps(found, indent=1) + "\n")
        told = held["rows"][-1]
        print(
            case, *run, told.get("problem") or {name: told[name] for name in ("as_cut", "val", "test", "cpu_s") if name in told}, flush=True
        )


def page() -> str:
    """Render the page from the files that are there."""
    lines = [HEAD]
    for case, given in CASES.items():
        if not (path := RESULTS / f"{case}.json").exists():
            continue
        held = json.loads(path.read_text(encoding="utf-8"))
        settings, rows = held["settings"], [row for row in held["rows"] if row["final"]]
        dense = [100 * row["test"] for row in rows if row["format"] == "dense"]
        title = f"{given['title']}, {100 * settings['budget']:g} % of the MACs"
        lines += ["", f"## {title} (dense, {settings['epochs']} epochs: {_spread(dense)})", ""]
        seeds = sorted({row["seed"] for row in rows})
        lines += [f"{settings['images']:,} training images, seeds {seeds}, Adam with one cycle up to {settings['rate']:g}.", ""]
        lines.append("| format | pre-train | pre-set | compression-aware | as cut: pre-train | as cut: aware | strength | MACs kept |")
        lines.append("|---|---|---|---|---|---|---|---|")
        whole = next(row["macs"] for row in rows if row["format"] == "dense")
        for scheme, name in FORMATS.items():
            of = {category: [row for row in rows if (row["format"], row["category"]) == (scheme, category)] for category in CATEGORIES}
            before, preset, aware = (of[category] for category in CATEGORIES)
            cells = [_of(each, "test") for each in (before, preset, aware)] + [_of(each, "as_cut") for each in (before, aware)]
            kept = " / ".join(f"{100 * statistics.mean(row['macs'] / whole for row in each):.0f} %" for each in of.values() if each)
            lines.append(f"| {name} | {' | '.join(cells)} | {chosen(held['rows'], scheme, settings['strengths']) or 0:g} | {kept} |")
    return "\n".join(lines) + "\n"


def _of(rows: list[dict[str, Any]], name: str) -> str:
    values = [100 * row[name] for row in rows if name in row]
    lost = sum("problem" in row for row in rows)
    return ", ".join(([_spread(values)] if values else []) + ([f"{lost} diverged"] if lost else []))


def _spread(values: list[float]) -> str:
    return f"{mean_std(values)} % (n={len(values)})" if values else ""


def main() -> None:
    """Run what is missing, or render the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help="which cases; all when omitted")
    parser.add_argument("--images", type=int, help="training images; 45000 for the whole split")
    parser.add_argument("--epochs", type=int, help="in all")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--table", action="store_true", help="write docs/tensor-formats.md from the result files")
    parser.add_argument("--check", action="store_true", help="is docs/tensor-formats.md what --table would write?")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for case in CASES.values():
        case.update({name: value for name in ("images", "epochs", "seeds") if (value := getattr(given, name)) is not None})
    if given.check:
        sys.exit(
            None if PAGE.read_text(encoding="utf-8") == page() else "docs/tensor-formats.md: python benchmarks/tensor_formats.py --table"
        )
    if given.table:
        write_text(PAGE, page())
        return
    for case in given.cases:
        measure_all(case)


if __name__ == "__main__":
    main()
