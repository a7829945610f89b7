"""Does a short recovery tell which cut ends best? ``python benchmarks/recovery.py [--networks resnet8] [--budgets 0.5,0.2] [--seeds 0]``.

A network, calibrated on 512 training images, each way of ``cut=`` that `compress` compares with training to come: the loss as it starts,
after 20, 50 and 100 steps of `spectrim.pipeline.recovery.Recovery`, and after the whole fine-tuning, all on the first 2,048 images of the
validation split. No test image is read. Rows are written one by one; those that are there are skipped; ``--render`` runs none.

``resnet8`` and ``resnet20`` have published weights (CIFAR-10; those of ResNet-20 have seen the validation images); ``lenet5`` and ``vit``
(four blocks of 96) are trained here, for four and two epochs of Fashion-MNIST. ``stories260k`` has published weights; its examples are
windows of 256 tokens, of which the validation split has fewer than 2,048.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

import coded_networks
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


@dataclass(frozen=True)
class Network:
    """What is cut: makes the dense network and its data; the fold of convolutions; examples in a batch; the loss."""

    title: str
    model: Callable[[], nn.Module]
    data: Callable[..., Any]
    scheme: Any = "channel"
    batch: int = 128
    loss: Any = field(default_factory=nn.CrossEntropyLoss)


def lenet5() -> nn.Module:
    """Return LeNet-5, trained for four epochs; a run that was finished before is read."""
    torch.manual_seed(0)
    model, data, loss = zoo.lenet5(), zoo.fashion_mnist(batch_size=128), nn.CrossEntropyLoss()
    folder = ROOT / "runs" / "recovery" / "lenet5"
    sp.fit(model, data.train, loss, torch.optim.Adam(model.parameters()), 4, checkpoint=folder, progress=False)
    return model.eval()


def windows(augment: bool = False, **more: Any) -> Any:
    """Return windows of 256 tokens: text has no augmentation."""
    return zoo.stories(length=256, **more)


NETWORKS = {
    "resnet8": Network(
        "ResNet-8", lambda: zoo.mlperftiny_resnet8(pretrained=True), lambda **more: zoo.cifar10(normalize="raw", **more), "spatial"
    ),
    "resnet20": Network(
        "ResNet-20", lambda: zoo.resnet20(pretrained="akamaster"), lambda **more: zoo.cifar10(normalize="imagenet", **more), "spatial"
    ),
    "lenet5": Network("LeNet-5", lenet5, zoo.fashion_mnist),
    "vit": Network("ViT", coded_networks.small_vit, zoo.fashion_mnist),
    "stories260k": Network("stories260K", zoo.stories260k, windows, batch=16, loss=zoo.language_model_loss),
}
KINDS, STEPS, EPOCHS, KNOWN, JUDGED = ("plain", "whitened", "sensitive", "mixed"), (20, 50, 100), 2, 512, 2048


def rows(network: str, budget: float, seed: int, done: dict[str, Any]) -> Any:
    """Yield the name and the losses of each way at a budget."""
    names = {way: f"{network} macs {budget} seed {seed} {way}" for way in KINDS}
    if all(name in done for name in names.values()):
        return
    chosen = NETWORKS[network]
    dense, loss, data = chosen.model().eval(), chosen.loss, chosen.data(batch_size=chosen.batch, seed=seed)
    plain = chosen.data(batch_size=chosen.batch, augment=False, seed=seed)
    known, judged = first_examples(plain.train, KNOWN), first_examples(plain.val, JUDGED)
    low, inputs = sp.factorize(dense, chosen.scheme), known[0][0][:1]
    bench = Workbench(low, inputs, sp.calibrate(low, known, loss, examples=None), prices=ladder(low, inputs, dense_model=dense))
    teacher, _ = chosen_teacher(dense, low, known, loss, sp.evaluate(dense, known, loss)["loss"])
    batches = [batch for _, batch in zip(range(max(STEPS)), data.train, strict=False)]
    for way, name in names.items():
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
    order, columns = list(NETWORKS), ["start", *(f"after {steps}" for steps in STEPS), "end"]
    lines = [
        "| network, kept, seed | cut | " + " | ".join(columns) + " | accuracy at the end |",
        "|---|---|" + "---:|" * (len(columns) + 1),
    ]
    for group in sorted(
        {name.rpartition(" ")[0] for name in found},
        key=lambda group: (order.index((words := group.split())[0]), -float(words[2]), words[4]),
    ):
        own = {name.rpartition(" ")[2]: row for name, row in found.items() if name.rpartition(" ")[0] == group}
        least = {column: min(row[column]["loss"] for row in own.values()) for column in columns}
        words = group.split()
        for way, row in own.items():
            cells = [f"{row[column]['loss']:.4f}" for column in columns]
            shown = [f"**{cell}**" if row[column]["loss"] == least[column] else cell for cell, column in zip(cells, columns, strict=True)]
            named = f"{NETWORKS[words[0]].title}, {float(words[2]):.0%}, {words[4]}"
            accuracy = f"{100 * row['end']['accuracy']:.1f}" if "accuracy" in row["end"] else "-"
            lines.append(f"| {named} | `{way}` | {' | '.join(shown)} | {accuracy} |")
    return lines


def summary() -> str:
    """Return how far the final loss of the cut chosen by its start, or after a recovery, lies above the best final loss."""
    groups: dict[str, list[Any]] = {}
    for name, row in json.loads(RESULT.read_text())["rows"].items():
        groups.setdefault(name.rpartition(" ")[0], []).append(row)
    told = []
    for column in ("start", *(f"after {steps}" for steps in STEPS)):
        chosen = [min(rows, key=lambda row: row[column]["loss"]) for rows in groups.values()]
        above = [one["end"]["loss"] - min(row["end"]["loss"] for row in rows) for one, rows in zip(chosen, groups.values(), strict=True)]
        told.append(f"{'the start' if column == 'start' else column} {sum(above) / len(above):.4f} and {max(above):.4f}")
    cases = f"mean and largest over {len(groups)} cases"
    return f"Final loss of the cut with the lowest loss in a column, above the best final loss, {cases}: {'; '.join(told)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default="resnet8", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--budgets", default="0.5,0.2")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--render", action="store_true", help="write the table, run nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    make_folder(RESULT.parent)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}}
    cases = product(asked.networks.split(","), map(float, asked.budgets.split(",")), map(int, asked.seeds.split(",")))
    for case in [] if asked.render else cases:
        for name, row in rows(*case, result["rows"]):
            result["rows"][name] = row
            write_json(RESULT, result)
            print(name, row, flush=True)
    put(PAGE, BEGIN, END, "\n".join(["", *table(), "", summary(), ""]))


if __name__ == "__main__":
    main()
