"""The LeNet-5 of Caffe (430,500 weights) on MNIST and simulated crossbars: whole tiles pruned, all weights on levels of the cells.

OMP_NUM_THREADS=1 python benchmarks/crossbar_structured.py                         # all that is missing
OMP_NUM_THREADS=1 python benchmarks/crossbar_structured.py --seeds 0 --networks dense,structured
python benchmarks/crossbar_structured.py --render                                  # table and picture of the method card

Tiles of 32 x 32 cells of 4 bits, differential pairs, weights of 4 bits and a sign. From the dense network of each seed:

- ``dense``: mapped after training;
- ``on levels``: trained on with `MaskedMapping`;
- ``low rank``: ranks by ``Budget(tiles=0.2)``, trained on;
- ``low rank, on levels``: the same, then `MaskedMapping` of both factors;
- ``structured``, ``structured further``: `ADMM` prunes whole columns (inputs) in multiples of the tile, outputs that nothing reads any
  more are dropped, then `MaskedMapping` puts all weights on levels.

A row is one file, ``results/crossbar/mnist-NETWORK-SEED.json``, skipped as long as its settings are the same; networks lie in
``runs/crossbar``. Settings were chosen on the validation split (5,000 images); the test split is read once for each row.
"""

import argparse
import hashlib
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectrim as sp
from cells import mean_std, put
from crossbar import draw_deviations
from micro.harness import environment
from spectrim import zoo
from spectrim.files import write_text
from spectrim.projections import Levels, Structured
from spectrim.runtimes.crossbar import Crossbars, Device, Mapping, monte_carlo, price_on_crossbars
from spectrim.training import ADMM, Hold, MaskedMapping

HERE = Path(__file__).resolve().parent
RESULTS, RUNS, DOCS = HERE / "results" / "crossbar", HERE.parent / "runs" / "crossbar", HERE.parent / "docs"
CARD, PLOT, START, END = (
    DOCS / "methods" / "crossbars.md",
    DOCS / "plots" / "crossbar-structured.svg",
    "<!-- structured -->",
    "<!-- end structured -->",
)
TILE, BITS, SIGMAS, DRAWS, TESTED, SEEDS = 32, 4, (0.0, 0.05, 0.1, 0.2, 0.3), 10, 1000, (0, 1, 2)
MAPPING, DEVICE = Mapping(TILE, TILE, BITS), Device(bits=BITS)
LEVELS = Levels(BITS + 1)
"""A sign and 4 bits: -15 to 15 steps."""

SIDE = 4
"""A filter of ``conv2`` is read at 4 x 4 places by ``fc1``."""

STRUCTURES = {
    "structured": {
        "conv2": Structured(5 * TILE, along="columns"),
        "fc1": Structured(16, along="blocks", block=(500, SIDE**2)),
        "fc2": Structured(2 * TILE, along="columns"),
    },
    "structured further": {
        "conv2": Structured(3 * TILE, along="columns"),
        "fc1": Structured(8, along="blocks", block=(500, SIDE**2)),
        "fc2": Structured(TILE, along="columns"),
    },
}
"""Inputs kept: of 16, 25 and 16 bands of tiles first 5, 8 (those of 16 filters) and 2. ``conv1`` has one tile and stays."""

TRAINING: dict[str, Any] = {"optimizer": "Adam", "batch_size": 128, "augment": "crops, padding 2", "images": 30_000, "validation": 5_000}
NETWORKS: dict[str, dict[str, Any]] = {
    "dense": {"epochs": 6, "peak": 1e-3, "constant": 0.25},
    "on levels": {"epochs": 3, "peak": 3e-4, "constant": 0.75, "rounds": 8},
    "low rank": {"epochs": 3, "peak": 5e-4, "constant": 0.5, "tiles": 0.2},
    "low rank, on levels": {"epochs": 3, "peak": 3e-4, "constant": 0.75, "rounds": 8},
    "structured": {"epochs": 8, "peak": 1e-3, "constant": 0.625, "rounds": 10, "ramp": 0.75, "mapping epochs": 3, "mapping rounds": 8},
    "structured further": {
        "epochs": 8,
        "peak": 1e-3,
        "constant": 0.625,
        "rounds": 10,
        "ramp": 0.75,
        "mapping epochs": 3,
        "mapping rounds": 8,
    },
}
BEFORE = {"dense": None, "low rank, on levels": "low rank"}
"""What a network is trained from; ``dense`` unless it stands here."""


def trained(model: nn.Module, data: Any, epochs: int, peak: float, constant: float, courses: Any = (), penalties: Any = ()) -> nn.Module:
    """Train in place: a constant rate for a share of the steps, then a cosine to zero."""
    optimizer = torch.optim.Adam(model.parameters(), peak)
    steps = epochs * len(data.train)

    def rate(step: int) -> float:
        done = step / steps
        return 1.0 if done < constant else 0.5 * (1 + math.cos(math.pi * min(1.0, (done - constant) / (1 - constant))))

    tuning = sp.Tuning(scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, rate), scheduler_steps="batch")
    more = {"tuning": tuning, "courses": courses, "penalties": penalties, "callbacks": [say]}
    sp.fit(model, data.train, nn.CrossEntropyLoss(), optimizer, epochs, progress=False, **more)
    return model.eval()


