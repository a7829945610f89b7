"""The schema of a recipe, and reading it."""

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import index
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from spectrim.budget.budget import Budget
from spectrim.errors import RecipeError
from spectrim.pipeline.components import STEPS, Component, _filled, _guard, _scheduler, make, make_loss
from spectrim.pipeline.parsing import apply_change, parsed
from spectrim.pipeline.reading import read_yaml
from spectrim.protocols import LayerFilter
from spectrim.surgery.factorize import Scheme
from spectrim.surgery.select import match
from spectrim.training.distillation import Distillation
from spectrim.training.fit import Precision


@dataclass
class Teacher:
    """Distillation from the dense network of the first stage.

    Args:
        temperature: > 0.
        weight: the teacher's share of the loss, in [0, 1].
        dim: the axis of the classes.
        mix: >= 0; above 0 batches are mixed with themselves.
        features: >= 0; above 0 layer outputs are distilled, too.
        until: in [0, 1]; the share of the steps in which it is.
        layers: their names; the factorized ones when omitted.
    """

    temperature: float = 4.0
    weight: float = 0.7
    dim: int = -1
    mix: float = 0.0
    features: float = 0.0
    until: float = 1.0
    layers: tuple[str, ...] | None = None


@dataclass
class Phase:
    """One training schedule.

    Args:
        epochs: passes over the training split; 0 for none.
        optimizer: gets the parameters as its first argument.
        scheduler: gets the optimizer as its first argument; ``total_steps`` and ``T_max`` are filled in when they are left out.
        scheduler_steps: whether the schedule advances each epoch or each batch.
        penalties: values that are called on the model.
        distill: learn from the dense network too.
        rank_schedule: cuts ranks in the course of this phase, for example `Ramp`; for the phases of a factorized network only.
        accumulate: batches for one optimizer step.
        clip: largest norm of the gradient.
    """

    epochs: int = 0
    optimizer: Component = field(default_factory=lambda: {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.001}})
    scheduler: Component | None = None
    scheduler_steps: Literal["epoch", "batch"] = "epoch"
    penalties: list[Component] = field(default_factory=list)
    distill: Teacher | None = None
    rank_schedule: Component | None = None
    accumulate: int = 1
    clip: float | None = None


@dataclass
class Factorization:
    """How dense layers become factorized ones.

    Args:
        scheme: how 2-D kernels are folded.
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
        ranks: ``{layer: rank}``.
        cut: ``plain`` keeps the largest singular values of each weight, ``whitened`` what changes its output least on training examples,
            ``sensitive`` what changes the loss least, ``mixed`` as whitened with ranks by both energies.
        correct: refit each layer to its output before the cut by least squares on training examples.
        examples: how many there are, >= 1.
        recalibrate: renew the statistics of BatchNorm on the training split after the cut.
    """

    rule: Component | None = None
    budget: Budget | None = None
    ranks: dict[str, int] | None = None
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
        dense: stage 1.
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
    precision: Precision = "no"
    compiled: bool = False
    threads: int = 0
    latency_threads: int = 1
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
        path: a YAML file. Its folder and the working directory may hold the user's own modules.
        changes: ``key=value`` with dotted keys, values in YAML: ``train.0.epochs=3``.
        cut: whether the recipe has to say how ranks are chosen; a model, data and a loss are enough otherwise.

    Returns:
        The recipe with every default filled in, those of the named classes and functions included.

    Raises:
        RecipeError: the key, the value given, and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(str(path), "no such file", allowed="a YAML recipe, such as recipes/digits.yaml")
    for folder in (str(path.resolve().parent), os.getcwd()):
        if folder not in sys.path:
            sys.path.append(folder)
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise RecipeError(str(path), f"is a {type(raw).__name__}", allowed="a mapping of keys")
    for change in changes:
        apply_change(raw, change)
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
    for name in ("latency", "latency_s"):
        if recipe.prune.budget is not None and name in recipe.prune.budget.limits:
            problem = "needs a latency table, which a recipe does not make"
            raise RecipeError(
                f"prune.budget.{name}", problem, allowed="macs, params, size, size_bytes; or latency_table and allocate in Python"
            )
    least_values = (
        ("threads", recipe.threads, 0),
        ("latency_threads", recipe.latency_threads, 1),
        ("prune.examples", recipe.prune.examples, 1),
    )
    for key, value, least in least_values:
        if value < least:
            raise RecipeError(key, f"got {value}", allowed=f">= {least}")
    for name, rank in (recipe.prune.ranks or {}).items():
        if rank < 1:
            raise RecipeError(f"prune.ranks.{name}", f"got {rank}", allowed=">= 1")
    for key, phase in phases(recipe):
        if phase.epochs < 0:
            raise RecipeError(f"{key}.epochs", f"got {phase.epochs}", allowed=">= 0")
        if phase.accumulate < 1:
            raise RecipeError(f"{key}.accumulate", f"got {phase.accumulate}", allowed=">= 1")
        if phase.clip is not None and not phase.clip > 0:
            raise RecipeError(f"{key}.clip", f"got {phase.clip}", allowed="> 0, or null for no clipping")
        if phase.distill is not None:
            _guard(f"{key}.distill", partial(Distillation, nn.Identity(), **asdict(phase.distill)))


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
        if phase.rank_schedule is not None:
            if not key.startswith(("train", "finetune")):
                raise RecipeError(f"{key}.rank_schedule", "given where nothing is left to cut", allowed="train and finetune phases")
            phase.rank_schedule = _filled(phase.rank_schedule, f"{key}.rank_schedule")
            schedule = _guard(f"{key}.rank_schedule", partial(make, phase.rank_schedule, f"{key}.rank_schedule"))
            if not callable(schedule):
                problem = f"{phase.rank_schedule['class_path']} gives a {type(schedule).__name__}"
                raise RecipeError(f"{key}.rank_schedule", problem, allowed="a schedule: (model, inputs, step, steps) -> ranks or None")
    return recipe
