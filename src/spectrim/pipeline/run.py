"""A run: stages in order, of which finished ones are skipped."""

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import nn

from spectrim.budget.allocate import allocate
from spectrim.budget.budget import Budget
from spectrim.budget.costs import spectra
from spectrim.budget.cut_to import cut_to, has_norms, renew_statistics
from spectrim.budget.ways import WAYS
from spectrim.errors import FormatError, RecipeError
from spectrim.files import make_folder, read_json, write_json, write_text
from spectrim.forms.form import Size
from spectrim.layers import factor_name, kind_of, named_factors
from spectrim.locks import locked
from spectrim.metrics.evaluate import evaluate
from spectrim.metrics.inputs import first_batch, first_examples, inputs_of, one_example
from spectrim.metrics.measurement import Measurement, measure, measure_together
from spectrim.pipeline.components import _made, make, make_loss, seed_everything
from spectrim.pipeline.data import Data, Source, replayed
from spectrim.pipeline.environment import environment
from spectrim.pipeline.folders import MANIFEST, RECIPE, finish
from spectrim.pipeline.parsing import plain
from spectrim.pipeline.recipe import Phase, Recipe, phases
from spectrim.pipeline.search import smallest, unit_of
from spectrim.pipeline.verdicts import verdict_of_run
from spectrim.storage.save import load, save
from spectrim.surgery.calibrate import calibrate
from spectrim.surgery.correct import correct
from spectrim.surgery.coverage import coverage
from spectrim.surgery.factorize import factorize
from spectrim.surgery.merge import merge
from spectrim.surgery.prune import prune
from spectrim.surgery.recalibrate import recalibrate
from spectrim.surgery.same_function import same_function
from spectrim.surgery.select import decide
from spectrim.training.checkpoint import random_state, restore_random_state
from spectrim.training.data import count_batches, length_of
from spectrim.training.distillation import Distillation
from spectrim.training.fit import fit

STAGE = "stage.json"


def make_model(recipe: Recipe) -> nn.Module:
    """Build the dense network, seeded."""
    seed_everything(recipe.seed)
    model = _made(recipe.model, "model")
    if not isinstance(model, nn.Module):
        raise RecipeError("model", f"{recipe.model['class_path']} gives a {type(model).__name__}", allowed="a torch.nn.Module")
    return model


def make_data(recipe: Recipe) -> Data:
    """Build the data, seeded, and check that it has the three splits."""
    return Source(recipe.data, recipe.seed).data


