"""Subspace training beside SGD: P-SGD and P-BFGS in the directions of a short trajectory; every pass over the data counts as an epoch.

OMP_NUM_THREADS=1 python benchmarks/subspace.py resnet8                    # ResNet-8, CIFAR-10; what is there is skipped
OMP_NUM_THREADS=1 python benchmarks/subspace.py resnet8 --tune             # the settings that were tried on the validation split, seed 0
OMP_NUM_THREADS=1 python benchmarks/subspace.py balance                    # rank x subspace x epochs on LeNet-5, Fashion-MNIST
python benchmarks/subspace_report.py                                       # the tables of docs/methods/subspace.md and the picture
OMP_NUM_THREADS=1 python benchmarks/subspace.py resnet8 --images 45000 --epochs 150    # the full size

A row is one file in ``benchmarks/results/subspace``, skipped as long as its settings are the same. The first epochs of SGD, at a constant
rate, are those of all methods of a seed: samples are taken there. The validation split (5,000 images) chose the settings, on seed 0; the
test split is read once, by the finished row. A pass of P-BFGS evaluates as many examples as the data have, in the trials of its line
search, too.
"""

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectrim as sp
from micro.harness import environment
from spectrim import zoo
from spectrim.files import write_text
from spectrim.layers import named_factors
from spectrim.training import BFGS, Basis, Sampling, Subspace, Trajectory

HERE = Path(__file__).resolve().parent
RESULTS, RUNS = HERE / "results" / "subspace", HERE.parent / "runs" / "subspace"
LOSS = nn.CrossEntropyLoss()
TASK: dict[str, Any] = {"images": 10_000, "epochs": 30, "sampled": 0.5, "samples_per_epoch": 4, "batch_size": 128, "rate": 0.1}
TASK |= {"momentum": 0.9, "weight_decay": 5e-4, "augment": True, "precision": "bf16"}
"""``sampled``: share of the epochs at the first rate in which samples are taken. P-BFGS computes in float32, as it compares losses."""

FORMS: dict[str, dict[str, Any]] = {"dense": {}, "factors": {"scheme": "spatial", "orthogonality": 0.1}}
METHODS: dict[str, dict[str, Any]] = {
    "sgd": {"share": 0.5, "falls": {0.2: 0.1, 0.667: 0.01}},
    "short-sgd": {"share": 0.1, "falls": {0.0: 0.1, 0.667: 0.01}},
    "mean": {"share": 0.0, "first": 0.5},
    "p-sgd": {"share": 0.1, "size": 20, "rate": 1.0, "falls": {0.75: 0.1}},
    "p-bfgs": {"share": 0.1, "size": 10, "batch_size": 128, "curvature": "steps", "recalibrated": 2560},
    "random": {"share": 0.1, "size": 20, "rate": 1.0, "falls": {0.75: 0.1}},
}
"""``share``: of the epochs, after the sampled ones. ``falls``: factor of the rate from a share of these on."""


def digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def plain(knobs: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a method as JSON has them."""
    found: dict[str, Any] = json.loads(json.dumps(knobs))
    return found


def is_written(path: Path, settings: dict[str, Any]) -> bool:
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["digest"] == digest(settings)


def write_row(path: Path, settings: dict[str, Any], found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"settings": settings, "digest": digest(settings), **found, "environment": environment()}
    write_text(path, json.dumps(row, indent=1) + "\n")
    print(path.name, {key: found[key] for key in ("epochs", "val", "test", "cpu_seconds") if key in found}, flush=True)


def stepwise(falls: dict[Any, float]) -> Callable[[Any, int], Any]:
    """Return a schedule, factors of the rate from shares of the steps on."""

    def make(optimizer: Any, steps: int) -> Any:
        def factor(step: int) -> float:
            return next((f for share, f in sorted(falls.items(), reverse=True) if step >= round(share * steps)), 1.0)

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    return make


def data_of(task: dict[str, Any], seed: int, batch_size: int | None = None) -> Any:
    return zoo.cifar10(batch_size or task["batch_size"], augment=task["augment"], seed=seed, normalize="cifar10", limit=task["images"])


def network(form: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    dense = zoo.mlperftiny_resnet8().to(memory_format=torch.channels_last)
    return dense if form == "dense" else sp.factorize(dense, scheme=FORMS[form]["scheme"])


def penalties(form: str) -> list[Any]:
    return [] if form == "dense" else [sp.Orthogonality(FORMS[form]["orthogonality"])]


def sgd(model: nn.Module, task: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), task["rate"], momentum=task["momentum"], weight_decay=task["weight_decay"])


def say(name: str) -> Callable[[int, dict[str, float], nn.Module], None]:
    def printed(epoch: int, line: dict[str, float], model: nn.Module) -> None:
        print(name, epoch, round(line["loss"], 4), flush=True)

    return printed


def sampled(task: dict[str, Any], form: str, seed: int) -> tuple[nn.Module, Any, Trajectory, dict[str, Any]]:
    """Return the network after the first epochs of SGD, its optimizer, and their trajectory; trained now unless it was before."""
    name = f"{form}-{seed}-{digest({'task': task, 'form': FORMS[form]})}"
    model, epochs = network(form, seed), round(task["sampled"] * task["epochs"])
    optimizer, trajectory = sgd(model, task), Trajectory(RUNS / name / "trajectory")
    courses = [Sampling(trajectory, epochs * task["samples_per_epoch"])]
    start, checkpoint = time.process_time(), RUNS / name / "run"
    seconds_file = RUNS / name / "seconds.json"
    parts = {"penalties": penalties(form), "courses": courses, "checkpoint": checkpoint, "callbacks": [say(name)]}
    parts["tuning"] = sp.Tuning(precision=task["precision"])
    history = sp.fit(model, data_of(task, seed).train, LOSS, optimizer, epochs, progress=False, **parts)
    if not seconds_file.exists():  # of an interrupted run: those since it resumed
        write_text(seconds_file, json.dumps(round(time.process_time() - start, 1)))
    found = {"epochs": epochs, "cpu_seconds": json.loads(seconds_file.read_text()), "log": history.epochs}
    return model, optimizer, trajectory.open(model), found


def trained(task: dict[str, Any], form: str, seed: int, method: str, knobs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network that a method makes, and what it took."""
    model, optimizer, trajectory, before = sampled(task, form, seed)
    epochs, data, found = round(knobs["share"] * task["epochs"]), data_of(task, seed), {"epochs": before["epochs"]}
    start, history = time.process_time(), None
    parts: dict[str, Any] = {"penalties": penalties(form), "first_epoch": before["epochs"], "progress": False}
    parts["callbacks"] = [say(f"{method} {form} {seed}")]
    if method in ("sgd", "short-sgd"):
        parts["tuning"] = sp.Tuning(scheduler=stepwise(knobs["falls"]), scheduler_steps="batch", precision=task["precision"])
        history = sp.fit(model, data.train, LOSS, optimizer, epochs, **parts)
    elif method == "mean":
        average(model, trajectory, knobs["first"])
        sp.recalibrate(model, data.train)
    else:
        basis = basis_of(method, trajectory, model, knobs, seed)
        found |= {"kept": round(basis.kept, 5), "defect": basis.defect, "samples": len(trajectory)}
        model = network(form, seed)
        trajectory.restore(model)
        if method == "p-bfgs":
            train = data_of(task, seed, knobs["batch_size"]).train
            found |= quasi_newton(model, basis, train, epochs, form, knobs, task["weight_decay"], before["epochs"])
            if "recalibrated" in knobs:
                sp.recalibrate(model, list(islice(train, knobs["recalibrated"] // train.batch_size)))
        else:
            make = partial(Subspace, basis=basis, lr=knobs["rate"], weight_decay=task["weight_decay"])
            half = {"scheduler": stepwise(knobs["falls"]), "scheduler_steps": "batch", "precision": task["precision"]}
            parts["tuning"] = sp.Tuning(optimizer=make, **half)
            history = sp.fit(model, data.train, LOSS, None, epochs, **parts)
    found["epochs"] += epochs
    found |= {"cpu_seconds": round(time.process_time() - start, 1), "cpu_seconds_before": before["cpu_seconds"]}
    return model, found | {"log": before["log"] + (history.epochs if history is not None else [])}


def basis_of(method: str, trajectory: Trajectory, model: nn.Module, knobs: dict[str, Any], seed: int) -> Basis:
    if method == "random":
        width = sum(p.numel() for p in model.parameters())
        return Basis.of(model, torch.randn(knobs["size"], width, generator=torch.Generator().manual_seed(seed)))
    return trajectory.basis(knobs["size"])


def average(model: nn.Module, trajectory: Trajectory, first: float) -> None:
    """Give a model the mean of the samples from a share on."""
    mean, count = None, 0
    for index in range(round(first * (len(trajectory) - 1)), len(trajectory)):
        trajectory.restore(model, index)
        values = [p.detach().clone() for p in model.parameters()]
        mean, count = values if mean is None else [a + b for a, b in zip(mean, values, strict=True)], count + 1
    assert mean is not None
    with torch.no_grad():
        for p, value in zip(model.parameters(), mean, strict=True):
            p.copy_(value / count)


def quasi_newton(
    model: nn.Module, basis: Basis, train: Any, passes: int, form: str, knobs: dict[str, Any], weight_decay: float, epoch: int
) -> dict[str, Any]:
    """Train by P-BFGS until as many batches were evaluated as the passes have; return what happened."""
    optimizer = Subspace(model.parameters(), basis, bfgs=BFGS(curvature=knobs["curvature"]), weight_decay=weight_decay)
    model.train()
    losses: list[float] = []
    while True:
        train.set_epoch(epoch)
        for inputs, target in train:

            def closure(inputs: torch.Tensor = inputs, target: torch.Tensor = target) -> torch.Tensor:
                optimizer.zero_grad()
                loss = LOSS(model(inputs), target) + sum(penalty(model) for penalty in penalties(form))
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
            if optimizer.memory["calls"] >= passes * len(train):
                return {"steps": len(losses), "calls": optimizer.memory["calls"], "losses": [round(loss, 4) for loss in losses]}
        epoch += 1


def run(task: dict[str, Any], form: str, seed: int, method: str, knobs: dict[str, Any], folder: Path, read_test: bool) -> None:
    """Write one row unless it is there."""
    settings = {**task, "form": form, **FORMS[form], "seed": seed, "method": method, "knobs": plain(knobs)}
    tag = "" if read_test else f"-{digest(settings)[:6]}"
    size = tuple(task[key] for key in ("images", "epochs"))
    other = "" if size == (TASK["images"], TASK["epochs"]) else f"-{size[0]}x{size[1]}"
    path = folder / f"resnet8{other}-{form}-{method}-{seed}{tag}.json"
    if is_written(path, settings):
        return
    model, found = trained(task, form, seed, method, knobs)
    data = data_of(task, seed)
    splits = {"val": data.val, "test": data.test} if read_test else {"val": data.val}
    write_row(path, settings, {name: sp.evaluate(model, split, LOSS) for name, split in splits.items()} | found)


def resnet8(task: dict[str, Any], seeds: list[int], forms: list[str], methods: list[str]) -> None:
    """Run what is asked for and not there."""
    for seed in seeds:
        for form in forms:
            for method in methods:
                run(task, form, seed, method, METHODS[method], RESULTS, read_test=True)


FIRST = {"sampled": 0.4}, {"share": 0.2}
"""With fewer sampled epochs and more in the subspace."""

TRIED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *(("p-sgd", FIRST[0], FIRST[1] | {"size": size}) for size in (10, 20, 40)),
    *(("p-sgd", FIRST[0], FIRST[1] | {"size": 40, "rate": rate}) for rate in (0.3, 3.0)),
    *(("p-sgd", {}, {"size": size}) for size in (20, 40)),
    *(("p-bfgs", {}, {"size": 40, "batch_size": size, "curvature": "batch"}) for size in (1024, 256)),
    ("p-bfgs", {}, {"size": 40, "batch_size": 256, "curvature": "steps"}),
    *(("p-bfgs", {}, {"size": 40, "batch_size": 128, "curvature": how, "recalibrated": 2560}) for how in ("batch", "steps")),
    *(("p-bfgs", {}, {"size": size, "batch_size": 128, "curvature": "steps", "recalibrated": 2560}) for size in (20, 10)),
]
"""Method, and what differs from `TASK` and `METHODS`, in the settings that were tried."""


def tune(task: dict[str, Any]) -> None:
    """Score settings on the validation split, seed 0, dense."""
    for method, other, changed in TRIED:
        knobs = changed if method == "p-bfgs" else METHODS[method] | changed
        run(task | other, "dense", 0, method, {"share": METHODS[method]["share"]} | knobs, RESULTS / "tried", read_test=False)


# Space and time


BALANCE: dict[str, Any] = {"images": 5_000, "batch_size": 64, "rate": 0.05, "momentum": 0.9, "samples_per_epoch": 8, "sampled": [2, 4, 8]}
BALANCE |= {"sizes": [2, 5, 10, 20], "epochs": 2, "subspace_rate": 0.2, "falls": {"0.75": 0.1}, "short": 0.1}
RANKS = (None, 0.5, 0.25, 0.125)
"""Fractions of the full rank of every weight but the last layer's; None for dense weights."""


def small_network(rank: float | None, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    dense = zoo.lenet5()
    if rank is None:
        return dense
    low = sp.factorize(dense, where=lambda name, layer: name != "fc3")
    return sp.prune(low, {name: max(1, round(rank * form.full_rank)) for name, form in named_factors(low)})


def balance(seeds: list[int]) -> None:
    """Write one file for each rank and seed: accuracy by sampled epochs and size of the subspace, beside SGD."""
    for seed in seeds:
        for rank in RANKS:
            settings = {**BALANCE, "rank": rank, "seed": seed}
            path = RESULTS / "balance" / f"lenet5-{'dense' if rank is None else rank}-{seed}.json"
            if not is_written(path, settings):
                start = time.process_time()
                found = cells(rank, seed)
                write_row(path, settings, found | {"cpu_seconds": round(time.process_time() - start, 1)})


def cells(rank: float | None, seed: int) -> dict[str, Any]:
    """Return validation and test accuracy of every cell of a rank."""
    data = zoo.fashion_mnist(BALANCE["batch_size"], seed=seed, limit=BALANCE["images"])
    model, trajectory, kept = small_network(rank, seed), Trajectory(), {}
    optimizer, most = torch.optim.SGD(model.parameters(), BALANCE["rate"], momentum=BALANCE["momentum"]), max(BALANCE["sampled"])

    def keep(epoch: int, line: dict[str, float], model: nn.Module) -> None:
        kept[epoch] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    courses = [Sampling(trajectory, most * BALANCE["samples_per_epoch"])]
    sp.fit(model, data.train, LOSS, optimizer, most, courses=courses, callbacks=[keep], progress=False)
    fit = partial(sp.fit, data=data.train, loss=LOSS, epochs=BALANCE["epochs"], progress=False)
    rows = []
    for epochs in BALANCE["sampled"]:
        model.load_state_dict(kept[epochs][0])
        optimizer.load_state_dict(kept[epochs][1])
        short = sp.Tuning(scheduler=stepwise({0.0: BALANCE["short"]}), scheduler_steps="batch")
        fit(model, optimizer=optimizer, tuning=short, first_epoch=epochs)
        rows.append({"sampled": epochs, "size": None, "epochs": epochs + BALANCE["epochs"]} | scores(model, data))
        for size in BALANCE["sizes"]:
            samples = 1 + epochs * BALANCE["samples_per_epoch"]
            if size >= samples:
                continue
            basis = trajectory.basis(size, last=samples)
            trajectory.restore(model)
            make = partial(Subspace, basis=basis, lr=BALANCE["subspace_rate"])
            falls = {float(share): factor for share, factor in BALANCE["falls"].items()}
            tuning = sp.Tuning(optimizer=make, scheduler=stepwise(falls), scheduler_steps="batch")
            fit(model, tuning=tuning, first_epoch=epochs)
            found = {"sampled": epochs, "size": size, "epochs": epochs + BALANCE["epochs"], "kept": round(basis.kept, 5)}
            rows.append(found | scores(model, data))
    return {"params": sum(p.numel() for p in model.parameters()), "rows": rows}


def scores(model: nn.Module, data: Any) -> dict[str, float]:
    return {name: sp.evaluate(model, getattr(data, name), LOSS)["accuracy"] for name in ("val", "test")}


def main() -> None:
    """Run what is asked for and not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["resnet8", "balance"])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--images", type=int, default=TASK["images"])
    parser.add_argument("--epochs", type=int, default=TASK["epochs"])
    parser.add_argument("--tune", action="store_true", help="score settings on the validation split")
    given = parser.parse_args()
    torch.set_num_threads(1)
    task, seeds = TASK | {"images": given.images, "epochs": given.epochs}, [int(seed) for seed in given.seeds.split(",")]
    if given.what == "balance":
        balance(seeds)
    elif given.tune:
        tune(task)
    else:
        resnet8(task, seeds, given.forms.split(","), given.methods.split(","))


if __name__ == "__main__":
    main()
