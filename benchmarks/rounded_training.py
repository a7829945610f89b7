"""Training on rounded weights: ``python benchmarks/rounded_training.py [--network NAME] [--bytes N] [--images N] ...``.

ResNet-20 or ResNet-8 (CIFAR-10, published weights) is put on levels without training first (`round_to`), then trained on those levels
toward the dense network's logits: steps stay, gradients go straight through, BatchNorms are folded, and biases are rounded again in the
end. ``--prune-epochs`` prunes first, gradually and toward the same logits, to as many weights of each layer as `round_to` leaves of the
dense network at these bytes; what is left is then put on levels. Rows are written to ``benchmarks/results/rounded_training/rows.json`` one
by one; those that are there are skipped. Each row reads the test split twice, before and after.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import coded
import spectrim as sp
from cells import put
from run import git_state
from spectrim import zoo
from spectrim.budget.rounding.round_to import round_to
from spectrim.budget.rounding.vectors import round_vectors
from spectrim.files import make_folder, write_json
from spectrim.metrics.inputs import first_examples
from spectrim.pipeline.environment import environment
from spectrim.projections import TopK
from spectrim.surgery.constrain import constrain
from spectrim.surgery.exchange import duplicate
from spectrim.training import Gradual

ROOT = Path(__file__).resolve().parents[1]
RESULT, CARD = ROOT / "benchmarks" / "results" / "rounded_training" / "rows.json", ROOT / "docs" / "methods" / "rounding.md"
BIAS_RATE = 1e-4
NORMALIZATION = {"resnet20": "imagenet", "resnet8": "raw"}
BEGIN, END = "<!-- training: written by benchmarks/rounded_training.py --render -->", "<!-- training: end -->"


def epochs_of(asked: argparse.Namespace) -> Any:
    """Return the training batches of a row."""
    data = zoo.cifar10(batch_size=128, normalize=NORMALIZATION[asked.network], augment=asked.augment, seed=asked.seed).train
    return data if asked.augment else first_examples(data, asked.images)


def pruned(model: nn.Module, asked: argparse.Namespace) -> nn.Module:
    """Return the dense network with the zeros that its bytes ask for, pruned gradually toward its own logits."""
    torch.manual_seed(asked.seed)
    kept = {name: TopK(int(value.count_nonzero())) for name, value in model.named_parameters() if value.dim() > 1}
    made, data = duplicate(coded.dense()), epochs_of(asked)
    optimizer = torch.optim.SGD(made.parameters(), lr=asked.prune_rate, momentum=0.9, nesterov=True)
    cycle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, asked.prune_epochs * len(data))
    tuning = sp.Tuning(scheduler=cycle, scheduler_steps="batch", precision=asked.precision)
    teacher = sp.Distillation(coded.dense(), temperature=2.0, weight=1.0)
    courses = [Gradual({name.removesuffix(".weight"): count for name, count in kept.items()}, end=0.6, cuts=30)]
    sp.fit(
        made, data, nn.CrossEntropyLoss(), optimizer, asked.prune_epochs, courses=courses, lessons=[teacher], tuning=tuning, progress=False
    )
    return made.eval()


def trained(model: nn.Module, steps: Any, asked: argparse.Namespace) -> nn.Module:
    """Return a rounded network that was trained on its levels, toward the logits of the dense one."""
    torch.manual_seed(asked.seed)
    low = constrain(sp.factorize(model, "dense", where="*"), steps=steps)
    data = epochs_of(asked)
    optimizer = torch.optim.Adam([{"params": [value], "lr": rate_of(name, steps, asked.rate)} for name, value in low.named_parameters()])
    cycle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, asked.epochs * len(data))
    tuning = sp.Tuning(scheduler=cycle, scheduler_steps="batch", precision=asked.precision)
    teacher = sp.Distillation(coded.dense(), temperature=2.0, weight=1.0)
    sp.fit(low, data, nn.CrossEntropyLoss(), optimizer, asked.epochs, lessons=[teacher], tuning=tuning, progress=False)
    return round_vectors(sp.merge(low.eval())).eval()


def rate_of(name: str, steps: Any, rate: float) -> float:
    """Return the rate of a parameter: of a weight in its own steps, which differ a thousandfold from layer to layer."""
    layer = name.split(".factors.")[0]
    return rate * steps[layer] if layer in steps else BIAS_RATE


def measured(model: nn.Module) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return coded.sizes(model, Path(folder)) | coded.judged(model)


def run(asked: argparse.Namespace) -> None:
    """Make one row, where it is missing."""
    coded.NETWORK[0] = asked.network
    name = f"{asked.network} bytes {asked.bytes} images {asked.images} epochs {asked.epochs} rate {asked.rate:g} seed {asked.seed}"
    name += (" augmented" if asked.augment else "") + (f" {asked.precision}" if asked.precision != "no" else "")
    name += f" pruned {asked.prune_epochs} rate {asked.prune_rate:g}" if asked.prune_epochs else ""
    make_folder(RESULT.parent)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}}
    if name in result["rows"]:
        return
    inputs = [x for x, _ in coded.known(asked.seed)]
    rounded = round_to(coded.dense(), inputs, asked.bytes, progress=False)
    began = time.process_time()
    if asked.prune_epochs:
        rounded = round_to(pruned(rounded.model, asked), inputs, asked.bytes, progress=False)
    row: dict[str, Any] = {"before": measured(rounded.model)}
    after = trained(rounded.model, rounded.steps, asked)
    row |= {"seconds": time.process_time() - began, "after": measured(after), "git": git_state()}
    write_json(RESULT, {"rows": result["rows"] | {name: row}, "environment": environment()})
    print(name, row["before"], row["after"], row["seconds"], flush=True)


def page() -> list[str]:
    """Return the lines of the table."""
    result = json.loads(RESULT.read_text())
    lines = ["| training | bytes before | after | accuracy before | after | divergence before | after | seconds |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, row in result["rows"].items():
        words = name.split()
        what = f"{words[0]}: {int(words[4]):,} images, epochs: {words[6]}, rate {words[8]}, seed {words[10]}"
        place = words.index("pruned") if "pruned" in words else len(words)
        what += "".join(f", {word}" for word in words[11:place])
        what += f", pruned before for {words[place + 1]} epochs at a rate of {words[place + 3]}" if words[place:] else ""
        before, after = row["before"], row["after"]
        values = [f"{before['bytes']:,} | {after['bytes']:,}", f"{before['accuracy']:.2f} | {after['accuracy']:.2f}"]
        values.append(f"{before['kl']:.4f} | {after['kl']:.4f}")
        lines.append(f"| {what} | {' | '.join(values)} | {row['seconds']:.0f} |")
    return lines


def render() -> None:
    put(CARD, BEGIN, END, "\n".join(["", *page(), ""]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet20", choices=("resnet20", "resnet8"))
    parser.add_argument("--bytes", type=int, default=44_000)
    parser.add_argument("--images", type=int, default=45_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=0.02, help="of Adam, in steps of the weight")
    parser.add_argument("--augment", action="store_true", help="crops and reflections")
    parser.add_argument("--precision", default="no", choices=("no", "bf16"))
    parser.add_argument("--prune-epochs", type=int, default=0, help="prune first, for so many epochs")
    parser.add_argument("--prune-rate", type=float, default=0.01, help="of SGD with momentum 0.9")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if not asked.render:
        run(asked)
    render()
