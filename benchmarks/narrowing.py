"""Hidden units before ranks: ``python benchmarks/narrowing.py [--networks stories260k] [--budgets 0.7] [--steps]``.

Calibration only, without labels: hidden units are left out until the network keeps a share of what the budget limits, then ranks are cut to
the budget and refitted, as ``compress(narrow=share)`` does; share 1 leaves out none. The divergence from the dense network on the
calibration set is what ``narrow=(1, 0.95, ...)`` would choose by; merits are read once for each row, on the test split, of the language
model on the validation split. ``--steps`` makes the rows of share 1, and of the share with the lowest divergence, once more with block
reconstruction. Rows are written one by one; those that are there are skipped; ``--render`` runs none.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import recovery
import spectrim as sp
from cells import put
from run import git_state
from spectrim import zoo
from spectrim.budget.ladder import ladder
from spectrim.files import make_folder, write_json
from spectrim.metrics.distance import Divergence
from spectrim.metrics.inputs import first_examples
from spectrim.pipeline.environment import environment
from spectrim.training.parts import Reconstruction

ROOT = Path(__file__).resolve().parents[1]
RESULT, CARD = ROOT / "benchmarks" / "results" / "narrowing" / "rows.json", ROOT / "docs" / "methods" / "narrowing.md"
BEGIN, END = "<!-- narrowing: written by benchmarks/narrowing.py --render -->", "<!-- narrowing: end -->"


@dataclass(frozen=True)
class Case:
    """What is cut: budgets and shares; examples to calibrate on and for the steps; settings of `compress` and of the steps."""

    limit: str
    budgets: tuple[float, ...]
    shares: tuple[float, ...]
    examples: int
    more: int
    settings: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)


def in_blocks(name: str, layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and name.startswith("layers")


CASES = {
    "stories260k": Case(
        "params", (0.85, 0.7, 0.5), (1, 0.95, 0.9, 0.8, 0.7, 0.6), 192, 1024,
        {"where": in_blocks, "writing": "interpolative", "cut": "curved"}, {"steps": 150, "whole": 150, "logits": True, "batch": 8},
    ),
    "vit": Case(
        "macs", (0.5, 0.33), (1, 0.9, 0.8, 0.7, 0.6), 1024, 4096,
        {"writing": "interpolative"}, {"steps": 150, "whole": 150, "logits": True},
    ),
    "lenet5": Case("macs", (0.5, 0.33, 0.2), (1, 0.9, 0.7), 1024, 4096, {"scheme": "spatial"}),
    "resnet8": Case("macs", (0.5, 0.33, 0.2), (1, 0.9, 0.8, 0.7), 1024, 8192, {"scheme": "spatial"}),
}  # fmt: skip


def stories() -> tuple[nn.Module, Any, Any, str]:
    data = zoo.stories(batch_size=16, length=256)
    return zoo.stories260k().eval(), data, zoo.language_model_loss, "loss"


def task(name: str) -> tuple[nn.Module, Any, Any, str]:
    """Return the dense network, its data, its loss and what is read off."""
    if name == "stories260k":
        return stories()
    found = recovery.NETWORKS[name]
    return found.model().eval(), found.data(batch_size=128, augment=False), found.loss, "accuracy"


def kept(case: Case, model: nn.Module, inputs: Any, share: float) -> float:
    """Return the share of the whole network for a share of what is cut: of the language model the linear layers of the blocks."""
    if "where" not in case.settings:
        return share
    low = sp.factorize(model, where=case.settings["where"], writing=case.settings["writing"])
    unit = ladder(low, inputs, dense_model=model).unit(case.limit)
    return float((unit.fixed + share * unit.dense) / unit.whole)


def row(name: str, budget: float, share: float, steps: bool) -> dict[str, Any]:
    """Make one row."""
    case = CASES[name]
    model, data, loss, merit = task(name)
    data.train.set_epoch(0)
    some = [x for x, _ in first_examples(data.train, case.more if steps else case.examples)]
    inputs, began = some[0][:1], time.process_time()
    limit, width = (kept(case, model, inputs, value) for value in (budget, share))
    settings: dict[str, Any] = case.settings | ({"reconstruct": Reconstruction(**case.steps)} if steps else {})
    goal = sp.Budget(**{case.limit: limit})
    made = sp.compress(model, some, Divergence(), goal, narrow=width, examples=case.examples, progress=False, **settings)
    seconds = time.process_time() - began
    costs = [getattr(made.measured[which], case.limit) for which in ("dense", "final")]
    judged = data.val if merit == "loss" else data.test
    found = {"divergence": list(made.scores.values())[-1]["loss"], merit: sp.evaluate(made.model, judged, loss)[merit], "cut": made.cut}
    dense = sp.evaluate(model, judged, loss)[merit]
    return found | {"dense": dense, "kept": costs[1] / costs[0], "notes": made.notes, "seconds": seconds, "git": git_state()}


def label(name: str, budget: float, share: float, steps: bool) -> str:
    return f"{name} {budget:g} narrow {share:g}" + (" steps" if steps else "")


def run(networks: Sequence[str], budgets: Sequence[float] | None, steps: bool) -> None:
    """Make the rows that are missing."""
    make_folder(RESULT.parent)
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else {}
    for name in networks:
        for budget in budgets or CASES[name].budgets:
            for share in best(rows, name, budget) if steps else [share for share in CASES[name].shares if share == 1 or share > budget]:
                if (key := label(name, budget, share, steps)) in rows:
                    continue
                try:
                    rows[key] = row(name, budget, share, steps)
                except sp.errors.SettingError as error:
                    rows[key] = {"refused": str(error), "git": git_state()}
                write_json(RESULT, {"rows": rows, "environment": environment()})
                print(key, {name: value for name, value in rows[key].items() if name not in ("notes", "git")}, flush=True)


def best(rows: dict[str, Any], name: str, budget: float) -> list[float]:
    """Return 1, and the share whose row has the lowest divergence on the calibration set."""
    found = {share: rows.get(label(name, budget, share, False), {}).get("divergence") for share in CASES[name].shares}
    return sorted({1.0, float(min((share for share in found if found[share] is not None), key=lambda share: found[share], default=1.0))})


def text(name: str, entry: dict[str, Any] | None) -> str:
    """Return a cell: the merit, and the divergence in brackets."""
    if entry is None or "refused" in entry:
        return "" if entry is None else "not possible"
    merit = f"{100 * entry['accuracy']:.1f} %" if "accuracy" in entry else f"{entry['loss']:.3f}"
    return f"{merit} ({entry['divergence']:.3f})"


def page() -> list[str]:
    """Return the lines of the table."""
    rows = json.loads(RESULT.read_text())["rows"]
    shares = sorted({share for case in CASES.values() for share in case.shares}, reverse=True)
    lines = [f"| network | kept | dense | {' | '.join('none' if share == 1 else f'to {share:g}' for share in shares)} |"]
    lines.append("|---|---:|---:|" + "---:|" * len(shares))
    for name, case in CASES.items():
        for budget in case.budgets:
            for steps in (False, True):
                entries = {share: rows.get(label(name, budget, share, steps)) for share in shares}
                found = [entry for entry in entries.values() if entry and "dense" in entry]
                if not found:
                    continue
                dense = f"{100 * found[0]['dense']:.1f} %" if "accuracy" in found[0] else f"{found[0]['dense']:.3f}"
                least = min(found, key=lambda entry: entry["divergence"])
                cells = [f"**{text(name, entry)}**" if entry is least else text(name, entry) for entry in entries.values()]
                lines.append(f"| {name}{', steps' if steps else ''} | {budget:g} | {dense} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", default=",".join(CASES))
    parser.add_argument("--budgets", default="")
    parser.add_argument("--steps", action="store_true", help="with block reconstruction")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--check", action="store_true", help="fail where the card is not what the results say")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.check:
        sys.exit(0 if "\n".join(page()) in CARD.read_text(encoding="utf-8") else "run python benchmarks/narrowing.py --render")
    if not asked.render:
        run(asked.networks.split(","), [float(part) for part in asked.budgets.split(",") if part] or None, asked.steps)
    put(CARD, BEGIN, END, "\n".join(["", *page(), ""]))