class Run:
    """One recipe in one folder: stage after stage, each in a separate folder, finished ones skipped.

    A stage's folder holds its model (``model.safetensors``, ``spectrim.json``), its numbers (``stage.json``) and, while it trains, its
    checkpoints. The digest in ``stage.json`` covers the settings of the stage and of everything before it; when it differs, the stage is
    run again. The folder of the run holds ``recipe.yaml`` with every default written out, and ``result.json``.
    """

    def __init__(self, recipe: Recipe, out: str | Path, *, progress: bool = True) -> None:
        """Prepare; nothing is written before `run`.

        Args:
            recipe: from `read_recipe`.
            out: the run's folder; made if missing.
            progress: whether to show progress, on stderr.
        """
        self.recipe, self.out, self.progress = recipe, Path(out), progress
        self.console = Console(stderr=True, quiet=not progress)
        self.source = Source(recipe.data, recipe.seed)
        self.data = self.source.data
        self.loss = make_loss(recipe.loss)
        self.initial = make_model(recipe)
        self.example = one_example(self.data.val, self.initial)
        self._check_layers()
        self.digest = ""
        self.seed, self.readings = recipe.seed, 0
        self.numbers: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        """Run every stage that is not finished and return the result, which is in ``result.json`` too.

        Raises:
            WriteError: the folder cannot be written, or another process is writing it.
        """
        with self.hold():
            return self._run()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other runs out of the folder, which is made if missing.

        Raises:
            WriteError: another process is writing it.
        """
        make_folder(self.out)
        with locked(self.out):
            yield

    def _run(self) -> dict[str, Any]:
        recipe, dense = self.recipe, self.dense()
        after_dense = self.digest
        low = self._stage("2-train", [plain(recipe.factorize), plain(recipe.train)], lambda folder: self._train(dense, folder))
        cut = self._stage("3-prune", [plain(recipe.prune)], lambda folder: self._cut(low))
        tuned = self._stage("4-finetune", [plain(recipe.finetune)], lambda folder: self._finetune(cut, dense, recipe.finetune, folder))
        final = self._stage("5-merge", [], lambda folder: (self._merged(tuned), {}))
        models = {"dense": dense, "final": final}
        after_merge = self.digest
        if recipe.truncated is not None:
            phase = recipe.truncated
            models["truncated"] = self._stage("b1-truncated", [plain(phase)], lambda folder: self._truncated(dense, final, phase, folder))
        if recipe.continued is not None:
            self.digest, more = after_dense, recipe.continued
            models["continued"] = self._stage("b2-continued", [plain(more)], lambda folder: self._continued(dense, more, folder))
        self.digest = _digest([after_merge, [plain(recipe.truncated), plain(recipe.continued)], recipe.latency_threads])
        measured = self._measured(models, tuned)
        result: dict[str, Any] = {name: entry.to_dict() for name, entry in measured.items()}
        verdict = verdict_of_run(measured, final, self.numbers).to_dict()
        result |= {"stages": self.numbers, "recipe": plain(recipe), "environment": environment(), "verdict": verdict}
        finish(self.out, "run", result, coverage(tuned, recipe.factorize.layers()))
        return result

    def dense(self) -> nn.Module:
        """Return the dense network of the first stage, trained where the recipe says so; the recipe is written to the folder."""
        recipe = self.recipe
        with self.hold():
            (self.out / MANIFEST).unlink(missing_ok=True)  # written again when everything is there
            write_text(self.out / RECIPE, yaml.safe_dump(plain(recipe), sort_keys=False))
            if recipe.threads:
                torch.set_num_threads(recipe.threads)
            common = {name: plain(getattr(recipe, name)) for name in ("model", "data", "loss", "seed", "precision")}
            return self._stage("1-dense", [common, plain(recipe.dense)], self._dense)

    def _check_layers(self) -> None:
        """Check what the recipe says about layers before any work."""
        modules = dict(self.initial.named_modules())
        chosen = [name for name, reason in decide(self.initial, self.recipe.factorize.layers()).items() if reason is None]
        weights = [
            factor_name(name, weight) for name in chosen if (kind := kind_of(modules[name])) for weight in kind.weights(modules[name])
        ]
        if not weights:
            raise RecipeError("factorize.where", "selects no layer that can be factorized", allowed="see spectrim coverage RECIPE")
        for key, phase in phases(self.recipe):
            for name in (phase.distill.layers or ()) if phase.distill else ():
                if name not in modules:
                    raise RecipeError(
                        f"{key}.distill.layers", f"'{name}' is no layer of the model", allowed=", ".join(filter(None, modules))
                    )
        for name in self.recipe.prune.ranks or {}:
            if name not in weights:
                raise RecipeError(f"prune.ranks.{name}", "is no weight that will be factorized", allowed=", ".join(weights))

    def _stage(self, name: str, settings: Any, work: Callable[[Path], tuple[nn.Module, dict[str, Any]]]) -> nn.Module:
        """Run one stage, or load what it made when it is finished with the same settings."""
        self.digest = _digest([self.digest, name, settings])
        folder = self.out / name
        state = _read_stage(folder)
        if state.get("digest") == self.digest and state.get("finished"):
            self.numbers[name] = state["numbers"]
            self.console.print(f"{name}: finished before, skipped")
            try:
                return load(folder, self.initial)
            except FormatError as error:
                raise FormatError(
                    folder, f"the stage is finished but cannot be read ({error})", hint="delete the folder to run it again"
                ) from error
        if state.get("digest") != self.digest:
            if folder.exists():
                self.console.print(f"{name}: settings changed, run again")
                (folder / STAGE).unlink(missing_ok=True)  # first, so that a partly deleted folder never looks finished
                shutil.rmtree(folder)
            make_folder(folder)
            write_json(folder / STAGE, {"digest": self.digest, "finished": False})
        self.console.rule(name, align="left")
        self.begin(name)
        start = time.perf_counter()
        model, numbers = work(folder)
        numbers = {**numbers, "seconds": round(time.perf_counter() - start, 1)}
        save(model, folder)
        write_json(folder / STAGE, {"digest": self.digest, "finished": True, "numbers": numbers})
        self.numbers[name] = numbers
        for key, title in (("val_cut", "right after the cut"), ("val_recalibrated", "BatchNorm recalibrated"), ("val", "at the end")):
            if key in numbers:
                values = ", ".join(f"{metric} {value:.4g}" for metric, value in numbers[key].items())
                self.console.print(f"validation split, {title}: {values}", highlight=False)
        return model

    def begin(self, name: str) -> None:
        """Seed every generator for a stage and start with fresh data, so that it is the same whether or not stages before it are skipped.

        Args:
            name: of the stage.
        """
        self.seed, self.readings = self.recipe.seed + int(_digest(name)[:6], 16), 0
        self.data = self.source.fresh(self.seed)
        seed_everything(self.seed)

    def fresh(self) -> Data:
        """Return the data as they are before their first pass; loaders' own generators get a seed that belongs to this reading."""
        self.data = self.source.fresh(self.seed + self.readings)
        self.readings += 1
        return self.data

    def _fit(self, model: nn.Module, phase: Phase, folder: Path, teacher: nn.Module | None) -> dict[str, list[dict[str, Any]]]:
        """Run one phase and return its history as plain data."""
        data = self.fresh()
        lessons = [Distillation(copy.deepcopy(teacher), **asdict(phase.distill))] if phase.distill and teacher is not None else []
        train = replayed(data.train, data.val, self.console.print)
        tuning = phase.tuning(self.recipe)
        if phase.scheduler is not None and phase.scheduler_steps == "batch" and length_of(data.train, "run") is None:
            tuning = replace(tuning, steps_per_epoch=count_batches(data.train, "run"))
        history = fit(
            model, train, self.loss, epochs=phase.epochs, tuning=tuning,
            penalties=[make(penalty, "penalties") for penalty in phase.penalties], eval_data=data.val,
            courses=[make(course, "courses") for course in phase.courses], lessons=lessons, checkpoint=folder, progress=self.progress,
        )  # fmt: skip
        return history.to_dict()

    def _dense(self, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
        model = copy.deepcopy(self.initial)
        log = self._fit(model, self.recipe.dense, folder / "phase-0", None)
        return model, {**log, "val": self._validate(model)}

    def _train(self, dense: nn.Module, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
        settings = self.recipe.factorize
        source = dense if settings.start == "dense" else self.initial
        low = factorize(source, settings.scheme, self.recipe.factorize.layers())
        self._check_same(source, low, ("dense", "factorized"))
        logs = [self._fit(low, phase, folder / f"phase-{index}", dense) for index, phase in enumerate(self.recipe.train)]
        numbers = {place: [log[key] for log in logs] for place, key in (("phases", "epochs"), ("cuts", "cuts"), ("layers", "layers"))}
        return low, {**numbers, "val": self._validate(low), "spectra": {k: v.tolist() for k, v in spectra(low).items()}}

    def _cut(self, low: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        settings = self.recipe.prune
        target: Any = settings.ranks if settings.budget is None else settings.budget
        if settings.rule is not None:
            target = make(settings.rule, "prune.rule")
        if settings.budget is None or not settings.budget.drops:
            return self._cut_to(low, target)
        before, unit = self._validate(low), unit_of(settings.budget)
        made, tried = smallest(
            settings.budget, unit, partial(self._cut_to, low), lambda made: (before, made[1].get("val") or made[1]["val_cut"])
        )
        return made[0], made[1] | {"tried": tried}

    def _cut_to(self, low: nn.Module, target: Any) -> tuple[nn.Module, dict[str, Any]]:
        settings = self.recipe.prune
        way = WAYS[settings.cut]
        known = first_examples(self.fresh().train, settings.examples) if settings.correct or way.needs != "none" else []
        moments = calibrate(low, known, self.loss, examples=None) if way.needs != "none" else None
        cut, told = cut_to(low, target, way, self.example, self._validate, calibration=moments)
        numbers: dict[str, Any] = {"ranks": dict(told.ranks), "val_cut": dict(told.last)}
        if settings.correct:
            cut = correct(cut, low, known, examples=None)
            numbers["val_cut"] = self._validate(cut)
        if settings.recalibrate and has_norms(cut):
            found, kept = renew_statistics(cut, self.fresh().train, self._validate, numbers["val_cut"])
            numbers |= {"val": dict(found)} if kept else {"val": numbers["val_cut"], "val_not_kept": dict(found)}
        elif settings.recalibrate:
            numbers["val"] = numbers["val_cut"]
        return cut, numbers

    def _finetune(self, cut: nn.Module, dense: nn.Module, phase: Phase, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
        tuned = copy.deepcopy(cut)
        log = self._fit(tuned, phase, folder / "phase-0", dense)
        return tuned, {**log, "val": self._validate(tuned)}

    def _merged(self, tuned: nn.Module) -> nn.Module:
        final = merge(tuned)
        self._check_same(tuned, final, ("cut", "merged"))
        return final

    def _check_same(self, a: nn.Module, b: nn.Module, names: tuple[str, str]) -> None:
        """Raise a LayerError unless two networks compute the same on a batch of the training split; no generator is behind afterwards."""
        state = random_state()
        try:
            batch = first_batch(self.fresh().train, "run")
            same_function(a, b, inputs_of(batch), names=names)
        finally:
            restore_random_state(state)

    def _truncated(self, dense: nn.Module, final: nn.Module, phase: Phase, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
        """Cut the dense network at once to the MACs of the final one, by the same knapsack, then train."""
        kept = measure(final, self.example, latency=False).macs / measure(dense, self.example, latency=False).macs  # type: ignore[operator]
        low = factorize(dense, self.recipe.factorize.scheme, self.recipe.factorize.layers())
        cut = prune(low, allocate(low, Budget(macs=min(1.0, kept)), self.example))
        numbers: dict[str, Any] = {"ranks": ranks(cut), "val_cut": self._validate(cut)}
        if self.recipe.prune.recalibrate:
            recalibrate(cut, self.fresh().train)
            numbers["val_recalibrated"] = self._validate(cut)
        tuned, more = self._finetune(cut, dense, phase, folder)
        return self._merged(tuned), numbers | more

    def _continued(self, dense: nn.Module, phase: Phase, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
        return self._finetune(dense, dense, phase, folder)

    def _measured(self, models: dict[str, nn.Module], tuned: nn.Module) -> dict[str, Measurement]:
        """Measure every model side by side; the one place where the test split is read. Skipped when nothing changed."""
        folder = self.out / "measure"
        state = _read_stage(folder)
        if state.get("digest") == self.digest and state.get("finished"):
            with suppress(FormatError, TypeError, KeyError, AttributeError):  # damaged: measured once more
                return {name: Measurement.from_dict(entry) for name, entry in state["numbers"].items()}
        self.console.rule("measure", align="left")
        self.begin("measure")
        measured = measure_together(models, self.example, self.data.test, self.loss, self.recipe.latency_threads)
        measured["final"] = replace(measured["final"], ranks=ranks(tuned))
        make_folder(folder)
        numbers = {name: entry.to_dict() for name, entry in measured.items()}
        write_json(folder / STAGE, {"digest": self.digest, "finished": True, "numbers": numbers})
        return measured

    def _validate(self, model: nn.Module) -> dict[str, float]:
        return evaluate(model, self.fresh().val, self.loss)


def ranks(model: nn.Module) -> dict[str, Size]:
    """Return the rank of each factorized weight."""
    return {name: factors.size for name, factors in named_factors(model)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_stage(folder: Path) -> dict[str, Any]:
    """Return a stage's file, or nothing when it is missing or damaged."""
    try:
        state = read_json(folder / STAGE)
    except FormatError:
        return {}
    return state if isinstance(state.get("numbers", {}), dict) and ("numbers" in state or not state.get("finished")) else {}
