"""How often the factors must be held orthonormal: the penalty at every step, at every few steps, and by retraction; and none at all.

.venv/bin/python benchmarks/orthogonality.py            # writes benchmarks/results/orthogonality/*.json; a finished row is skipped
.venv/bin/python benchmarks/orthogonality.py --render   # writes the tables of the method cards from them

SVD training of the published ResNet-8 on a part of CIFAR-10: full rank with `Hoyer`, a cut to half the multiply-accumulates, fine-tuning
with the same means. The ways named ``dense`` train dense weights in the first part, with or without a penalty on their spectra, and have
factors from the cut on. The validation split (5,000 images) is read after each part, the test split once. What a step costs is measured by
``benchmarks/micro/step.py``.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectrim as sp
from cells import mean_std, put
from micro.harness import environment
from spectrim import zoo
from spectrim.files import write_text
from spectrim.training import Retraction

HERE = Path(__file__).resolve().parent
RESULTS, CARD = HERE / "results" / "orthogonality", HERE.parent / "docs" / "methods" / "svd-training.md"
OF_DENSE = CARD.with_name("dense-regularizers.md")
START, END = "<!-- orthogonality -->", "<!-- end -->"
MEANS: dict[str, dict[str, Any]] = {
    "none": {},
    "penalty, every step": {"penalties": [sp.Orthogonality(1.0)]},
    "penalty, every 8": {"penalties": [sp.Orthogonality(1.0, every=8)]},
    "retraction, every 16": {"courses": [Retraction(16)]},
    "retraction, every 32": {"courses": [Retraction(32)]},
}
DENSE: dict[str, dict[str, Any]] = {
    "dense": {"spectrum": []},
    "dense, every step": {"spectrum": [sp.penalties.PolarHoyer(0.001)]},
    "dense, every 32": {"spectrum": [sp.penalties.PolarHoyer(0.001, every=32)]},
}
SEEDS, EPOCHS, IMAGES, RATE, HOYER, BUDGET = (0, 1, 2), (3, 2), 5_000, 0.002, 0.01, 0.5


def run(means: str, seed: int) -> dict[str, Any]:
    """Train, cut and fine-tune once."""
    torch.manual_seed(seed)
    data, loss = zoo.cifar10(batch_size=128, normalize="raw", seed=seed, limit=IMAGES + 5000), nn.CrossEntropyLoss()
    given = (MEANS | DENSE)[means]
    low = zoo.mlperftiny_resnet8(pretrained=True)
    low = low if means in DENSE else sp.factorize(low)
    spectrum = given.get("spectrum", [sp.Hoyer(HOYER)])
    scores, defects = {}, {}
    for part, epochs, rate, more in (("full rank", EPOCHS[0], RATE, spectrum), ("fine-tuned", EPOCHS[1], RATE / 3, [])):
        optimizer = torch.optim.SGD(low.parameters(), rate, momentum=0.9)
        penalties = [*given.get("penalties", []), *more]
        history = sp.fit(low, data.train, loss, optimizer, epochs, penalties=penalties, courses=given.get("courses", []), progress=False)
        scores[part] = sp.evaluate(low, data.val, loss)
        defects[part] = max(history.layers[-1]["defects"].values(), default=0.0) if history.layers else 0.0
        if part == "full rank":
            images = next(iter(data.val))[0][:1]
            low = sp.factorize(low) if means in DENSE else low
            low = sp.prune(low, sp.allocate(low, sp.Budget(macs=BUDGET), images))
            scores["cut"] = sp.evaluate(low, data.val, loss)
    return {"val": scores, "defects": defects, "test": sp.evaluate(sp.merge(low), data.test, loss)}


def table(named: dict[str, dict[str, Any]] = MEANS) -> str:
    """Return the table of these ways: mean and standard deviation over seeds."""
    found = defaultdict(list)
    for path in sorted(RESULTS.glob("*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        found[row["settings"]["means"]].append(row)

    def of(rows: list[Any], *path: str) -> str:
        values = []
        for row in rows:
            for key in path:
                row = row[key]
            values.append(100 * row)
        return mean_std(values)

    head = ("held orthonormal by", "n", "defect") if named is MEANS else ("trained", "n")
    lines = [f"| {' | '.join(head)} | full rank | cut | fine-tuned, test |", "|---|" + "--:|" * (len(head) + 2)]
    for means in named:
        if rows := found[means]:
            defect = [f"{statistics.mean(row['defects']['full rank'] for row in rows):.1e}"] if named is MEANS else []
            cells = [of(rows, "val", "full rank", "accuracy"), of(rows, "val", "cut", "accuracy"), of(rows, "test", "accuracy")]
            lines.append(f"| {' | '.join([means, str(len(rows)), *defect, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="write the table of the method card from the result files")
    parser.add_argument("--means", nargs="*", default=[*MEANS, *DENSE], help=f"some of {', '.join(map(repr, MEANS | DENSE))}")
    given = parser.parse_args()
    if given.render:
        put(CARD, START, END, table())
        put(OF_DENSE, START, END, table(DENSE))
        return
    torch.set_num_threads(1)
    for seed in SEEDS:
        for means in given.means:
            path = RESULTS / f"{means.replace(', ', '-').replace(' ', '-')}-seed{seed}.json"
            if path.exists():
                continue
            settings = {"means": means, "seed": seed, "epochs": EPOCHS, "images": IMAGES, "rate": RATE, "macs": BUDGET}
            settings |= {"spectrum": repr(DENSE[means]["spectrum"])} if means in DENSE else {"hoyer": HOYER}
            row = {"settings": settings, "environment": environment()} | run(means, seed)
            RESULTS.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(row, indent=1) + "\n")
            print(path.name, f"{row['defects']['full rank']:.2e} {100 * row['test']['accuracy']:.2f} %", flush=True)


if __name__ == "__main__":
    main()
