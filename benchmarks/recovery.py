"""Does a short recovery tell which cut ends best? ``python benchmarks/recovery.py [--budgets 0.5,0.2] [--seeds 0] [--render]``.

Published ResNet-8, CIFAR-10, calibrated on 512 training images, each way of ``cut=`` that `compress` compares with training to come: the
loss as it starts, after 20, 50 and 100 steps of `spectrim.pipeline.recovery.Recovery`, and after the whole fine-tuning, all on the
first 2,048 images of the validation split. No test image is read. Rows are written one by one; those that are there are skipped.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectrim as sp
from cells import put
from run import git_state
from spectrim import zoo
from spectrim.budget.cut_to import Workbench
from spectrim.budget.ladder import ladder
from spectrim.budget.ways import WAYS
from spectrim.files import make_folder, write_json
from spectrim.metrics.inputs import first_examples
from spectrim.pipeline.recovery import Recovery
from spectrim.pipeline.teaching import chosen_teacher
from spectrim.surgery.balance import balanced
from spectrim.surgery.exchange import duplicate

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "benchmarks" / "results" / "recovery" / "rows.json", ROOT / "docs" / "compress.md"
BEGIN, END = "<!-- recovery: written by benchmarks/recovery.py --render -->", "<!-- recovery: end -->"
KINDS, STEPS, EPOCHS, KNOWN, JUDGED = ("plain", "whitened", "sensitive", "mixed"), (20, 50, 100), 2, 512, 2048


def rows(budget: float, seed: int, done: dict[str, Any]) -> Any:
    """Yield the name and the losses of each way at a budget."""
    dense, loss = zoo.mlperftiny_resnet8(pretrained=True).eval(), nn.CrossEntropyLoss()
    data = zoo.cifar10(batch_size=128, normalize="raw", seed=seed)
    plain = zoo.cifar10(batch_size=128, normalize="raw", augment=False, seed=seed)
    known, judged = first_examples(plain.train, KNOWN), first_examples(plain.val, JUDGED)
    low, inputs = sp.factorize(dense, "spatial"), known[0][0][:1]
    bench = Workbench(low, inputs, sp.calibrate(low, known, loss, examples=None), prices=ladder(low, inputs, dense_model=dense))
    teacher, _ = chosen_teacher(dense, low, known, loss, sp.evaluate(dense, known, loss)["loss"])
    batches = [batch for _, batch in zip(range(max(STEPS)), data.train, strict=False)]
    for way in KINDS:
        name = f"macs {budget} seed {seed} {way}"
        if name in done:
            continue
        torch.manual_seed(seed)
        made = bench.cut_to(sp.Budget(macs=budget), WAYS[way], lambda net: sp.evaluate(net, judged, loss), dense=dense, examples=known)
        row: dict[str, Any] = {"start": made.last}
        for steps in STEPS:
            began = time.process_time()
            recovered = Recovery(steps, loss, sp.Tuning(), [], teacher, batches[:steps], False)(low, True)
            row[f"after {steps}"] = sp.evaluate(recovered, judged, loss) | {"seconds": time.process_time() - began}
        tuning = sp.Tuning().with_schedule()
        trained = duplicate(low)
        with balanced(trained):
            lessons = [] if teacher is None else [teacher]
            sp.fit(trained, data.train, loss, None, EPOCHS, lessons=lessons, tuning=tuning, progress=False)
        yield name, row | {"end": sp.evaluate(trained, judged, loss), "git": git_state()}


def table() -> list[str]:
    """Return the lines of the table: the least loss of each column in bold."""
    found = json.loads(RESULT.read_text())["rows"]
    columns = ["start", *(f"after {steps}" for steps in STEPS), "end"]
    lines = ["| kept, seed | cut | " + " | ".join(columns) + " | accuracy at the end |", "|---|---|" + "---:|" * (len(columns) + 1)]
    for group in sorted({name.rpartition(" ")[0] for name in found}, reverse=True):
        own = {name.rpartition(" ")[2]: row for name, row in found.items() if name.rpartition(" ")[0] == group}
        least = {column: min(row[column]["loss"] for row in own.values()) for column in columns}
        words = group.split()
        for way, row in own.items():
            cells = [f"{row[column]['loss']:.4f}" for column in columns]
            shown = [f"**{cell}**" if row[column]["loss"] == least[column] else cell for cell, column in zip(cells, columns, strict=True)]
            lines.append(f"| {float(words[1]):.0%}, {words[3]} | `{way}` | {' | '.join(shown)} | {100 * row['end']['accuracy']:.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budgets", default="0.5,0.2")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--render", action="store_true", help="write the table, run nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    make_folder(RESULT.parent)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}}
    for budget in [] if asked.render else map(float, asked.budgets.split(",")):
        for seed in map(int, asked.seeds.split(",")):
            for name, row in rows(budget, seed, result["rows"]):
                result["rows"][name] = row
                write_json(RESULT, result)
                print(name, row, flush=True)
    put(PAGE, BEGIN, END, "\n".join(["", *table(), ""]))


if __name__ == "__main__":
    main()
