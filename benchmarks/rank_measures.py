"""Measures of rank as penalties at equal cost: each with a strength chosen on the validation split, cut, fine-tuned, three seeds.

python benchmarks/rank_measures.py           # writes benchmarks/results/rank_measures/*.json; rows that are there are skipped
python benchmarks/rank_measures.py --safety  # what happens without the rising strength and without clipping, at a high rate
python benchmarks/rank_measures.py --render  # writes the tables of docs/methods/rank-measures.md

One protocol for all: a dense network, `FULL` epochs at full rank with the penalty (rising over the first half) and orthogonality 1.0, a
cut by spectral energy to a budget of multiply-accumulates, `TUNE` epochs of fine-tuning with orthogonality alone. The classifier is not
factorized. Strengths are chosen by validation accuracy after fine-tuning, on seed 0, for each budget; these runs never see the test split.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
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
from spectrim.penalties import L1, CumulativeShrinkage, EffectiveRank, HoyerSquare, LogDeterminant, NuclearNorm, Schatten
from spectrim.training.rise import Rise

HERE = Path(__file__).resolve().parent
RESULTS, CARD = HERE / "results" / "rank_measures", HERE.parent / "docs" / "methods" / "rank-measures.md"
SEEDS, DENSE, FULL, TUNE, RATE, CLIP, BATCH = (0, 1, 2), 5, 6, 4, 1e-3, 1.0, 100
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
FINER = {"mlp": {"effective rank": (3e-3, 3e-2), "Hoyer": (0.3,)}}
"""Further strengths: between those of the grid, for the measure that was said to win; behind its end, where that was best."""

MEASURES: dict[str, Callable[[float], Any]] = {
    "l1": L1,
    "nuclear norm": NuclearNorm,
    "Hoyer": sp.Hoyer,
    "Hoyer squared": HoyerSquare,
    "effective rank": EffectiveRank,
    "log-determinant": LogDeterminant,
    "Schatten 1/2": Schatten,
    "cumulative shrinkage": CumulativeShrinkage,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"title": "MLP 784-100-100-10, MNIST", "images": 8000, "budgets": [0.33, 0.17], "strengths": STRENGTHS},
    "lenet5": {"title": "LeNet-5, Fashion-MNIST", "images": 4000, "budgets": [0.33], "strengths": STRENGTHS},
}
SAFE_RATE, SAFE_STRENGTH = 0.05, 0.1


def network(name: str) -> nn.Module:
    """Return a network with random weights."""
    if name == "lenet5":
        return zoo.lenet5()
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


def data_of(name: str, seed: int) -> tuple[Any, Any, Any]:
    """Return a part of the training split, and the whole validation and test splits."""
    load = zoo.mnist if name == "mlp" else zoo.fashion_mnist
    whole = load(batch_size=BATCH, seed=seed)
    return load(batch_size=BATCH, seed=seed, limit=NETWORKS[name]["images"]).train, whole.val, whole.test


def trained(model: nn.Module, data: Any, epochs: int, **more: Any) -> nn.Module:
    """Train in place by Adam along one cycle of rates, clipped; return the model."""
    tuning = sp.Tuning(optimizer=partial(torch.optim.Adam, lr=RATE), clip=CLIP).with_schedule()
    sp.fit(model, data, nn.CrossEntropyLoss(), None, epochs, tuning=tuning, progress=False, **more)
    return model


class Runs:
    """Dense networks and data of one network, by seed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.made: dict[int, tuple[nn.Module, Any, Any, Any]] = {}

    def of(self, seed: int) -> tuple[nn.Module, Any, Any, Any]:
        """Return the dense network of a seed, trained once, and the data."""
        if seed not in self.made:
            torch.manual_seed(seed)
            train, val, test = data_of(self.name, seed)
            self.made[seed] = trained(network(self.name), train, DENSE).eval(), train, val, test
        return self.made[seed]

    def row(self, measure: str, strength: float, seed: int, budgets: list[float], final: bool) -> dict[str, Any]:
        """Run the protocol once for several budgets, which share the training at full rank."""
        dense, train, val, test = self.of(seed)
        loss, began = nn.CrossEntropyLoss(), time.process_time()
        torch.manual_seed(seed)
        low = sp.factorize(dense, "spatial")
        found: dict[str, Any] = {"measure": measure, "strength": strength, "seed": seed, "final": final, "budgets": {}}
        courses = [Rise(MEASURES[measure](strength))] if measure != "none" else []
        try:
            trained(low, train, FULL, penalties=[sp.Orthogonality(1.0)], courses=courses)
            found["full_val"] = sp.evaluate(low.eval(), val, loss)["accuracy"]
            x = next(iter(val))[0]
            for budget in budgets:
                cut = sp.prune(copy.deepcopy(low), sp.allocate(low, sp.Budget(macs=budget), x[:1]))
                as_cut = sp.evaluate(sp.merge(cut), val, loss)["accuracy"]
                merged = sp.merge(trained(cut.train(), train, TUNE, penalties=[sp.Orthogonality(1.0)]).eval())
                macs = sp.measure(merged, x[:1], latency=False).macs
                entry = {"macs": macs, "as_cut": as_cut, "val": sp.evaluate(merged, val, loss)["accuracy"]}
                found["budgets"][str(budget)] = entry | ({"test": sp.evaluate(merged, test, loss)["accuracy"]} if final else {})
        except DivergedError as error:
            found["problem"] = str(error).split(";")[0]
        return found | {"cpu_s": round(time.process_time() - began, 1)}


