"""Render the table of results in ``README.md`` from ``benchmarks/results/compare``; no number is typed. ``--check`` compares it."""

import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from compare_report import Result, gather, markdown, merit_of, results, settings

PAGE = Path(__file__).resolve().parents[1] / "README.md"
NETWORKS = {"resnet8": "ResNet-8, CIFAR-10", "lenet5": "LeNet-5, Fashion-MNIST"}
"""The tasks in which every method shown has been run with several seeds."""

METHODS = {"ours": "`compress`", "truncated": "truncated SVD", "filters": "filter pruning"}


def shown(values: Sequence[float]) -> str:
    """Return mean and sample standard deviation; one value without a deviation."""
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(set(values)) > 1 else "")


def rows(name: str, title: str) -> list[list[str]]:
    """Return one row for each budget of a task, and hold that each cell is of the same seeds."""
    task = settings(name)
    found: list[Result] = [result for result in results(name) if result["epochs"] and result["method"] in METHODS]
    cells = gather(found, lambda result: merit_of(task, result["final"]["test"]))
    dense = {result["seed"]: merit_of(task, result["dense"]["test"]) for result in found}
    budgets = sorted({result["budget"] for result in found}, reverse=True)
    counts = {len(cells[method][budget]) for method in METHODS for budget in budgets}
    if counts != {len(dense)}:
        raise SystemExit(f"{name}: cells of {sorted(counts)} seeds, dense of {len(dense)}")
    start = shown(list(dense.values()))
    return [[f"{title}, {budget:.0%}", start, *(shown(cells[method][budget]) for method in METHODS)] for budget in budgets]


def table() -> str:
    """Return the table."""
    lines = [row for name, title in NETWORKS.items() for row in rows(name, title)]
    return markdown(["network, MACs kept", "dense", *METHODS.values()], lines)


def render(page: str) -> str:
    """Return the page with today's table between its marks."""
    return re.sub(r"(<!-- results -->\n\n).*?(\n<!-- end -->)", lambda match: match[1] + table() + match[2], page, flags=re.DOTALL)


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(0 if text == render(text) else f"{PAGE} is out of date: run python benchmarks/readme.py")
    PAGE.write_text(render(text), encoding="utf-8")
