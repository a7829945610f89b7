"""Tasks one after the other in one network: ``python benchmarks/tasks.py CASE [METHOD...] [--seeds 0,1,2]``; then ``report``.

Cases: ``pmnist`` (permuted MNIST, 20 tasks), ``cifar`` (CIFAR-10 in five tasks of two classes, a small VGG with BatchNorm). Methods:
`METHODS`. Every method sees each task's data once, with the same epochs, batches and schedule; the rate is one for columns, one for
adapters and one for dense networks; the task is known when it is asked. A run is one file in ``benchmarks/results/tasks``, skipped where it
is there with the same settings. ``--val`` scores on images held out from training, to choose settings, and writes no file; otherwise test
images are read, after each task. Seconds are processor time on one thread.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import spectrim as sp
from run import git_state
from spectrim import zoo
from spectrim.files import write_text
from spectrim.metrics.continual import average_accuracy, forgetting
from spectrim.penalties import L1, Orthogonality
from spectrim.pipeline.environment import environment
from spectrim.surgery import add_task, params_of_task, prune_task, select_task
from spectrim.training.tuning import one_cycle
from spectrim.zoo.data import Batches

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tasks"
CARD, PLOT = ROOT / "docs" / "methods" / "incremental-tasks.md", ROOT / "docs" / "plots" / "tasks.svg"
PROBE = 256
"""Test images of each task whose logits must not change by a bit."""


@dataclass(frozen=True)
class Case:
    """What is learned, and how; the same for every method."""

    tasks: int
    images: int | None
    epochs: int
    batch: int
    rates: dict[str, float]
    first: int


CASES = {
    "pmnist": Case(tasks=20, images=None, epochs=5, batch=512, rates={"columns": 3e-2, "lora": 2e-2, "dense": 3e-3}, first=11),
    "cifar": Case(tasks=5, images=2000, epochs=6, batch=64, rates={"columns": 1e-2, "lora": 1e-2, "dense": 3e-3}, first=8),
}


@dataclass(frozen=True)
class Task:
    """The data of one task."""

    train: Batches
    test: Batches


def tasks_of(name: str, case: Case, seed: int, val: bool) -> list[Task]:
    """Return the tasks of a case; permutations and classes depend on the seed, task 0 of ``pmnist`` is not permuted."""
    generator = torch.Generator().manual_seed(seed)
    if name == "pmnist":
        data = zoo.mnist(batch_size=case.batch, val=10_000 if val else 0, seed=seed)
        orders = [torch.arange(784), *(torch.randperm(784, generator=generator) for _ in range(case.tasks - 1))]
        return [permuted(data, order, case, seed) for order in orders]
    data = zoo.cifar10(batch_size=case.batch, val=10_000 if val else 0, augment=False, seed=seed, normalize="cifar10")
    classes = torch.randperm(10, generator=generator).reshape(case.tasks, -1)
    return [split(data, own, case, seed) for own in classes]


def permuted(data: zoo.Splits, order: Tensor, case: Case, seed: int) -> Task:
    """Return MNIST with its pixels in another order."""

    def of(part: Batches, limit: int | None, shuffle: bool) -> Batches:
        pixels = part.inputs[:limit].flatten(1)[:, order]
        size = case.batch if shuffle else 2000
        return Batches(pixels, part.targets[:limit], size, shuffle, seed, transform=scaled)

    return Task(of(data.train, case.images, True), of(data.val if len(data.val.targets) else data.test, None, False))


def scaled(pixels: Tensor) -> Tensor:
    """Return bytes as floats of mean 0 and deviation 1 over MNIST."""
    return (pixels.float() / 255 - 0.1307) / 0.3081


def split(data: zoo.Splits, classes: Tensor, case: Case, seed: int) -> Task:
    """Return the images of some classes, which count from 0."""

    def of(part: Batches, limit: int | None, shuffle: bool) -> Batches:
        chosen = torch.isin(part.targets, classes).nonzero().flatten()[:limit]
        labels = (part.targets[chosen, None] == classes).long().argmax(1)
        return Batches(part.inputs[chosen], labels, case.batch if shuffle else 500, shuffle, seed, transform=part.transform)

    return Task(of(data.train, case.images, True), of(data.val if len(data.val.targets) else data.test, None, False))


def dense(name: str) -> nn.Module:
    """Return an untrained network."""
    if name == "cifar":
        return zoo.vgg.VGG((16, 32, 64), 2, 3)
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def train(model: nn.Module, task: Task, case: Case, kind: str, penalties: Iterable[Any] = ()) -> None:
    tuning = sp.Tuning(optimizer=partial(torch.optim.Adam, lr=case.rates[kind]), scheduler=one_cycle, scheduler_steps="batch", clip=5.0)
    task.train.set_epoch(0)
    sp.fit(model.train(), task.train, nn.CrossEntropyLoss(), epochs=case.epochs, tuning=tuning, penalties=list(penalties), progress=False)


class Columns:
    """The subject: columns of earlier tasks, a few new ones and a selector."""

    def __init__(self, name: str, case: Case, rank: int, reuse: bool = True, l1: float = 0.0, keep: float = 1.0, **more: Any) -> None:
        self.case, self.rank, self.reuse, self.l1, self.keep = case, rank, reuse, l1, keep
        self.start = more.get("start", "copy")
        self.model = sp.factorize(dense(name), scheme="channel", rank=more.get("first", case.first))
        self.learned, self.left = 0, []

    def learn(self, task: Task) -> None:
        penalties = [L1(self.l1), Orthogonality(0.1)] if self.l1 and self.learned else []
        if self.learned:
            add_task(self.model, self.rank, reuse=self.reuse, start=self.start)
        train(self.model, task, self.case, "columns", penalties)
        if self.learned and self.keep < 1:
            self.left.append(list(prune_task(self.model, self.keep).values()))
        self.learned += 1

    def network(self, task: int) -> nn.Module:
        return select_task(self.model, task) if self.learned > 1 else self.model

    def numbers(self, task: int) -> int:
        return params_of_task(self.model, task)


class FineTuning:
    """One dense network trained on, with a head for each task."""

    def __init__(self, name: str, case: Case) -> None:
        self.case, self.model, self.heads = case, dense(name), []
        self.head = "classifier" if name == "cifar" else "4"

    def learn(self, task: Task) -> None:
        self.heads.append(copy.deepcopy(self.model.get_submodule(self.head)))
        self.heads[-1].reset_parameters()
        train(self.network(-1), task, self.case, "dense")

    def network(self, task: int) -> nn.Module:
        setattr(self.model, self.head, self.heads[task])
        return self.model

    def numbers(self, task: int) -> int:
        return sum(p.numel() for p in self.heads[task].parameters())


class Separate:
    """A dense network for each task."""

    def __init__(self, name: str, case: Case) -> None:
        self.name, self.case, self.models = name, case, []

    def learn(self, task: Task) -> None:
        self.models.append(dense(self.name))
        train(self.models[-1], task, self.case, "dense")

    def network(self, task: int) -> nn.Module:
        return self.models[task]

    def numbers(self, task: int) -> int:
        return sum(t.numel() for t in self.models[task].state_dict().values())


class Adapter(nn.Module):
    """LoRA: ``W + B A``, of a linear layer or a kernel as a matrix ``(out, in * taps)``."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, weight[0].numel()) / weight[0].numel() ** 0.5)
        self.B = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.B @ self.A).view_as(weight)


