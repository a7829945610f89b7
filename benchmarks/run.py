"""Run benchmark cases and write their results: ``python benchmarks/run.py [TASK[/METHOD] ...]``.

A case is ``benchmarks/cases/TASK/METHOD.yaml``: a recipe, its seeds, and whether it is long (then it runs only when it is named). What is
finished is skipped, so a stopped run goes on where it was. Results go to ``benchmarks/results/TASK/METHOD.json``, then ``report.py``
renders them into ``docs/results.md``.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

import report
from spectrim.pipeline.recipe import read_recipe
from spectrim.pipeline.run import Run

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NETWORKS = ("dense", "final", "truncated", "continued")


def cases(names: list[str]) -> list[Path]:
    """Return the case files that are named, or all that are not long."""
    every = sorted((HERE / "cases").glob("*/*.yaml"))
    if not names:
        return [path for path in every if not yaml.safe_load(path.read_text()).get("long")]
    chosen = [path for path in every if any(label(path) == name or path.parent.name == name for name in names)]
    if not chosen:
        sys.exit(f"no such case: {', '.join(names)}; there are: {', '.join(label(path) for path in every)}")
    return chosen


def label(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def git_state() -> dict[str, Any]:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return {"commit": git("rev-parse", "HEAD"), "changed_files": len(git("status", "--porcelain", "src", "recipes").splitlines())}


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return mean and sample standard deviation over seeds, for each network and number."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for network in (name for name in NETWORKS if name in runs[0]):
        table[network] = {}
        for key, first in runs[0][network].items():
            if isinstance(first, int | float):
                values = [run[network][key] for run in runs]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                table[network][key] = {"mean": statistics.fmean(values), "std": spread, "n": len(values)}
    return table


def main(names: list[str]) -> None:
    for path in cases(names):
        case = yaml.safe_load(path.read_text())
        runs = []
        for seed in case["seeds"]:
            print(f"== {label(path)}, seed {seed}", file=sys.stderr)
            recipe = read_recipe(ROOT / case["recipe"], [f"seed={seed}"])
            runs.append(Run(recipe, ROOT / "runs" / "benchmarks" / path.parent.name / path.stem / f"seed-{seed}").run())
        target = HERE / "results" / path.parent.name / f"{path.stem}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        seconds = [sum(stage.get("seconds", 0.0) for stage in run["stages"].values()) for run in runs]
        content = {"case": case, "git": git_state(), "wall_s": seconds, "summary": summary(runs), "runs": runs}
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(target)
        print(f"written: {target.relative_to(ROOT)}", file=sys.stderr)
    report.main()


if __name__ == "__main__":
    main(sys.argv[1:])
