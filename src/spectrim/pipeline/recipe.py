"""The schema of a recipe, and reading it."""

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import index
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from spectrim.budget.budget import Budget
from spectrim.errors import RecipeError, SettingError, UsageError
from spectrim.pipeline.components import STEPS, Component, _filled, _guard, _scheduler, make, make_loss
from spectrim.pipeline.parsing import apply_change, parsed
from spectrim.pipeline.reading import read_yaml, shown
from spectrim.protocols import LayerFilter
from spectrim.surgery.factorize import Scheme
from spectrim.surgery.select import match
from spectrim.training.course import as_course
from spectrim.training.distillation import DistillationSettings
from spectrim.training.prepared import Precision
from spectrim.training.tuning import Tuning

SEEDS = 2**62
"""Above the magnitude of a seed: generators take 64 bits, and each stage adds a number."""


@dataclass
class Phase:
    """One training schedule.

    Args:
        epochs: passes over the training split; 0 for none.
        optimizer: gets the parameters as its first argument.
        scheduler: gets the optimizer as its first argument; ``total_steps`` and ``T_max`` are filled in when they are left out.
        scheduler_steps: whether the schedule advances each epoch or each batch.
        penalties: values that are called on the model.
        distill: distillation from the dense network of the first stage.
        courses: change training step by step, for example `Ramp`, which cuts ranks; for the phases of a factorized network only.
        accumulate: batches for one optimizer step.
        clip: largest norm of the gradient.
    """

    epochs: int = 0
    optimizer: Component = field(default_factory=lambda: {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.001}})
    scheduler: Component | None = None
    scheduler_steps: Literal["epoch", "batch"] = Tuning.scheduler_steps
    penalties: list[Component] = field(default_factory=list)
    distill: DistillationSettings | None = None
    courses: list[Component] = field(default_factory=list)
    accumulate: int = Tuning.accumulate
    clip: float | None = Tuning.clip

    def tuning(self, recipe: "Recipe") -> Tuning:
        """Return how this phase trains, with what its recipe sets for all phases.

        Args:
            recipe: of the phase.
        """
        schedule = None if self.scheduler is None else partial(_scheduler, self.scheduler)
        return Tuning(
            optimizer=lambda parameters: make(self.optimizer, "optimizer", list(parameters)),
            scheduler=schedule,
            scheduler_steps=self.scheduler_steps,
            accumulate=self.accumulate,
            clip=self.clip,
            precision=recipe.precision,
            compiled=recipe.compiled,
        )


@dataclass
class Factorization:
    """How dense layers become factorized ones.

    Args:
        scheme: how kernels are folded, see `factorize`. ``auto`` does not look at the budget of the cut, unlike that of `compress`:
            one trained network serves every budget.
        where: globs over layer names, ``!`` excludes; all but the classifier head when omitted.
        start: from the ``dense`` stage's weights, or from the ``initial`` ones (the paper's random start).
    """

    scheme: Scheme = "auto"
    where: list[str] | None = None
    start: Literal["dense", "initial"] = "dense"

    def layers(self) -> LayerFilter | None:
        """Return the filter over layers; None for the default one."""
        return None if self.where is None else match(*self.where)


@dataclass
class Cut:
    """How ranks are chosen, by exactly one of `rule`, `budget` and `ranks`, and how the weights are cut to them.

    Args:
        rule: a rank rule.
        budget: what the whole network keeps; ranks by the knapsack over the distortion of the cut method. With ``max_drop`` or
            ``max_loss_rise``, the smallest cut that is at most so much worse on the validation split, before fine-tuning.
        ranks: ``{layer: rank}``, or ``{layer: [outputs, inputs]}`` for a Tucker form.
        cut: ``plain`` keeps the largest singular values of each weight, ``whitened`` what changes its output least on training examples,
            ``sensitive`` what changes the loss least, ``mixed`` as whitened with ranks by both energies.
        correct: refit each layer to its output before the cut by least squares on training examples.
        examples: how many there are, >= 1.
        recalibrate: renew the statistics of BatchNorm on the training split after the cut.
    """

    rule: Component | None = None
    budget: Budget | None = None
    ranks: dict[str, int | list[int]] | None = None
    cut: Literal["plain", "whitened", "sensitive", "mixed"] = "plain"
    correct: bool = False
    examples: int = 1024
    recalibrate: bool = False