class Lora(Separate):
    """A dense network of the first task, and adapters for each other task; biases, norms and the head are each task's, too."""

    def __init__(self, name: str, case: Case, rank: int) -> None:
        super().__init__(name, case)
        self.rank = rank

    def learn(self, task: Task) -> None:
        if not self.models:
            super().learn(task)
            return
        model = copy.deepcopy(self.models[0])
        *layers, head = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        head.reset_parameters()
        for layer in layers:
            layer.weight.requires_grad_(False)
            parametrize.register_parametrization(layer, "weight", Adapter(layer.weight, self.rank))
        self.models.append(model)
        train(model, task, self.case, "lora")

    def numbers(self, task: int) -> int:
        state = self.models[task].state_dict()
        return sum(t.numel() for key, t in state.items() if not key.endswith("original"))


METHODS: dict[str, dict[str, Any]] = {
    "rank0": {"kind": Columns, "rank": 0, "label": "selectors alone, rank 0"},
    "rank1": {"kind": Columns, "rank": 1, "label": "columns, rank 1"},
    "wide1": {"kind": Columns, "rank": 1, "first": 40, "label": "columns, rank 1, first task of rank 40"},
    "full1": {"kind": Columns, "rank": 1, "first": 256, "label": "columns, rank 1, first task of full rank"},
    "rank2": {"kind": Columns, "rank": 2, "label": "columns, rank 2"},
    "rank4": {"kind": Columns, "rank": 4, "label": "columns, rank 4"},
    "zeros1": {"kind": Columns, "rank": 1, "start": 0.0, "label": "columns, rank 1, selectors start at 0"},
    "pruned": {"kind": Columns, "rank": 4, "l1": 1e-3, "keep": 0.99, "label": "columns, rank 4, l1 and pruned"},
    "alone1": {"kind": Columns, "rank": 1, "reuse": False, "label": "rank 1 without reuse"},
    "alone2": {"kind": Columns, "rank": 2, "reuse": False, "label": "rank 2 without reuse"},
    "alone4": {"kind": Columns, "rank": 4, "reuse": False, "label": "rank 4 without reuse"},
    "lora1": {"kind": Lora, "rank": 1, "label": "LoRA, rank 1"},
    "lora2": {"kind": Lora, "rank": 2, "label": "LoRA, rank 2"},
    "lora4": {"kind": Lora, "rank": 4, "label": "LoRA, rank 4"},
    "finetuning": {"kind": FineTuning, "label": "fine-tuning"},
    "separate": {"kind": Separate, "label": "a network for each task"},
}