def say(epoch: int, line: dict[str, float], model: nn.Module) -> None:
    """Print the line of an epoch."""
    print(epoch, {key: round(value, 4) for key, value in line.items()}, flush=True)


@torch.no_grad()
def without_unread(model: Any) -> Any:
    """Drop what nothing reads: rows of ``fc1`` and filters of ``conv2`` whose columns in the next layer are zero; the same function."""
    unread = ~model.fc2.weight.any(0)
    model.fc1.weight[unread], model.fc1.bias[unread] = 0, 0
    unread = ~model.fc1.weight.reshape(500, -1, SIDE**2).any(2).any(0)
    model.conv2.weight[unread], model.conv2.bias[unread] = 0, 0
    return model


def made(name: str, start: Any, data: Any) -> nn.Module:
    """Return one of the networks, trained from `start`."""
    knobs = NETWORKS[name]
    basic = {key: knobs[key] for key in ("epochs", "peak", "constant")}
    if name == "dense":
        return trained(zoo.caffe_lenet5().to(memory_format=torch.channels_last), data, **basic)
    if name == "low rank":
        images, crossbars = next(iter(data.val))[0][:1], Crossbars(DEVICE, MAPPING)
        low = sp.factorize(start, where=lambda name, module: name != "conv1")
        low = sp.prune(low, sp.allocate(low, sp.Budget(tiles=knobs["tiles"]), images, crossbars=crossbars))
        return sp.merge(trained(low.train(), data, **basic, penalties=[sp.Orthogonality(0.01)]))
    if name in ("on levels", "low rank, on levels"):
        return trained(start.train(), data, **basic, courses=[MaskedMapping({"*": LEVELS}, end=knobs["constant"], rounds=knobs["rounds"])])
    admm = ADMM(STRUCTURES[name], rounds=knobs["rounds"], end=knobs["constant"], ramp=knobs["ramp"])
    model = without_unread(trained(start.train(), data, **basic, courses=[admm]))
    onto = [Hold(), MaskedMapping({"*": LEVELS}, end=0.75, rounds=knobs["mapping rounds"])]
    return trained(model.train(), data, knobs["mapping epochs"], 3e-4, 0.75, courses=onto)


def digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode()).hexdigest()[:16]


def settings_of(name: str, seed: int) -> dict[str, Any]:
    """Return what a row depends on, also by the network that it starts from."""
    own: dict[str, Any] = {"network": name, "seed": seed, "tile": TILE, "bits": BITS, **TRAINING, **NETWORKS[name]}
    if name in STRUCTURES:
        own["structures"] = {layer: repr(structure) for layer, structure in STRUCTURES[name].items()}
    before = BEFORE.get(name, "dense")
    return own | ({} if before is None else {"from": digest(settings_of(before, seed))})


def network(name: str, seed: int, data: Any) -> tuple[Any, float]:
    """Return a network of a seed and the processor time of its training; trained now unless it was before."""
    path = RUNS / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}-{digest(settings_of(name, seed))}.pt"
    if path.exists():
        held = torch.load(path, weights_only=False)  # our own file
        return held["model"], held["seconds"]
    before = BEFORE.get(name, "dense")
    start = None if before is None else network(before, seed, data)[0]
    torch.manual_seed(seed)
    began = time.process_time()
    model = made(name, start, data)
    seconds = time.process_time() - began
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model, "seconds": seconds}, path)
    return model, seconds


def off_levels(model: nn.Module) -> float:
    """Return the largest distance of a weight from the level that the mapping gives it, in steps."""
    weights = [parameter.detach().flatten(1) for parameter in model.parameters() if parameter.dim() > 1]
    return max(float((weight - MAPPING.quantized(weight)).abs().max()) / MAPPING.step(weight) for weight in weights)


def counts(model: nn.Module) -> dict[str, Any]:
    """Return what a network holds: weights that have cells, those of them that are not zero, tiles, and the distance from levels."""
    weights = [parameter.detach().flatten(1) for parameter in model.parameters() if parameter.dim() > 1]
    return {
        "weights": sum(int(MAPPING.built(weight).sum()) for weight in weights),
        "not zero": sum(int(weight.count_nonzero()) for weight in weights),
        "tiles": price_on_crossbars(model, DEVICE, MAPPING).tiles,
        "off levels, steps": off_levels(model),
    }


def count_again(seeds: list[int]) -> None:
    """Write today's counts into rows whose networks are still there; nothing is trained and no test split is read."""
    for seed in seeds:
        for name in NETWORKS:
            if path_of(name, seed).exists():
                found = json.loads(path_of(name, seed).read_text(encoding="utf-8"))
                write_text(path_of(name, seed), json.dumps(found | counts(network(name, seed, None)[0]), indent=1) + "\n")