@dataclass
class Recipe:
    """A whole experiment.

    Args:
        model: returns the dense `nn.Module`.
        data: returns an object with the splits ``train``, ``val`` and ``test``.
        loss: returns ``(output, target) -> scalar``; a plain function of two arguments is taken as it is.
        seed: seeds every generator at the start of each stage.
        precision: ``no``, ``bf16`` or ``fp16``.
        compiled: run training steps through `torch.compile`; numbers differ by rounding.
        threads: CPU threads of training; 0 for torch's default.
        latency_threads: CPU threads of the latency measurement, at batch size 1.
        code: folder with the modules that the recipe names; the recipe's own when omitted. What a run writes to its folder says where.
        weights: file with the trained weights of the dense network, ``.safetensors`` or a state dict in ``.pt``, see
            `spectrim.pipeline.weights.fill_`; a relative path is one beside the recipe.
        dense: stage 1; it trains nothing unless it says how many epochs.
        factorize: how stage 2 begins.
        train: stage 2, phase after phase.
        prune: stage 3.
        finetune: stage 4. Stage 5 merges and measures.
        truncated: baseline: the dense network cut at once to the same MACs, then trained by this phase.
        continued: baseline: the dense network trained on by this phase.
    """

    model: Component
    data: Component
    loss: Component
    seed: int = 0
    precision: Precision = Tuning.precision
    compiled: bool = Tuning.compiled
    threads: int = 0
    latency_threads: int = 1
    code: str | None = None
    weights: str | None = None
    dense: Phase = field(default_factory=Phase)
    factorize: Factorization = field(default_factory=Factorization)
    train: list[Phase] = field(default_factory=list)
    prune: Cut = field(default_factory=Cut)
    finetune: Phase = field(default_factory=Phase)
    truncated: Phase | None = None
    continued: Phase | None = None