SHOWN = {
    "pmnist": (
        "wide1",
        "rank4",
        "rank1",
        "alone1",
        "finetuning",
        "lora1",
        "separate",
        "lora4",
        "pruned",
        "rank0",
        "zeros1",
        "full1",
        "alone4",
    ),
    "cifar": ("rank2", "alone2", "finetuning", "lora2", "separate", "rank1", "rank4", "rank0"),
}
"""The methods of each case, in the order in which they run when none is named."""


@torch.no_grad()
def score(model: nn.Module, data: Batches) -> tuple[float, Tensor]:
    """Return the accuracy, and the logits of the first images."""
    model.eval()
    right, first = 0, None
    for x, y in data:
        logits = model(x)
        first = logits[:PROBE] if first is None else first
        right += int((logits.argmax(1) == y).sum())
    assert first is not None
    return right / len(data.targets), first


def run(name: str, method: str, case: Case, seed: int, val: bool) -> dict[str, Any]:
    """Learn all tasks, and score all learned so far after each."""
    torch.manual_seed(seed)
    given = {key: value for key, value in METHODS[method].items() if key not in ("kind", "label")}
    tasks = tasks_of(name, case, seed, val)
    learner = METHODS[method]["kind"](name, case, **given)
    matrix: list[list[float | None]] = []
    known: list[Tensor] = []
    changed, seconds = 0, 0.0
    for now, task in enumerate(tasks):
        start = time.process_time()
        learner.learn(task)
        seconds += time.process_time() - start
        row: list[float | None] = []
        for j in range(now + 1):
            accuracy, logits = score(learner.network(j), tasks[j].test)
            row.append(accuracy)
            if j == now:
                known.append(logits)
            else:
                changed += int((logits != known[j]).sum())
        learner.network(now)
        matrix.append([*row, *[None] * (len(tasks) - now - 1)])
        print(
            f"{name} {method} {seed}: task {now}: {row[-1]:.4f}, mean {statistics.fmean(r for r in row if r is not None):.4f}", flush=True
        )
    numbers = [learner.numbers(j) for j in range(len(tasks))]
    R = torch.tensor([[float("nan") if value is None else value for value in row] for row in matrix], dtype=torch.float64)
    found = {"mean": average_accuracy(R), "forgetting": forgetting(R), "first": matrix[0][0], "logits_changed": changed}
    return found | {"numbers": numbers, "seconds": seconds, "matrix": matrix, "columns_left": getattr(learner, "left", [])}


def settings_of(name: str, method: str, case: Case, seed: int) -> dict[str, Any]:
    given = {key: value for key, value in METHODS[method].items() if key not in ("kind", "label")}
    kind = {Columns: "columns", Lora: "lora"}.get(METHODS[method]["kind"], "dense")
    used = asdict(case) | {"rate": case.rates[kind]}
    del used["rates"]
    return {"case": name, "method": method, "seed": seed} | used | given


