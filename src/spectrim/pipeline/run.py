"""A run: stages in order, of which finished ones are skipped."""

import copy
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from spectrim.budget.allocate import allocate
from spectrim.budget.budget import Budget
from spectrim.budget.costs import spectra
from spectrim.budget.cut_to import cut_to, has_norms, renew_statistics
from spectrim.budget.ways import WAYS
from spectrim.errors import FormatError
from spectrim.files import digest_of, make_folder, write_json, write_text
from spectrim.metrics.inputs import first_examples
from spectrim.metrics.measurement import Measurement, measure, measure_together
from spectrim.pipeline.components import make
from spectrim.pipeline.data import replayed
from spectrim.pipeline.environment import environment
from spectrim.pipeline.folders import MANIFEST, RECIPE, finish
from spectrim.pipeline.parsing import plain
from spectrim.pipeline.recipe import Phase
from spectrim.pipeline.search import smallest, unit_of
from spectrim.pipeline.stages import STAGE, Stages, _digest, _read_stage, ranks
from spectrim.pipeline.verdicts import verdict_of_run
from spectrim.surgery.calibrate import calibrate
from spectrim.surgery.correct import correct
from spectrim.surgery.coverage import coverage
from spectrim.surgery.factorize import factorize
from spectrim.surgery.merge import merge
from spectrim.surgery.prune import prune
from spectrim.surgery.readers import leaving_readers, with_reasons
from spectrim.surgery.recalibrate import recalibrate
from spectrim.training.data import count_batches, length_of
from spectrim.training.distillation import Distillation
from spectrim.training.fit import fit


class Run(Stages):
    """One recipe in one folder: stage after stage, each in a separate folder, finished ones skipped.

    The folder of the run holds ``recipe.yaml`` with every default written out, and ``result.json``.
    """

    def run(self) -> dict[str, Any]:
        """Run every stage that is not finished and return the result, which is in ``result.json`` too.

        Raises:
            WriteError: the folder cannot be written, or another process is writing it.
        """
        with self.hold():
            return self._run()

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
        named = replace(recipe, code=None, weights=recipe.weights and Path(recipe.weights).name)  # no folder of this machine
        result |= {"stages": self.numbers, "recipe": plain(named), "environment": environment(), "verdict": verdict}
        lines = with_reasons(coverage(tuned, recipe.factorize.layers()), self.numbers["2-train"].get("left_dense", {}))
        finish(self.out, "run", result, lines)
        return result

    @property
    def text(self) -> str:
        """The complete recipe, as it is written to the folder."""
        return yaml.safe_dump(plain(self.recipe), sort_keys=False)

    def dense(self) -> nn.Module:
        """Return the dense network of the first stage, trained where the recipe says so; the recipe is written to the folder."""
        recipe = self.recipe
        with self.hold():
            (self.out / MANIFEST).unlink(missing_ok=True)  # written again when everything is there
            write_text(self.out / RECIPE, self.text)
            if recipe.threads:
                torch.set_num_threads(recipe.threads)
            common = {name: plain(getattr(recipe, name)) for name in ("model", "data", "loss", "seed", "precision")}
            common |= {} if recipe.weights is None else {"weights": digest_of(Path(recipe.weights))}
            return self._stage("1-dense", [common, plain(recipe.dense)], self._dense)

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
        build = partial(factorize, source, settings.scheme)
        low, _, left = leaving_readers(build(settings.layers()), build, lambda low: self._check_same(source, low, ("dense", "factorized")))
        logs = [self._fit(low, phase, folder / f"phase-{index}", dense) for index, phase in enumerate(self.recipe.train)]
        numbers = {place: [log[key] for log in logs] for place, key in (("phases", "epochs"), ("cuts", "cuts"), ("layers", "layers"))}
        return low, {**numbers, "left_dense": left, "val": self._validate(low), "spectra": {k: v.tolist() for k, v in spectra(low).items()}}

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
