"""Networks that nobody here trained, compressed without labels: ``python benchmarks/real/run.py [CASE ...]``.

For each budget: plain truncated SVD at the same cost; `compress` without labels and training (calibration, cut, refit); where that leaves
something to gain, the same with block reconstruction. A row is skipped where the result file has it
(``benchmarks/results/real/CASE.json``, written after every row). Then the dense network and those after the refit at half and less are
timed in turns (``--time`` does it again). ``--trial`` scores the validation set, prints and writes nothing. ``report`` writes
``docs/real-networks.md``; with ``--check`` it compares.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fetch
import real_page
import spectrim as sp
from real_cases import CASES, Case
from spectrim.budget.cut_to import cut_to
from spectrim.budget.ways import WAYS
from spectrim.files import write_text
from spectrim.metrics.macs import count_macs
from spectrim.pipeline.environment import environment
from spectrim.training.reconstruct import reconstruct

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "real"
MODELS = ROOT / "runs" / "real"
METHODS = ("truncated", "refit", "reconstructed")


def resident(name: str) -> int:
    """Return the memory of this process in bytes: ``VmRSS`` now, ``VmHWM`` at most since `forget_peak`."""
    return int(Path("/proc/self/status").read_text(encoding="utf-8").split(f"{name}:")[1].split()[0]) * 1024


def forget_peak() -> None:
    """Let the largest memory so far be that of now (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def step_of(model: nn.Module, one: Any) -> Any:
    """Return one call of a network in ONNX Runtime, on one thread."""
    arguments = one if isinstance(one, tuple) else (one,)
    from harness import session_of

    session = session_of(model, arguments)
    feed = {given.name: value.numpy() for given, value in zip(session.get_inputs(), arguments, strict=True)}
    with torch.no_grad():
        out = model(*arguments)
    first = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), first, rtol=1e-3, atol=1e-3)  # another library's sums
    return lambda: session.run(None, feed)


def truncated(model: nn.Module, case: Case, budget: sp.Budget) -> nn.Module:
    """Return the plain cut at the same cost: ranks by the spectra, nothing calibrated."""
    low, _ = cut_to(sp.factorize(model, example_inputs=case.one()), budget, WAYS["plain"], case.one(), lambda network: {"loss": 0.0})
    return sp.merge(low.eval())


def refit(model: nn.Module, case: Case, budget: sp.Budget, seed: int) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Return the network after `compress` without labels, merged and in its factors, and what was chosen."""
    data = case.inputs("calibration", seed)
    made = sp.compress(model, data, budget=budget, example_inputs=case.one(), examples=case.calibration, progress=False, **case.settings)
    return made.model, made.low, {"way": made.cut, "stages": {stage: dict(found) for stage, found in made.scores.items()}}


def reconstructed(low: nn.Module, dense: nn.Module, case: Case, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network after the steps toward the dense one, and what they brought."""
    assert case.reconstruct is not None
    settings = replace(case.reconstruct, seed=seed)
    data = case.inputs("calibration", seed) if case.unlabeled is None else case.unlabeled(seed)
    better, parts = reconstruct(low, dense, data, settings)
    return sp.merge(better.eval()), {"reconstruct": asdict(settings), "parts": [asdict(part) for part in parts]}


def one_row(case: Case, method: str, budget: dict[str, float], seed: int, split: str) -> dict[str, Any]:
    """Make one row, in this process."""
    torch.manual_seed(seed)
    dense, limit, one = case.model(), sp.Budget(**budget), case.one()
    low_file = MODELS / f"{label(case.name, 'low', budget, seed)}.pt"
    low = dense
    if method == "reconstructed":
        low = torch.load(low_file, weights_only=False) if low_file.is_file() else refit(dense, case, limit, seed)[1]
    forget_peak()
    before, start, wall = resident("VmRSS"), time.process_time(), time.perf_counter()
    if method == "truncated":
        model, told = truncated(dense, case, limit), {}
    elif method == "refit":
        model, low, told = refit(dense, case, limit, seed)
    else:
        model, told = reconstructed(low, dense, case, seed)
    row = {
        "seconds": time.process_time() - start,
        "wall_s": time.perf_counter() - wall,
        "start_bytes": before,
        "peak_bytes": resident("VmHWM"),
        **told,
    }
    model = model.eval()
    costs = {name: (count_macs(net, one), sum(p.numel() for p in net.parameters())) for name, net in (("dense", dense), ("low", model))}
    row |= {unit: costs["low"][i] / costs["dense"][i] for i, unit in enumerate(("macs", "params"))}
    row["score"] = case.score(model, split)
    if split == "test":
        MODELS.mkdir(parents=True, exist_ok=True)
        torch.save(model, MODELS / f"{label(case.name, method, budget, seed)}.pt")
        if method == "refit":
            torch.save(low, low_file)
    return row


