"""Calibration only, no labels and no training of the task: ``python benchmarks/reconstruct.py CASE [--budgets 0.5,0.33] [--seeds 0]``.

Cases: ``resnet8`` and ``resnet20`` (CIFAR-10), ``stories260k``. A network is cut to each budget from unlabeled inputs; then its blocks, and
the network as a whole, are trained for a few steps toward the dense network (`Reconstruction`). Two rows of each run: after cut and refit,
and after the steps; of each the test split (of the language model the validation split) is read once. One file a run in
``benchmarks/results/reconstruct``; seconds are processor time on one thread.
"""

import argparse
import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spectrim as sp
from run import git_state
from spectrim import zoo
from spectrim.budget.cut_to import Workbench
from spectrim.budget.ladder import ladder
from spectrim.budget.ways import WAYS
from spectrim.files import write_text
from spectrim.metrics.distance import Divergence, with_outputs
from spectrim.pipeline.run import environment
from spectrim.surgery.states import orthonormalize_
from spectrim.training.parts import Reconstruction
from spectrim.training.reconstruct import reconstruct

CARD = Path(__file__).resolve().parents[1] / "docs" / "methods" / "reconstruction.md"
RESULTS = Path(__file__).resolve().parent / "results" / "reconstruct"


def crops(x: Tensor) -> Tensor:
    """Shift each image by up to four pixels, and mirror every second one: the same for images of any scale."""
    padded, size = F.pad(x, (4, 4, 4, 4), mode="reflect"), x.shape[-1]
    rows, columns = (torch.randint(0, 9, (len(x), 1)) + torch.arange(size) for _ in range(2))
    columns = torch.where(torch.rand(len(x), 1) < 0.5, columns, columns.flip(1))
    return padded[
        torch.arange(len(x))[:, None, None, None],
        torch.arange(x.shape[1])[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


@dataclass(frozen=True)
class Case:
    """What is compressed, on what, and how."""

    budgets: tuple[float, ...]
    merit: str
    calibration: int
    examples: int
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "resnet8": Case((0.5, 0.33, 0.2), "accuracy", 1024, 8192, {"steps": 300, "whole": 600, "logits": True}),
    "resnet20": Case((0.5, 0.33, 0.2), "accuracy", 1024, 2048, {"steps": 300}),
    "stories260k": Case((0.85, 0.7, 0.5), "loss", 192, 1024, {"steps": 150, "whole": 150, "logits": True, "batch": 8}),
}


def images(name: str, budget: float, seed: int, case: Case) -> dict[str, Any]:
    """CIFAR-10: multiply-accumulates of the whole network, spatial scheme, the best way by the divergence on the calibration set."""
    raw = name == "resnet8"
    dense = (zoo.mlperftiny_resnet8(pretrained=True) if raw else zoo.resnet20(pretrained="akamaster")).eval()
    data = zoo.cifar10(batch_size=128, augment=False, **({"normalize": "raw"} if raw else {"val": 1000}))
    data.train.set_epoch(seed)
    some = [x for x, _ in itertools.islice(data.train, case.examples // 128)]
    loss, start = nn.CrossEntropyLoss(), time.process_time()
    made = sp.compress(
        dense, some, Divergence(), sp.Budget(macs=budget), scheme="spatial", examples=case.calibration, eval_data=None, progress=False
    )
    cut_s = time.process_time() - start
    settings = Reconstruction(**case.settings, seed=seed, augment=crops if case.settings.get("whole") else None)
    low, told = reconstruct(made.low, dense, some, settings)
    steps_s = time.process_time() - start - cut_s
    plain = sp.merge(low.eval())
    return {
        "way": made.cut,
        "macs": made.measured["final"].macs / made.measured["dense"].macs,
        "refit": sp.evaluate(made.model, data.test, loss) | {"seconds": cut_s},
        "reconstructed": sp.evaluate(plain, data.test, loss) | {"seconds": steps_s},
        "parts": [asdict(part) for part in told],
    }


def stories(name: str, budget: float, seed: int, case: Case) -> dict[str, Any]:
    """stories260K: parameters of the linear layers of the blocks, interpolative writing, ranks and cuts by curvature (no labels)."""
    dense = zoo.stories260k().eval()
    data = zoo.stories(batch_size=16, length=256)
    data.train.set_epoch(seed)
    some = [x for x, _ in itertools.islice(data.train, case.examples // 16)]
    known = with_outputs(dense, some[: case.calibration // 16])
    start, loss = time.process_time(), Divergence()
    low = sp.factorize(
        dense, where=lambda name, module: isinstance(module, nn.Linear) and name.startswith("layers"), writing="interpolative"
    )
    calibration = sp.calibrate(low, known, loss, examples=None)
    x = some[0][:1]
    prices = ladder(low, x, dense_model=dense)
    unit = prices.unit("params")
    kept = (unit.fixed + budget * unit.dense) / unit.whole
    bench = Workbench(low, x, calibration, prices=prices)
    made = bench.cut_to(sp.Budget(params=kept), WAYS["curved"], lambda net: sp.evaluate(net, known, loss), dense=dense, examples=known)
    orthonormalize_(low)
    cut_s = time.process_time() - start
    better, told = reconstruct(low, dense, some, Reconstruction(**case.settings, seed=seed))
    steps_s = time.process_time() - start - cut_s
    rows = {}
    for label, network, seconds in (("refit", low, cut_s), ("reconstructed", better, steps_s)):
        plain = sp.merge(network.eval())
        rows[label] = sp.evaluate(plain, data.val, zoo.language_model_loss) | {"seconds": seconds}
        written = sum(p.numel() for key, p in plain.named_parameters() if key.startswith("layers") and p.dim() > 1)
        rows[label]["linear_kept"] = written / unit.dense
    return {
        "way": made.way,
        "stages": {stage: dict(found) for stage, found in made.scores.items()},
        **rows,
        "parts": [asdict(p) for p in told],
    }


def table() -> str:
    """Return the committed runs as a table."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")]
    order = list(CASES)
    lines = ["| network | kept | seed | way | cut and refit | and steps | seconds |", "|---|---|---|---|---|---|---|"]
    for run in sorted(runs, key=lambda run: (order.index(run["case"]), -run["budget"], run["seed"])):
        merit = CASES[run["case"]].merit
        values = [run[row][merit] for row in ("refit", "reconstructed")]
        before, after = (f"{100 * value:.1f} %" if merit == "accuracy" else f"{value:.3f}" for value in values)
        seconds = f"{run['refit']['seconds']:.0f} + {run['reconstructed']['seconds']:.0f}"
        lines.append(f"| {run['case']} | {run['budget']:g} | {run['seed']} | {run['way']} | {before} | {after} | {seconds} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """Return the method card with the present table."""
    head, rest = text.split("<!-- table -->", 1)
    return f"{head}<!-- table -->\n{table()}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("case", choices=[*sorted(CASES), "report"])
    parser.add_argument("--budgets", type=lambda text: [float(part) for part in text.split(",")])
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument("--check", action="store_true", help="with report: is the card what the files say?")
    given = parser.parse_args()
    if given.case == "report":
        present = CARD.read_text(encoding="utf-8")
        if given.check and page(present) != present:
            sys.exit(f"{CARD.name} is not what the result files say: python benchmarks/reconstruct.py report")
        if not given.check:
            write_text(CARD, page(present))
        return
    torch.set_num_threads(1)
    case = CASES[given.case]
    work = stories if given.case == "stories260k" else images
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed, budget in itertools.product(given.seeds, given.budgets or case.budgets):
        torch.manual_seed(seed)
        found = work(given.case, budget, seed, case)
        content = {"case": given.case, "budget": budget, "seed": seed, "settings": asdict(case), "commit": git_state(), **found}
        write_text(RESULTS / f"{given.case}-{budget:g}-{seed}.json", json.dumps(content | environment(), indent=1) + "\n")
        print(given.case, budget, seed, found["way"], {row: found[row] for row in ("refit", "reconstructed")}, flush=True)


if __name__ == "__main__":
    main()