def best(rows: list[dict[str, Any]], measure: str, budget: float) -> float | None:
    """Return the strength with the highest validation accuracy after fine-tuning, of the runs that did not diverge."""
    tried = [row for row in rows if row["measure"] == measure and not row["final"] and str(budget) in row["budgets"]]
    return max(tried, key=lambda row: row["budgets"][str(budget)]["val"])["strength"] if tried else None


def wanted(name: str, rows: list[dict[str, Any]]) -> Iterator[tuple[str, float, int, list[float], bool]]:
    """Yield the runs in their order: the grid on seed 0, then the chosen strengths on all seeds."""
    budgets = NETWORKS[name]["budgets"]
    yield from ((measure, strength, 0, budgets, False) for measure in MEASURES for strength in NETWORKS[name]["strengths"])
    yield from ((measure, strength, 0, budgets, False) for measure, finer in FINER.get(name, {}).items() for strength in finer)
    for seed in SEEDS:
        yield "none", 0.0, seed, budgets, True
        for measure in MEASURES:
            chosen: dict[float, list[float]] = {}
            for budget in budgets:
                if (strength := best(rows, measure, budget)) is not None:
                    chosen.setdefault(strength, []).append(budget)
            yield from ((measure, strength, seed, some, True) for strength, some in chosen.items())


def measure_all(name: str) -> None:
    """Run what is missing of one network; its file is written after each run."""
    path, runs = RESULTS / f"{name}.json", Runs(name)
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": [], "dense": {}}
    settings = {"epochs": [DENSE, FULL, TUNE], "rate": RATE, "clip": CLIP, "batch": BATCH} | NETWORKS[name]
    key = ("measure", "strength", "seed", "final")
    for measure, strength, seed, budgets, final in wanted(name, held["rows"]):
        if (measure, strength, seed, final) in [tuple(row[part] for part in key) for row in held["rows"]]:
            continue
        row = runs.row(measure, strength, seed, budgets, final)
        held["rows"].append(row)
        dense, _, _, test = runs.of(seed)
        if final and str(seed) not in held["dense"]:
            held["dense"][str(seed)] = sp.evaluate(dense, test, nn.CrossEntropyLoss())["accuracy"]
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"settings": settings, "environment": environment()} | held, indent=1) + "\n")
        told = {budget: round(100 * entry["val"], 2) for budget, entry in row["budgets"].items()}
        print(name, measure, strength, seed, "final" if final else "", row.get("problem") or told, row["cpu_s"], flush=True)


def safety() -> None:
    """Train at a high rate by SGD with a strong penalty: at once or rising, clipped or not."""
    path, rows, runs = RESULTS / "safety.json", [], Runs("mlp")
    for measure in ("effective rank", "Hoyer"):
        for rising, clip in ((False, None), (True, None), (False, CLIP), (True, CLIP)):
            for seed in SEEDS:
                dense, train, val, _ = runs.of(seed)
                torch.manual_seed(seed)
                low, penalty = sp.factorize(dense, "spatial"), MEASURES[measure](SAFE_STRENGTH)
                tuning = sp.Tuning(optimizer=partial(torch.optim.SGD, lr=SAFE_RATE, momentum=0.9), clip=clip)
                ways: dict[str, Any] = {"courses": [Rise(penalty)]} if rising else {"penalties": [penalty, sp.Orthogonality(1.0)]}
                if rising:
                    ways["penalties"] = [sp.Orthogonality(1.0)]
                row: dict[str, Any] = {"measure": measure, "rising": rising, "clip": clip, "seed": seed}
                try:
                    sp.fit(low, train, nn.CrossEntropyLoss(), None, 2, tuning=tuning, progress=False, **ways)
                    row["val"] = sp.evaluate(low.eval(), val, nn.CrossEntropyLoss())["accuracy"]
                except DivergedError as error:
                    row["problem"] = str(error).split(";")[0]
                rows.append(row)
                print(row, flush=True)
    settings = {"rate": SAFE_RATE, "momentum": 0.9, "strength": SAFE_STRENGTH, "epochs": 2, "images": NETWORKS["mlp"]["images"]}
    write_text(path, json.dumps({"settings": settings, "environment": environment(), "rows": rows}, indent=1) + "\n")