def row(name: str, seed: int, data: Any, *, draws: int, tested: int) -> dict[str, Any]:
    """Measure one network."""
    model, seconds = network(name, seed, data)
    loss = nn.CrossEntropyLoss()
    known = [batch for batch, _ in zip(zoo.mnist(batch_size=500, seed=0).test, range(tested // 500), strict=False)]
    accuracies = {}
    for sigma in SIGMAS:
        found = monte_carlo(model, known, loss, Device(bits=BITS, programming=sigma), MAPPING, draws=draws if sigma else 1)
        accuracies[str(sigma)] = list(found.accuracies)
        print(name, seed, sigma, f"{100 * found.accuracy[0]:.2f}", flush=True)
    return {
        **counts(model),
        "validation": sp.evaluate(model, data.val, loss),
        "test": sp.evaluate(model, data.test, loss),
        "accuracies": accuracies,
        "cpu_seconds": round(seconds, 1),
    }


def path_of(name: str, seed: int) -> Path:
    return RESULTS / f"mnist-{name.replace(', ', '-').replace(' ', '-')}-{seed}.json"


def rows() -> dict[str, list[dict[str, Any]]]:
    """Return the rows that are there, by network and seed."""
    found = {name: [path_of(name, seed) for seed in SEEDS] for name in NETWORKS}
    return {name: [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()] for name, paths in found.items()}


def table() -> str:
    """Return the table of all rows: means and sample standard deviations over seeds, of deviations over seeds and draws."""
    found = rows()
    before = statistics.fmean(row["weights"] for row in found["dense"]), statistics.fmean(row["tiles"] for row in found["dense"])
    lines = [
        f"| network | seeds | weights | tiles | off levels | test, digital | {' | '.join(f'deviation {sigma:g}' for sigma in SIGMAS)} |",
        "|---|---|--:|--:|--:|--:|" + "--:|" * len(SIGMAS),
    ]
    for name, those in found.items():
        if those:
            weights, tiles = (statistics.fmean(row[key] for row in those) for key in ("weights", "tiles"))
            off = max(row["off levels, steps"] for row in those)
            cells = [
                name,
                ", ".join(str(row["settings"]["seed"]) for row in those),
                f"{weights:,.0f} ({before[0] / weights:.1f}x)",
                f"{tiles:,.0f} ({before[1] / tiles:.1f}x)",
                "none" if off < 1e-4 else f"up to {off:.2f}",
                mean_std([100 * row["test"]["accuracy"] for row in those], 2),
                *(mean_std([100 * value for row in those for value in row["accuracies"][str(sigma)]]) for sigma in SIGMAS),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw() -> None:
    """Draw accuracy against deviation."""
    values = {
        name: [[100 * value for row in those for value in row["accuracies"][str(sigma)]] for sigma in SIGMAS]
        for name, those in rows().items()
    }
    draw_deviations(values, PLOT)


def render() -> None:
    """Write table and picture of the method card."""
    put(CARD, START, END, table())
    draw()


def main() -> None:
    """Run what is asked for and not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--networks", default=";".join(NETWORKS), help="with semicolons")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--tested", type=int, default=TESTED, help="images of the test split for each draw")
    parser.add_argument("--images", type=int, default=TRAINING["images"], help="of training; all are 55,000")
    parser.add_argument("--train-only", action="store_true", help="train and say the validation score; the test split is not read")
    parser.add_argument("--render", action="store_true", help="write table and picture of the method card from the result files")
    parser.add_argument("--count", action="store_true", help="count weights and tiles of the rows again, train nothing")
    given = parser.parse_args()
    if given.render:
        render()
        return
    torch.set_num_threads(1)
    TRAINING["images"] = given.images
    if given.count:
        count_again([int(seed) for seed in given.seeds.split(",")])
        return
    for seed in map(int, given.seeds.split(",")):
        data = zoo.mnist(TRAINING["batch_size"], TRAINING["validation"], True, seed, given.images + TRAINING["validation"])
        for name in given.networks.split(";"):
            if given.train_only:
                model, seconds = network(name, seed, data)
                score = sp.evaluate(model, data.val, nn.CrossEntropyLoss())
                print(name, seed, score, f"off levels {off_levels(model):.3f}", f"{seconds:.0f} s", flush=True)
                continue
            settings = settings_of(name, seed) | {"draws": given.draws, "tested": given.tested}
            if path_of(name, seed).exists() and json.loads(path_of(name, seed).read_text(encoding="utf-8"))["digest"] == digest(settings):
                continue
            found = row(name, seed, data, draws=given.draws, tested=given.tested)
            RESULTS.mkdir(parents=True, exist_ok=True)
            whole = {"settings": settings, "digest": digest(settings), "environment": environment(), **found}
            write_text(path_of(name, seed), json.dumps(whole, indent=1, default=repr) + "\n")


if __name__ == "__main__":
    main()
