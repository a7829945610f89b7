"""Compare methods from one dense start, with equal epochs and MACs: ``python benchmarks/compare.py TASK``.

A task is ``benchmarks/compare/TASK.yaml``; ``--methods a,b``, ``--budgets 0.5,0.33`` and ``--seeds 0,1`` take a part of it. A run is a
method, a budget and a seed: one file, ``benchmarks/results/compare/TASK/METHOD-BUDGET-SEED.json``, written when it has finished and
skipped as long as its settings are the same; a stopped run goes on from its last epoch. Several processes may work on one task: each
takes the runs that no other has. ``--calibration-only`` trains nothing (epochs 0). ``compare_report.py`` renders the files into
``docs/comparison.md``.
"""

import argparse
import copy
import fcntl
import hashlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from run import git_state
from spectrim import (
    Budget,
    Distillation,
    Energy,
    Hoyer,
    Orthogonality,
    Squeeze,
    evaluate,
    factorize,
    fit,
    load,
    match,
    measure,
    merge,
    prune,
    save,
)
from spectrim.budget.cut_to import cut_to
from spectrim.budget.ways import WAYS
from spectrim.files import write_text
from spectrim.layers import named_factors
from spectrim.metrics.inputs import one_example
from spectrim.metrics.macs import count_macs
from spectrim.penalties import L1, FrobeniusDecay, PolarHoyer
from spectrim.pipeline.components import make, make_loss, seed_everything
from spectrim.pipeline.environment import environment
from spectrim.surgery import balance_
from spectrim.surgery.preset import preset_
from spectrim.surgery.select import head_of
from spectrim.training.prepared import Precision
from spectrim.training.ramp import Ramp
from spectrim.training.tuning import Tuning

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TASKS = HERE / "compare"
RESULTS = HERE / "results" / "compare"
RUNS = ROOT / "runs" / "compare"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CALIBRATION_ONLY = ("truncated", "whitened", "ours")

Component = dict[str, Any]
Scores = dict[str, float]


@dataclass(frozen=True)
class Task:
    """What all methods of one task share, and what each has of its own; see the comments in ``benchmarks/compare/resnet8.yaml``."""

    model: Component
    data: Component
    loss: Component
    methods: dict[str, dict[str, Any]]
    budgets: list[float]
    seeds: list[int]
    epochs: int
    peak: float
    optimizer: Component
    scheduler: Component
    merit: str = "accuracy"
    limits: list[str] = field(default_factory=lambda: ["macs"])
    scheme: str = "auto"
    where: list[str] | None = None
    clip: float | None = Tuning.clip
    distill: dict[str, Any] = field(default_factory=lambda: {"temperature": 4.0, "weight": 0.7, "dim": -1})
    dense: dict[str, Any] | None = None
    calibration: int = 1024
    recalibration: int = 4096
    threads: int = 1
    compiled: bool = Tuning.compiled
    precision: Precision = Tuning.precision
    note: str = ""

    def tuning(self, scheduler: Any = None) -> Tuning:
        """Return how every method trains, by a schedule that it brings."""
        return Tuning(scheduler=scheduler, scheduler_steps="batch", clip=self.clip, compiled=self.compiled, precision=self.precision)

    def runs(self, methods: Sequence[str], budgets: Sequence[float] | None, seeds: Sequence[int] | None) -> list[tuple[int, float, str]]:
        """Return the runs of some methods, seed by seed; budgets and seeds are the method's own, or the task's, when not given."""
        asked = {
            (seed, budget, method)
            for method in methods
            for budget in budgets or self.methods[method].get("budgets", self.budgets)
            for seed in seeds or self.methods[method].get("seeds", self.seeds)
        }
        return sorted(asked, key=lambda run: (run[0], -run[1], list(methods).index(run[2])))

    def shared(self) -> dict[str, Any]:
        """Return the settings that every run depends on."""
        chosen = ("methods", "budgets", "seeds", "epochs", "merit", "compiled", "note")
        return {name: value for name, value in asdict(self).items() if name not in chosen and (name, value) != ("precision", "no")}