def table(name: str) -> list[str]:
    """Return the lines of one network's table, the best measure at the first budget first."""
    held = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    if not held["dense"]:  # the strengths are not chosen yet
        return []
    budgets, dense = held["settings"]["budgets"], [100 * value for value in held["dense"].values()]
    lines = [f"**{NETWORKS[name]['title']}**, {held['settings']['images']:,} images; dense {mean_std(dense, 2)} %.", ""]
    head = "".join(f" strength | as cut, validation | test at {100 * budget:g} % |" for budget in budgets)
    lines += ["| measure |" + head, "|---|" + "---|" * 3 * len(budgets)]
    made = []
    for measure in ("none", *MEASURES):
        cells, order = [], 0.0
        for budget in budgets:
            strength = 0.0 if measure == "none" else best(held["rows"], measure, budget)
            of = [row for row in held["rows"] if row["final"] and (row["measure"], row["strength"]) == (measure, strength)]
            entries = [row["budgets"][str(budget)] for row in of if str(budget) in row["budgets"]]
            if not entries:
                cells += ["", "", "diverged"]
                continue
            tests = [100 * entry["test"] for entry in entries]
            order = order or statistics.mean(tests)
            cells += [f"{strength:g}", mean_std([100 * entry["as_cut"] for entry in entries], 2), f"{mean_std(tests, 2)} (n={len(tests)})"]
        made.append((order, f"| {measure} | {' | '.join(cells)} |"))
    return [*lines, *(line for _, line in sorted(made, reverse=True)), ""]


def safety_table() -> list[str]:
    """Return the lines of the table of what diverges."""
    held = json.loads((RESULTS / "safety.json").read_text(encoding="utf-8"))
    lines = ["| measure | at once | rising | at once, clipped | rising, clipped |", "|---|---|---|---|---|"]
    for measure in dict.fromkeys(row["measure"] for row in held["rows"]):
        cells = []
        for clip in (None, CLIP):
            for rising in (False, True):
                of = [row for row in held["rows"] if (row["measure"], row["rising"], row["clip"]) == (measure, rising, clip)]
                values = [100 * row["val"] for row in of if "val" in row]
                lost = len(of) - len(values)
                cells.append(", ".join(([mean_std(values, 2)] if values else []) + ([f"{lost} of {len(of)} diverged"] if lost else [])))
        lines.append(f"| {measure} | {' | '.join(cells)} |")
    return [*lines, ""]


def render(text: str) -> str:
    """Return a card with today's tables."""
    tables = {"measures": [line for name in NETWORKS if (RESULTS / f"{name}.json").exists() for line in table(name)]}
    tables["safety"] = safety_table() if (RESULTS / "safety.json").exists() else []
    for mark, lines in tables.items():
        before, _, rest = text.partition(f"<!-- {mark} -->\n")
        _, _, after = rest.partition(f"<!-- end {mark} -->")
        text = f"{before}<!-- {mark} -->\n" + "\n".join(lines) + f"<!-- end {mark} -->{after}"
    return text


def main() -> None:
    """Run what is missing, or render the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="which networks; all when omitted")
    parser.add_argument("--safety", action="store_true", help="what diverges at a high rate")
    parser.add_argument("--render", action="store_true", help="write the tables of the card")
    parser.add_argument("--check", action="store_true", help="are the tables of the card those of the files?")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.render:
        write_text(CARD, render(CARD.read_text(encoding="utf-8")))
    elif given.check:
        text = CARD.read_text(encoding="utf-8")
        sys.exit(None if text == render(text) else "docs/methods/rank-measures.md: python benchmarks/rank_measures.py --render")
    elif given.safety:
        safety()
    else:
        for name in given.networks:
            measure_all(name)


if __name__ == "__main__":
    main()