def stored() -> Iterator[dict[str, Any]]:
    for path in sorted(RESULTS.glob("*.json")):
        yield json.loads(path.read_text(encoding="utf-8"))


def spread(values: list[float], unit: float = 100) -> str:
    """Return mean and deviation over seeds."""
    mean = statistics.fmean(values) * unit
    return f"{mean:.1f} ± {statistics.stdev(values) * unit:.1f}" if len(values) > 1 else f"{mean:.1f}"


def table(name: str) -> str:
    """Return the committed runs of a case as a table."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for found in stored():
        if found["settings"]["case"] == name:
            runs.setdefault(found["settings"]["method"], []).append(found)
    lines = [
        "| method | seeds | mean accuracy, % | forgetting, points | logits changed | numbers for a further task | all tasks | s a task |"
    ]
    lines += ["|---|" + "---:|" * 7]
    for method in (method for method in METHODS if method in runs):
        group = runs[method]
        later = round(statistics.fmean(statistics.fmean(found["numbers"][1:]) for found in group))
        whole = round(statistics.fmean(sum(found["numbers"]) for found in group))
        if method == "finetuning":
            whole += sum(p.numel() for p in dense(name).parameters()) - group[0]["numbers"][0]
        seconds = statistics.fmean(found["seconds"] / len(found["matrix"]) for found in group)
        changed = sum(found["logits_changed"] for found in group)
        cells = [METHODS[method]["label"], len(group), spread([found["mean"] for found in group])]
        cells += [spread([found["forgetting"] for found in group]), f"{changed:,}" if changed else 0, f"{later:,}", f"{whole:,}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{seconds:.0f}"])) + " |")
    return "\n".join(lines)


def page(text: str) -> str:
    """Return the method card with the present tables."""
    for name in CASES:
        head, rest = text.split(f"<!-- {name} -->", 1)
        text = f"{head}<!-- {name} -->\n{table(name)}\n<!-- end {name} -->{rest.split(f'<!-- end {name} -->', 1)[1]}"
    return text


def plot() -> None:
    """Draw the accuracy on each task of permuted MNIST, after the last one was learned."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "spectrim"
    figure = Figure((6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    shown = ("separate", "rank4", "lora4", "rank1", "lora1", "alone1", "finetuning")
    for method in shown:
        last = [f["matrix"][-1] for f in stored() if (f["settings"]["case"], f["settings"]["method"]) == ("pmnist", method)]
        if last:
            means = [100 * statistics.fmean(values) for values in zip(*last, strict=True)]
            axes.plot(range(1, len(means) + 1), means, marker=".", label=METHODS[method]["label"])
    axes.set(xlabel="task, in the order of learning", ylabel="test accuracy at the end, %", xticks=range(1, 21, 2))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("case", choices=[*CASES, "report"])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument("--val", action="store_true", help="score on held-out training images; writes nothing")
    parser.add_argument("--check", action="store_true", help="with report: is the card what the files say?")
    for key in ("tasks", "images", "epochs"):
        parser.add_argument(f"--{key}", type=int)
    given = parser.parse_args()
    if given.case == "report":
        present = CARD.read_text(encoding="utf-8")
        if given.check and page(present) != present:
            sys.exit(f"{CARD.name} is not what the result files say: python benchmarks/tasks.py report")
        if not given.check:
            write_text(CARD, page(present))
            plot()
        return
    torch.set_num_threads(1)
    asked = {key: getattr(given, key) for key in ("tasks", "images", "epochs") if getattr(given, key) is not None}
    case = replace(CASES[given.case], **asked)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for method in given.methods or SHOWN[given.case]:
            path = RESULTS / f"{given.case}-{method}-{seed}.json"
            settings = settings_of(given.case, method, case, seed)
            if not given.val and path.exists() and json.loads(path.read_text(encoding="utf-8"))["settings"] == settings:
                continue
            found = run(given.case, method, case, seed, given.val)
            print(given.case, method, seed, {key: value for key, value in found.items() if key not in ("matrix", "numbers")}, flush=True)
            if not given.val:
                content = {"settings": settings, "commit": git_state(), **found, **environment()}
                write_text(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