def component(value: str | Component) -> Component:
    return {"class_path": value, "init_args": {}} if isinstance(value, str) else {"init_args": {}, **value}


def parse_task(raw: dict[str, Any]) -> Task:
    parts = ("model", "data", "loss", "optimizer", "scheduler")
    known = {entry.name for entry in fields(Task)}
    if unknown := sorted(set(raw) - known):
        sys.exit(f"unknown settings {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    methods = {name: knobs or {} for name, knobs in raw["methods"].items()}
    if unknown := sorted(set(methods) - set(METHODS)):
        sys.exit(f"unknown methods {', '.join(unknown)}; known: {', '.join(METHODS)}")
    return Task(**{**raw, **{name: component(raw[name]) for name in parts}, "methods": methods})


def read_task(name: str) -> Task:
    path = TASKS / f"{name}.yaml"
    if not path.is_file():
        sys.exit(f"no such task: {name}; there are: {', '.join(sorted(entry.stem for entry in TASKS.glob('*.yaml')))}")
    return parse_task(yaml.safe_load(path.read_text(encoding="utf-8")))


def digest(task: Task, method: str, budget: float, seed: int, epochs: int) -> str:
    """Return what says whether a result file is still that of the settings."""
    knobs = {name: value for name, value in task.methods[method].items() if name not in ("budgets", "seeds")}
    content = [task.shared(), method, knobs, budget, seed, epochs]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def label(method: str, budget: float, seed: int, epochs: int) -> str:
    return f"{method}-{budget:g}-{seed}" + ("" if epochs else "-untrained")


@dataclass
class Job:
    """One run: what a method gets, and what they all do the same way."""

    task: Task
    method: str
    budget: float
    seed: int
    epochs: int
    dense: nn.Module
    data: Any
    loss: Callable[[Any, Tensor], Tensor]
    folder: Path
    scores: dict[str, Scores] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.example = one_example(self.data.val).to(DEVICE)
        self.costs = costs(self.dense, self.example)

    @property
    def knobs(self) -> dict[str, Any]:
        return self.task.methods[self.method]

    @property
    def limits(self) -> Budget:
        return Budget(**dict.fromkeys(self.task.limits, self.budget))

    @property
    def half(self) -> int:
        """The epochs before the cut of a method that trains before and after it."""
        return self.epochs // 2

    def fits(self, model: nn.Module) -> bool:
        own = costs(model, self.example)
        return all(own[name] <= self.budget * self.costs[name] + 1e-6 for name in self.task.limits)

    def factorized(self, model: nn.Module | None = None) -> nn.Module:
        where = None if self.task.where is None else match(*self.task.where)
        return factorize(self.dense if model is None else model, self.task.scheme, where)

    def some(self, examples: int) -> list[Any]:
        """Return the first training batches of the first epoch."""
        self.data.train.set_epoch(0)
        batches = []
        for inputs, target in self.data.train:
            batches.append((inputs.to(DEVICE), target.to(DEVICE)))
            if sum(len(target) for _, target in batches) >= examples:
                break
        return batches

    def cut_to(self, low: nn.Module, way: str, calibration: Any = None) -> nn.Module:
        """Cut a factorized network to the budget; statistics and factors stay as the cut leaves them."""
        cut, _ = cut_to(low, self.limits, WAYS[way], self.example, lambda network: {"loss": 0.0}, calibration=calibration)
        return cut

    def judge(self, moment: str, model: nn.Module) -> None:
        """Note the score on the validation split."""
        self.scores[moment] = evaluate(model, self.data.val, self.loss)

    def renew(self, model: nn.Module) -> None:
        """Recalibrate BatchNorm, in place."""
        with torch.no_grad():
            update_bn(self.some(self.task.recalibration), model, device=DEVICE)

    def judged_cut(self, model: nn.Module) -> nn.Module:
        """Note the scores of a network that has just been cut, before and after BatchNorm is recalibrated."""
        self.judge("cut", model)
        self.renew(model)
        self.judge("recalibrated", model)
        return model

    def fresh(self) -> nn.Module:
        """Return the task's network with the random weights of the seed, as its dense network had them."""
        seed_everything(self.seed)
        return make(self.task.model, "model").to(DEVICE, memory_format=torch.channels_last)

    def train(
        self, model: nn.Module, epochs: int, name: str, first: int = 0, penalties: Sequence[Any] = (), courses: Sequence[Any] = ()
    ) -> nn.Module:
        """Train in place by the task's optimizer, peak rate and schedule, which spans these epochs; return the same model.

        The dense network teaches where the method's name ends on ``_distilled``.
        """
        if not epochs:
            return model
        if not penalties and not courses:
            balance_(model)
        peak, steps = self.knobs.get("peak", self.task.peak), epochs * len(self.data.train)
        optimizer, scheduler = trainer(self.task, model, peak, steps)
        taught = self.method.endswith("_distilled")
        lessons = [Distillation(copy.deepcopy(self.dense), **self.task.distill)] if taught else []
        history = fit(
            model, self.data.train, self.loss, optimizer, epochs, penalties=penalties, courses=courses, lessons=lessons,
            tuning=self.task.tuning(scheduler), checkpoint=self.folder / name, first_epoch=first, progress=False,
        )  # fmt: skip
        self.log += history.epochs
        return model


def trainer(task: Task, model: nn.Module, peak: float, steps: int, **own: float) -> tuple[Any, Any]:
    optimizer = make(task.optimizer, "optimizer", [p for p in model.parameters() if p.requires_grad], lr=peak, **own)
    return optimizer, make(task.scheduler, "scheduler", optimizer, total_steps=steps, T_max=steps, max_lr=peak)


def costs(model: nn.Module, example: Any) -> dict[str, int]:
    return {"macs": count_macs(model, example), "params": sum(parameter.numel() for parameter in model.parameters())}


def largest(candidate: Callable[[float], nn.Module], fits: Callable[[nn.Module], bool], steps: int = 16) -> tuple[float, nn.Module]:
    """Return the largest number in (0, 1), and what it makes, that fits; found by bisection."""
    low, high, found = 0.0, 1.0, None
    for _ in range(steps):
        middle = (low + high) / 2
        made = candidate(middle)
        if fits(made):
            low, found = middle, made
        else:
            high = middle
    if found is None:
        raise ValueError("nothing fits into the budget")
    return low, found


# Methods: each returns the network as it will be judged


def truncated(job: Job) -> nn.Module:
    """Cut the dense network at once by the knapsack over spectral energy, recalibrate, fine-tune."""
    job.scores["before_cut"] = job.scores["dense"]
    return job.train(job.judged_cut(job.cut_to(job.factorized(), "plain")), job.epochs, "finetune")


def whitened(job: Job) -> nn.Module:
    """Cut each weight where the layer's output changes least on calibration examples; ranks by the same measure; fine-tune."""
    from spectrim.surgery.calibrate import calibrate

    low = job.factorized()
    job.scores["before_cut"] = job.scores["dense"]
    known = calibrate(low, [inputs for inputs, _ in job.some(job.task.calibration)], examples=job.task.calibration)
    return job.train(job.judged_cut(job.cut_to(low, "whitened", known)), job.epochs, "finetune")


def svd_training(job: Job, *sparsity: Any) -> nn.Module:
    """Train the factors with orthogonality and a sparsity penalty, cut by the energy threshold that meets the budget, fine-tune."""
    orthogonality = Orthogonality(job.knobs["orthogonality"])
    low = job.train(job.factorized(), job.half, "regularize", penalties=[orthogonality, *sparsity])
    job.judge("before_cut", low)
    keep, cut = largest(lambda keep: prune(low, Energy(keep)), lambda cut: job.fits(merge(cut)))
    job.notes["energy_kept"] = keep
    return job.train(job.judged_cut(cut), job.epochs - job.half, "finetune", job.half, [orthogonality])


def paper(job: Job) -> nn.Module:
    """SVD training as published: Hoyer."""
    return svd_training(job, Hoyer(job.knobs["hoyer"]))


def l1(job: Job) -> nn.Module:
    """SVD training with L1."""
    return svd_training(job, L1(job.knobs["l1"]))


def polar_hoyer(job: Job) -> nn.Module:
    """Regularize the dense weights, then cut at once and fine-tune."""
    scheme = job.task.scheme if job.task.scheme in ("channel", "spatial") else "channel"
    penalty = PolarHoyer(job.knobs["weight"], scheme=scheme)
    dense = job.train(copy.deepcopy(job.dense), job.half, "regularize", penalties=[penalty])
    job.judge("before_cut", dense)
    low = job.factorized(dense)
    cut = job.judged_cut(job.cut_to(low, "plain"))
    return job.train(cut, job.epochs - job.half, "finetune", job.half)


def ours(job: Job) -> nn.Module:
    """`spectrim.compress`; rows of another name differ in what their knobs say."""
    from spectrim.pipeline.compress import compress
    from spectrim.pipeline.teaching import teacher_for

    peak, knobs = job.knobs.get("peak", job.task.peak), job.knobs
    distill: Any = "auto" if knobs.get("distill", True) else None
    if "teach" in knobs:
        teacher = teacher_for(job.dense, job.some(job.task.calibration), job.loss)
        assert teacher is not None
        distill = replace(teacher, **knobs["teach"])
    penalties = [kind(knobs[name]) for name, kind in (("orthogonality", Orthogonality), ("decay", FrobeniusDecay)) if name in knobs]
    made = compress(
        job.dense, job.data.train, job.loss, job.limits, job.epochs, example_inputs=job.example, eval_data=job.data.val,
        scheme=job.task.scheme, where=None if job.task.where is None else match(*job.task.where),
        writing=knobs.get("writing", "pair"), distill=distill,
        tuning=replace(job.task.tuning(), optimizer=lambda parameters: make(job.task.optimizer, "optimizer", list(parameters), lr=peak)),
        examples=job.task.calibration, folder=job.folder, progress=False, squeeze=knobs.get("squeeze", 0.0),
        cut=knobs.get("cut", "auto"),
        penalties=penalties,
    )  # fmt: skip
    job.notes |= {"cut": made.cut, "teacher": made.teacher}
    job.log += made.history.epochs
    job.scores["before_cut"] = made.scores.get("squeezed", job.scores["dense"])
    job.scores |= {name: made.scores[name] for name in ("cut", "recalibrated", "corrected") if name in made.scores}
    return made.low


def narrow(job: Job) -> nn.Module:
    """A narrower dense network from random weights: it starts from nothing."""
    settings = component(job.knobs["model"])

    def build(width: float) -> nn.Module:
        seed_everything(job.seed)
        return make({**settings, "init_args": {**settings["init_args"], "width": width}}, "model").to(DEVICE)

    job.notes["width"], model = largest(build, job.fits, steps=10)
    return job.train(model, job.epochs, "train")


def filters(job: Job) -> nn.Module:
    """Prune whole channels by their norm over all layers they couple (torch-pruning), uniformly or globally, and fine-tune.

    Uniform or global is what scores better on the validation split once BatchNorm is recalibrated.
    """
    import torch_pruning

    def cut(kept: float, everywhere: bool) -> nn.Module:
        model = copy.deepcopy(job.dense).eval()
        head = model.get_submodule(head_of(model) or "")
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        torch_pruning.pruner.MagnitudePruner(
            model, job.example, importance, global_pruning=everywhere, pruning_ratio=1 - kept, ignored_layers=[head]
        ).step()
        return model

    candidates = {}
    for name, everywhere in (("uniform", False), ("global", True)):
        kept, model = largest(lambda kept, everywhere=everywhere: cut(kept, everywhere), job.fits, steps=10)
        job.judged_cut(model)
        candidates[name] = kept, model, {moment: job.scores[moment] for moment in ("cut", "recalibrated")}
    best = min(candidates, key=lambda name: candidates[name][2]["recalibrated"]["loss"])
    kept, model, scores = candidates[best]
    job.scores |= {"before_cut": job.scores["dense"], **scores}
    job.notes |= {"channels": best, "channels_kept": kept, "torch_pruning": version("torch-pruning")}
    return job.train(model, job.epochs, "finetune")


# From random weights, three times the task's epochs in all: as many as a dense network of twice the epochs has had after its fine-tuning


def scratch(job: Job) -> nn.Module:
    """SVD training as published: full rank with orthogonality, the same with Hoyer, the cut, fine-tuning; a third each."""
    orthogonality, third = Orthogonality(job.knobs["orthogonality"]), job.epochs
    low = job.train(job.factorized(job.fresh()), third, "full", penalties=[orthogonality])
    job.judge("full", low)
    low = job.train(low, third, "regularize", third, [orthogonality, Hoyer(job.knobs["hoyer"])])
    job.judge("before_cut", low)
    keep, cut = largest(lambda keep: prune(low, Energy(keep)), lambda cut: job.fits(merge(cut)))
    job.notes["energy_kept"] = keep
    return job.train(job.judged_cut(cut), third, "finetune", 2 * third, [orthogonality])


def by_course(job: Job, course: Any) -> nn.Module:
    """Train at full rank for a third, then cut along a course that ends in the middle of the rest."""
    orthogonality, third = Orthogonality(job.knobs["orthogonality"]), job.epochs
    low = job.train(job.factorized(job.fresh()), third, "full", penalties=[orthogonality])
    job.judge("full", low)
    return job.train(low, 2 * third, "course", third, [orthogonality], [course])


def scratch_squeezed(job: Job) -> nn.Module:
    """As `scratch`, with a penalty whose strength follows the budget."""
    return by_course(job, Squeeze(job.limits, end=0.5))


def scratch_ramp(job: Job) -> nn.Module:
    """As `scratch`, with cuts along a ramp and no sparsity penalty."""
    return by_course(job, Ramp(job.limits, end=0.5))


def preset(job: Job) -> nn.Module:
    """Train pairs of thin layers from random weights; ranks by the spectra of random dense weights."""
    fresh = job.fresh()
    low = job.cut_to(job.factorized(fresh), "plain")
    preset_(low, fresh)
    job.notes["ranks"] = {key: factors.rank for key, factors in named_factors(low)}
    return job.train(merge(low), 3 * job.epochs, "train")


def longer(job: Job) -> nn.Module:
    """The dense network, trained on."""
    return job.train(copy.deepcopy(job.dense), job.epochs, "finetune")


METHODS: dict[str, Callable[[Job], nn.Module]] = {
    method.__name__: method for method in (truncated, whitened, paper, l1, polar_hoyer, ours, narrow, filters, longer)
}
FROM_SCRATCH: dict[str, Callable[[Job], nn.Module]] = {
    method.__name__: method for method in (scratch, scratch_squeezed, scratch_ramp, preset)
}
METHODS |= FROM_SCRATCH
METHODS |= {f"{method.__name__}_distilled": method for method in (truncated, whitened, paper, narrow)}  # with a teacher, see `Job.train`
METHODS |= dict.fromkeys(
    (
        "ours_squeezed",
        "ours_squeezed_fast",
        "ours_orthogonal",
        "ours_decayed",
        "ours_undistilled",
        "ours_hinted",
        "ours_taught",
        "ours_whitened",
        "ours_interpolative",
    ),
    ours,
)


# Runs


class Start:
    """The dense network and the data of each seed, made once in a process."""

    def __init__(self, task: Task, runs: Path) -> None:
        self.task, self.runs = task, runs
        self.git = git_state()  # of the code that is loaded, whatever lies in the folder when a run ends
        self.loss = make_loss(task.loss)
        self.made: dict[tuple[int, bool], tuple[nn.Module, Any]] = {}
        self.scored: dict[tuple[int, str], Scores] = {}

    def of(self, seed: int, trained: bool = True) -> tuple[nn.Module, Any]:
        """Return the dense network and the data of a seed; an untrained one serves for the costs of what starts from random weights."""
        if (seed, trained) not in self.made:
            settings = {**self.task.data, "init_args": {**self.task.data["init_args"], "seed": seed}}
            data = make(settings, "data").to(DEVICE)  # small enough to lie on a GPU as a whole
            seed_everything(seed)
            model = make(self.task.model, "model")
            dense = self.trained(model, data, seed) if self.task.dense and trained else model
            self.made[seed, trained] = (
                dense.to(DEVICE, memory_format=torch.channels_last),
                data,
            )  # a quarter faster, the same numbers but for rounding
        return self.made[seed, trained]

    def trained(self, model: nn.Module, data: Any, seed: int) -> nn.Module:
        """Train the dense network, or load the one that was trained with these settings, here or before: the results may keep it."""
        settings = [self.task.dense, *(asdict(self.task)[name] for name in ("model", "data", "loss", "optimizer", "scheduler", "clip"))]
        folder = self.runs / f"dense-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}-{seed}"
        assert self.task.dense is not None
        if (kept := RESULTS / self.runs.name / folder.name).is_dir():
            return load(kept, model)
        with claimed(folder.with_suffix(".lock"), wait=True):
            if not (folder / "done").exists():
                own = dict(self.task.dense)
                epochs, peak = own.pop("epochs"), own.pop("peak")
                optimizer, scheduler = trainer(self.task, model.to(DEVICE), peak, epochs * len(data.train), **own)
                tuning = self.task.tuning(scheduler)
                fit(model, data.train, self.loss, optimizer, epochs, tuning=tuning, checkpoint=folder / "training", progress=False)
                save(model, folder)
                (folder / "done").touch()
            return load(folder, model)

    def score(self, seed: int, split: str) -> Scores:
        if (seed, split) not in self.scored:
            model, data = self.of(seed)
            self.scored[seed, split] = evaluate(model, getattr(data, split), self.loss)
        return self.scored[seed, split]


@contextmanager
def claimed(path: Path, wait: bool) -> Iterator[bool]:
    """Hold a lock file that goes with the process; whether it was free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
            return
        yield True


def run_one(name: str, start: Start, method: str, budget: float, seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """Run one method and return the content of its result file; the test split is read at the very end."""
    task, begin = start.task, time.perf_counter()
    random = method in FROM_SCRATCH
    dense, data = start.of(seed, trained=not random)
    data.train.set_epoch(0)  # what calibrates does not depend on the runs before
    job = Job(task, method, budget, seed, epochs, dense, data, start.loss, folder)
    if not random:
        job.scores["dense"] = start.score(seed, "val")
    seed_everything(seed)
    tuned = METHODS[method](job)
    ranks = {key: factors.rank for key, factors in named_factors(tuned)}
    final = merge(tuned) if ranks else tuned
    job.judge("end", final)
    if not job.fits(final):
        raise ValueError(f"{label(method, budget, seed, epochs)}: {costs(final, job.example)} do not fit into {budget} of {job.costs}")
    own, test = measure(final, job.example, latency=False), evaluate(final, data.test, start.loss)
    return {
        "task": name, "method": method, "budget": budget, "seed": seed, "epochs": epochs,
        "digest": digest(task, method, budget, seed, epochs),
        "settings": task.shared(), "knobs": job.knobs,
        "dense": {**job.costs, "test": start.score(seed, "test"), "val": start.score(seed, "val")},
        "final": {
            "macs": own.macs, "params": own.params, "size_bytes": own.size_bytes, "macs_fraction": (own.macs or 0) / job.costs["macs"],
            "params_fraction": own.params / job.costs["params"], "test": test, "val": job.scores["end"],
        },
        "val": job.scores, "ranks": ranks, "notes": job.notes, "log": job.log,
        "seconds": round(time.perf_counter() - begin, 1), "training_seconds": round(sum(line["seconds"] for line in job.log), 1),
        "environment": environment(), "git": start.git,
    }  # fmt: skip


def finished(path: Path, task: Task, method: str, budget: float, seed: int, epochs: int) -> bool:
    if not path.is_file():
        return False
    return bool(json.loads(path.read_text(encoding="utf-8"))["digest"] == digest(task, method, budget, seed, epochs))


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")


def line(content: dict[str, Any], merit: str) -> str:
    """Return one line about a finished run."""
    key = "accuracy" if merit == "accuracy" else "loss"
    way = ", ".join(f"{moment} {scores[key]:.4f}" for moment, scores in content["val"].items())
    name = label(content["method"], content["budget"], content["seed"], content["epochs"])
    tests = f"test {content['final']['test'][key]:.4f} (dense {content['dense']['test'][key]:.4f})"
    return f"{content['task']}/{name}: {tests}, MACs {content['final']['macs_fraction']:.4f}, val {way}, {content['seconds']:.0f} s"


def run_task(
    name: str, task: Task, methods: Sequence[str], budgets: Sequence[float] | None, seeds: Sequence[int] | None, epochs: int,
    results: Path, runs: Path,
) -> list[str]:  # fmt: skip
    """Do every run that is not finished, seed by seed; return the labels of those that failed."""
    torch.set_num_threads(task.threads)
    start, failed = Start(task, runs), []
    for seed, budget, method in task.runs(methods, budgets, seeds):
        own = label(method, budget, seed, epochs)
        path = results / f"{own}.json"
        folder = runs / f"{own}-{digest(task, method, budget, seed, epochs)}"
        with claimed(runs / f"{own}.lock", wait=False) as free:
            if not free or finished(path, task, method, budget, seed, epochs):
                continue
            try:
                content = run_one(name, start, method, budget, seed, epochs, folder)
            except (ValueError, ImportError) as error:  # a budget out of reach, a missing extra: the others go on
                failed.append(own)
                print(f"{name}/{own}: FAILED: {error}", flush=True)
                continue
            write(path, content)
            shutil.rmtree(folder, ignore_errors=True)
            print(line(content, task.merit), flush=True)
    return failed


def smoke(task: Task) -> Task:
    """Return the task on 512 examples, two epochs, for a look whether everything runs."""
    data = {**task.data, "init_args": {**task.data["init_args"], "limit": 512}}
    dense = None if task.dense is None else {**task.dense, "epochs": 1}
    return replace(task, data=data, epochs=2, dense=dense, seeds=task.seeds[:1], calibration=256, recalibration=512)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation, 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", help=f"one of {', '.join(sorted(path.stem for path in TASKS.glob('*.yaml')))}")
    for name, kind in (("methods", str), ("budgets", float), ("seeds", int)):
        parser.add_argument(f"--{name}", type=lambda text, kind=kind: [kind(part) for part in text.split(",")])
    parser.add_argument("--calibration-only", action="store_true", help=f"train nothing; {', '.join(CALIBRATION_ONLY)}")
    parser.add_argument("--eager", action="store_true", help="train without torch.compile, whatever the task says")
    parser.add_argument("--smoke", action="store_true", help="512 examples, 2 epochs, results into a temporary folder")
    given = parser.parse_args(arguments)
    task = read_task(given.task)
    if given.eager:
        task = replace(task, compiled=False)
    results, runs = RESULTS / given.task, RUNS / given.task
    if given.smoke:
        task, folder = smoke(task), Path(tempfile.mkdtemp(prefix="compare-"))
        results, runs = folder / "results" / given.task, folder / "runs"
        print(f"results go to {results}")
    methods = given.methods or list(task.methods)
    if unknown := sorted(set(methods) - set(task.methods)):
        sys.exit(f"{given.task} has no methods {', '.join(unknown)}; it has {', '.join(task.methods)}")
    if given.calibration_only:
        methods = [method for method in methods if method in CALIBRATION_ONLY]
    epochs = 0 if given.calibration_only else task.epochs
    failed = run_task(given.task, task, methods, given.budgets, given.seeds, epochs, results, runs)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