def read_recipe(path: str | Path, changes: Iterable[str] = (), *, cut: bool = True) -> Recipe:
    """Read a recipe and check everything that can be checked before any work.

    Args:
        path: a YAML file. Its folder, that of its key ``code`` and the working directory may hold the user's own modules.
        changes: ``key=value`` with dotted keys, values in YAML: ``train.0.epochs=3``.
        cut: whether the recipe has to say how ranks are chosen; a model, data and a loss are enough otherwise.

    Returns:
        The recipe with every default filled in, those of the named classes and functions included.

    Raises:
        RecipeError: the key, the value given, and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(str(path), "no such file", allowed="a YAML recipe, such as recipes/digits.yaml")
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UsageError(str(path), f"is a {type(raw).__name__}", allowed="a mapping of keys")
    for change in changes:
        apply_change(raw, change)
    beside = path.resolve().parent
    code, weights = raw.get("code", "."), raw.get("weights")
    if isinstance(code, str):
        if not Path(code).is_absolute() and not (beside / code).is_dir():
            raise RecipeError("code", f"no folder {beside / code}", allowed="a folder, relative to that of the recipe")
        raw = {**raw, "code": str((beside / code).resolve())}
    if isinstance(weights, str) and (beside / weights).exists():
        raw = {**raw, "weights": str(beside / weights)}
    for folder in (raw["code"], str(beside), os.getcwd()):
        if isinstance(folder, str) and folder not in sys.path:
            sys.path.append(folder)
    return parse_recipe(raw, cut=cut)


def parse_recipe(raw: Mapping[str, Any], *, cut: bool = True) -> Recipe:
    """Check a recipe given as plain data; see `read_recipe`."""
    recipe: Recipe = parsed(Recipe, raw, "")
    _check(recipe, cut)
    return _complete(recipe)


def _check(recipe: Recipe, cut: bool) -> None:
    """Check what the types do not express."""
    given = [name for name in ("rule", "budget", "ranks") if getattr(recipe.prune, name) is not None]
    if len(given) > 1 or (cut and not given):
        raise RecipeError("prune", f"has {' and '.join(given) or 'none'} of rule, budget, ranks", allowed="exactly one")
    missing = dict.fromkeys(("latency", "latency_s"), ("a latency table", "latency_table and allocate in Python"))
    missing |= dict.fromkeys(("tiles", "tile_reads", "tile_count"), ("crossbars", "spectrim compress --tiles 0.3 --crossbars ..."))
    for name, (what, instead) in missing.items():
        if recipe.prune.budget is not None and name in recipe.prune.budget.limits:
            problem = f"needs {what}, which a recipe does not {'make' if name.startswith('latency') else 'name'}"
            raise RecipeError(f"prune.budget.{name}", problem, allowed=f"macs, params, size, size_bytes; or {instead}")
    if recipe.prune.budget is not None and recipe.prune.budget.coded_bytes is not None:
        problem = "is met by rounding, which a recipe does not do"
        raise RecipeError("prune.budget.coded_bytes", problem, allowed="macs, params, size, size_bytes; or spectrim compress --coded-bytes")
    least_values = (
        ("threads", recipe.threads, 0),
        ("latency_threads", recipe.latency_threads, 1),
        ("prune.examples", recipe.prune.examples, 1),
    )
    for key, value, least in least_values:
        if value < least:
            raise RecipeError(key, f"got {value}", allowed=f">= {least}")
    if not abs(recipe.seed) < SEEDS:
        raise RecipeError("seed", f"got {shown(recipe.seed)}", allowed=f"an integer of magnitude below {SEEDS:,}")
    for name, rank in (recipe.prune.ranks or {}).items():
        if min(rank if isinstance(rank, list) else [rank], default=0) < 1:
            raise RecipeError(f"prune.ranks.{name}", f"got {rank}", allowed=">= 1")
    for key, phase in phases(recipe):
        if phase.epochs < 0:
            raise RecipeError(f"{key}.epochs", f"got {phase.epochs}", allowed=">= 0")
        try:
            phase.tuning(recipe)
        except SettingError as error:
            raise RecipeError(f"{key}.{error.field}", f"got {error.got!r}", allowed=error.rule) from error


def phases(recipe: Recipe) -> list[tuple[str, Phase]]:
    """Return every phase of a recipe with its key."""
    listed = [("dense", recipe.dense), *((f"train.{i}", phase) for i, phase in enumerate(recipe.train)), ("finetune", recipe.finetune)]
    baselines = [("truncated", recipe.truncated), ("continued", recipe.continued)]
    return listed + [(key, phase) for key, phase in baselines if phase is not None]


def _complete(recipe: Recipe) -> Recipe:
    """Check every component against the signature it names and write its defaults out; build those that are cheap."""
    for key in ("model", "data", "loss"):
        setattr(recipe, key, _filled(getattr(recipe, key), key))
    _guard("loss", partial(make_loss, recipe.loss))
    if recipe.prune.rule is not None:
        recipe.prune.rule = _filled(recipe.prune.rule, "prune.rule")
        rule = _guard("prune.rule", partial(make, recipe.prune.rule, "prune.rule"))
        try:
            index(rule(torch.tensor([2.0, 1.0])))
        except (TypeError, ValueError) as error:
            problem = f"{recipe.prune.rule['class_path']} chooses no rank ({error})"
            raise RecipeError("prune.rule", problem, allowed="a rank rule: singular values -> integer") from error
    for key, phase in phases(recipe):
        phase.optimizer = _filled({"class_path": Phase().optimizer["class_path"], **phase.optimizer}, f"{key}.optimizer", skip=1)
        optimizer = _guard(f"{key}.optimizer", partial(make, phase.optimizer, f"{key}.optimizer", [nn.Parameter(torch.zeros(2, 2))]))
        if phase.scheduler is not None:
            phase.scheduler = _filled(phase.scheduler, f"{key}.scheduler", skip=1, open_keys=STEPS)
            scheduler = _guard(f"{key}.scheduler", partial(_scheduler, phase.scheduler, optimizer, 100))
            if isinstance(scheduler, ReduceLROnPlateau):
                raise RecipeError(f"{key}.scheduler", "waits for a metric", allowed="a schedule whose step() takes nothing")
        phase.penalties = [_filled(p, f"{key}.penalties.{i}") for i, p in enumerate(phase.penalties)]
        for i, penalty in enumerate(phase.penalties):
            value = _guard(f"{key}.penalties.{i}", partial(make, penalty, f"{key}.penalties.{i}"))
            if not callable(value):
                problem = f"{penalty['class_path']} gives a {type(value).__name__}"
                raise RecipeError(f"{key}.penalties.{i}", problem, allowed="a penalty: model -> scalar tensor")
        if phase.courses and not key.startswith(("train", "finetune")):
            raise RecipeError(f"{key}.courses", "given where nothing is left to cut", allowed="train and finetune phases")
        phase.courses = [_filled(course, f"{key}.courses.{i}") for i, course in enumerate(phase.courses)]
        for i, course in enumerate(phase.courses):
            place = f"{key}.courses.{i}"
            _guard(place, partial(as_course, _guard(place, partial(make, course, place)), "recipe"))
    return recipe
