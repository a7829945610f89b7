"""What each way to cut gives without training, before and after its refit: the order of the ways, and the one for a large network.

OMP_NUM_THREADS=1 python benchmarks/ways.py            # writes benchmarks/results/ways/*.json; a finished row is skipped
python benchmarks/ways.py --render                     # writes the table of docs/compress.md from them

Published ResNet-8 and ResNet-20, CIFAR-10, calibrated on 512 training images. Accuracy and loss are those of the first 1,024 images of the
validation split: they chose the order, and no test image is read. The published ResNet-20 was trained on these images.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectrim as sp
from micro.harness import environment
from spectrim import zoo
from spectrim.budget.cut_to import Workbench
from spectrim.budget.ladder import ladder
from spectrim.budget.ways import WAYS
from spectrim.files import write_text
from spectrim.metrics.inputs import first_examples
from spectrim.pipeline.cutter import AT_ONCE

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results" / "ways", HERE.parent / "docs" / "compress.md"
START, END = "<!-- ways -->", "<!-- end -->"
NETWORKS = {"ResNet-8": "raw", "ResNet-20": "imagenet"}
BUDGETS, KNOWN, JUDGED = (0.5, 0.33, 0.2), 512, 1024


def run(name: str, budget: float) -> dict[str, Any]:
    """Cut one network in each way; return the scores of each stage, those that were not kept, too."""
    normalize: Any = NETWORKS[name]
    dense = (zoo.mlperftiny_resnet8(pretrained=True) if name == "ResNet-8" else zoo.resnet20(pretrained="akamaster")).eval()
    data, loss = zoo.cifar10(batch_size=128, normalize=normalize, augment=False), nn.CrossEntropyLoss()
    known, judged = first_examples(data.train, KNOWN), first_examples(data.val, JUDGED)
    low, inputs = sp.factorize(dense, "spatial"), known[0][0][:1]
    calibration = sp.calibrate(low, known, loss, examples=None)
    bench = Workbench(low, inputs, calibration, prices=ladder(low, inputs, dense_model=dense))
    scores: dict[str, Any] = {"dense": sp.evaluate(dense, judged, loss)}
    for way in AT_ONCE:
        made = bench.cut_to(
            sp.Budget(macs=budget), WAYS[way], lambda network: sp.evaluate(network, judged, loss), dense=dense, examples=known
        )
        scores[way] = {"kept": made.scores, "dropped": made.dropped}
        print(name, budget, way, made.last, flush=True)
    return scores


def table() -> str:
    """Return the table: the accuracy after the refit, and before it."""
    head = ["network", "kept", "dense", *(f"`{way}`" for way in AT_ONCE)]
    lines = ["| " + " | ".join(head) + " |", "|---|---:|" + "---:|" * (len(head) - 2)]
    for name in NETWORKS:
        for budget in BUDGETS:
            path = RESULTS / f"{name.lower()}-{budget}.json"
            if path.exists():
                found = json.loads(path.read_text(encoding="utf-8"))["scores"]
                last = {way: list(found[way]["kept"].values())[-1]["accuracy"] for way in AT_ONCE}
                first = {way: found[way]["kept"]["cut"]["accuracy"] for way in AT_ONCE}
                cells = [
                    f"{'**' * (last[way] == max(last.values()))}{100 * last[way]:.1f}{'**' * (last[way] == max(last.values()))}"
                    f" ({100 * first[way]:.1f})"
                    for way in AT_ONCE
                ]
                lines.append("| " + " | ".join([name, f"{budget:.0%}", f"{100 * found['dense']['accuracy']:.1f}", *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--render", action="store_true", help="write the table, run nothing")
    if not parser.parse_args().render:
        torch.set_num_threads(1)
        RESULTS.mkdir(parents=True, exist_ok=True)
        for name in NETWORKS:
            for budget in BUDGETS:
                path = RESULTS / f"{name.lower()}-{budget}.json"
                if not path.exists():
                    settings = {"network": name, "budget": budget, "known": KNOWN, "judged": JUDGED, "scheme": "spatial"}
                    write_text(
                        path, json.dumps({"settings": settings, "environment": environment(), "scores": run(name, budget)}, indent=1) + "\n"
                    )
    text = PAGE.read_text(encoding="utf-8")
    head, tail = text.split(START)[0], text.split(START)[1].split(END, 1)[1]
    write_text(PAGE, f"{head}{START}\n{table()}\n{END}{tail}")


if __name__ == "__main__":
    main()
