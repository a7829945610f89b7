"""Try ways to prune the LeNet-5 of Caffe on held-out images: ``OMP_NUM_THREADS=1 python benchmarks/pruning_trials.py [--images N]``.

A dense network is trained on the first images that remain when 10,000 of the 60,000 are held out; each trial prunes it, and is scored on
those held out. The test split is not read. Rows are added to ``benchmarks/results/pruning_trials/lenet5.json`` one by one; those that are
there are skipped.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectrim as sp
from pruning import RATES, TRAINING, course, digest, train
from spectrim import zoo
from spectrim.files import write_text

RESULT = Path(__file__).resolve().parent / "results" / "pruning_trials" / "lenet5.json"
HELD_OUT, EPOCHS = 10_000, 12
TAUGHT = {"temperature": 4.0, "weight": 0.7}
TRIALS: dict[str, dict[str, Any]] = {
    "as it was": {"rate": "85x"},
    "taught": {"rate": "85x", "teach": TAUGHT},
    "taught, more kept in conv2": {"rate": "balanced-85x", "teach": TAUGHT},
    "taught, more kept in conv2, peak 2e-3": {"rate": "balanced-85x", "teach": TAUGHT, "peak": 2e-3},
}


def main() -> None:
    """Run the trials that are not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=15_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = zoo.mnist(batch_size=TRAINING["batch_size"], val=HELD_OUT, augment=True, limit=given.images)
    dense = zoo.caffe_lenet5().to(memory_format=torch.channels_last)
    settings = {"images": given.images, "held_out": HELD_OUT, "epochs": EPOCHS, "seed": 0, **{k: TRAINING[k] for k in ("peak", "augment")}}
    train(dense, data, f"trial-dense-{digest(settings)}", EPOCHS, 0.25)
    held = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    rows = held["rows"] if held.get("settings") == settings else {}
    rows.setdefault("dense", sp.evaluate(dense, data.val, nn.CrossEntropyLoss()))
    for name, knobs in TRIALS.items():
        if rows.get(name, {}).get("knobs") == knobs:
            continue
        torch.manual_seed(0)
        model = copy.deepcopy(dense)
        lessons = [sp.Distillation(dense, **knobs["teach"])] if "teach" in knobs else []
        run = f"trial-{digest(settings | knobs)}"
        _, seconds = train(
            model, data, run, EPOCHS, 7 / 12, [course("gradual", RATES[knobs["rate"]])], lessons, knobs.get("peak", TRAINING["peak"])
        )
        rows[name] = {"knobs": knobs, "seconds": round(seconds, 1)} | sp.evaluate(model, data.val, nn.CrossEntropyLoss())
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        write_text(RESULT, json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
        print(name, rows[name], flush=True)


if __name__ == "__main__":
    main()