def label(name: str, method: str, budget: dict[str, float], seed: int) -> str:
    """Return the name of a row's network in `MODELS`."""
    return "-".join([name, method, *(f"{limit}{value:g}" for limit, value in budget.items()), str(seed)])


def timed(case: Case, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Time the dense network and those after the refit at half and less in ONNX Runtime: in turns, one thread, one call."""
    sys.path.append(str(ROOT / "benchmarks" / "micro"))
    from harness import in_turns, ratios

    steps = {"dense": step_of(case.model(), case.one())}
    for row in rows:
        path = MODELS / f"{label(case.name, row['method'], row['budget'], row['seed'])}.pt"
        if row["method"] == "refit" and min(row["budget"].values()) <= 0.5 and path.is_file():
            model = torch.load(path, weights_only=False)  # written by `one_row`
            steps[json.dumps(row["budget"])] = step_of(model, case.one())
    found = ratios(in_turns(steps, rounds=15, min_time=0.05), "dense", speedup=True)
    return {"rows": found, "load": os.getloadavg()[0], "onnxruntime": version("onnxruntime")}


def described(case: Case) -> dict[str, Any]:
    """Return the settings that a row depends on, as they stand in its file."""
    wheel = fetch.WHEELS[case.package]
    return {
        "wheel": f"{wheel.package}=={wheel.version}", "sha256": wheel.sha256, "metric": case.metric, "lower": case.lower,
        "calibration": case.calibration, "settings": {name: repr(value) for name, value in case.settings.items()},
    }  # fmt: skip


def measured(name: str, seed: int, budgets: list[dict[str, float]], again: bool) -> None:
    """Make the rows that the result file of a case lacks."""
    case, path = CASES[name], RESULTS / f"{name}.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"case": name, "rows": []}
    if content.get("described", described(case)) != json.loads(json.dumps(described(case))):
        sys.exit(f"{path.name} was made with other settings: delete it")
    if "dense" not in content:
        model = case.model()
        content |= {"described": described(case), "dense": {"score": case.score(model, "test")}}
        content["dense"] |= {"macs": count_macs(model, case.one()), "params": sum(p.numel() for p in model.parameters())}
    done = [(row["method"], row["budget"], row["seed"]) for row in content["rows"]]
    for budget in budgets or case.budgets:
        for method in METHODS:
            if (method, budget, seed) in done or (method == "reconstructed" and budget not in case.rebuilt):
                continue
            row = one_row(case, method, budget, seed, "test")
            git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
            content["rows"].append({"method": method, "budget": budget, "seed": seed, **row, "commit": git})
            write(path, content)
            print(name, budget, method, {key: row[key] for key in ("score", "seconds", "macs", "params")}, flush=True)

    if again or "onnx" not in content or len(content["rows"]) > len(done):
        before, found = content.get("onnx", {"rows": {}}), timed(case, content["rows"])
        content["onnx"] = found | {"rows": before["rows"] | found["rows"]}  # networks that lie in no file here keep what was measured
        write(path, content)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a result file, with what it depends on."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content | environment(), indent=1) + "\n")


def budgets_of(text: str) -> list[dict[str, float]]:
    """Return budgets out of ``0.5,macs=0.5+params=0.5``."""
    found = []
    for part in text.split(","):
        limits = [limit.split("=") for limit in (part if "=" in part else f"macs={part}").split("+")]
        found.append({name: float(value) for name, value in limits})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; or report")
    parser.add_argument("--budgets", type=budgets_of, default=[], help="such as 0.5,0.35 (multiply-accumulates), or macs=0.5+params=0.5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trial", choices=METHODS, help="score the validation set, and write nothing")
    parser.add_argument("--time", action="store_true", help="measure the speed again")
    parser.add_argument("--check", action="store_true", help="with report: is the page what the files say?")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.cases == ["report"]:
        present = real_page.PAGE.read_text(encoding="utf-8") if real_page.PAGE.is_file() else ""
        if given.check and real_page.page() != present:
            sys.exit(f"{real_page.PAGE.name} is not what the result files say: python benchmarks/real/run.py report")
        if not given.check:
            write_text(real_page.PAGE, real_page.page())
        return
    for name in given.cases or CASES:
        if given.trial:
            print(name, "dense", CASES[name].score(CASES[name].model(), "validation"), flush=True)
            for budget in given.budgets or CASES[name].budgets:
                print(
                    name, budget, given.trial, json.dumps(one_row(CASES[name], given.trial, budget, given.seed, "validation")), flush=True
                )
        else:
            measured(name, given.seed, given.budgets, given.time)


if __name__ == "__main__":
    main()
