"""The cut of `compress`: in the way asked for, or in the one that suits best."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from spectrim.budget.budget import Budget
from spectrim.budget.cut_to import CutNetwork, Workbench
from spectrim.budget.distortion.loss import check_gradients
from spectrim.budget.ladder import Ladder
from spectrim.budget.ways import WAYS
from spectrim.errors import BackwardError, SettingError
from spectrim.layers.reader import FactorizedReader
from spectrim.metrics.batch import BatchDims
from spectrim.metrics.distance import relative_distance, with_outputs
from spectrim.metrics.evaluate import Scores, evaluate
from spectrim.metrics.inputs import first_examples
from spectrim.pipeline.effort import LARGE, work_of_a_cut
from spectrim.pipeline.judge import Judge
from spectrim.pipeline.recovery import Recovery
from spectrim.pipeline.store import Found, Told
from spectrim.pipeline.ways import Cut
from spectrim.protocols import Importance
from spectrim.surgery.calibrate import calibrate
from spectrim.surgery.moments import Calibration
from spectrim.surgery.states import orthonormalize_
from spectrim.training.parts import Reconstruction
from spectrim.training.reconstruct import reconstruct_

AT_ONCE: tuple[Cut, ...] = ("both", "whitened", "plain", "sensitive")
"""What is tried without training, in this order, which ``benchmarks/ways.py`` chose; a large network is cut in the first of them alone."""

TRAINED: tuple[Cut, ...] = ("plain", "whitened", "sensitive", "mixed")
"""What is tried with training to come; the last one has ranks by both energies, and is left out where an importance chooses them."""

FEW = 256
"""Examples up to which a refit is first tried on some of them and judged on the others, where no others are given to judge it."""


@dataclass
class Cutter:
    """Cuts a factorized network to the budget in place, by the best method."""

    judge: Judge
    budget: Budget
    inputs: Any
    importance: Importance | None
    prices: Ladder
    calibration: Calibration | None
    batch_dims: BatchDims | None = None
    step: Callable[[str], None] = lambda title: None
    reconstruction: Reconstruction | None = None
    unlabeled: Sequence[Any] = ()
    seconds: float | None = None
    progress: bool = False
    recovery: Recovery | None = None
    examples: Sequence[Any] = ()
    blind: bool = False

    def cut(self, low: nn.Module, cut: Cut, trains: bool) -> Found:
        """Cut the network by the given method, or by the best one; return it, how, and its scores by stage."""
        calibration, start, self.examples = self.calibration, time.monotonic(), self.judge.known
        notes: list[str] = []
        if calibration is None and (cut == "auto" or WAYS[cut].needs != "none"):
            self.step("calibrating")
            calibration = self._calibrated(low, notes)
        if unseen := [name for name, why in (calibration.skipped if calibration else {}).items() if why == FactorizedReader.unobserved]:
            shown = ", ".join(unseen[:3]) + (f" and {len(unseen) - 3} more" if len(unseen) > 3 else "")
            notes.append(f"cut by their spectra alone, since {FactorizedReader.unobserved}: {shown}")
        bench = Workbench(low, self.inputs, calibration, latency=self.prices.latency, prices=self.prices)
        if self.calibration is None and calibration is not None and not self.blind and (calibration.outputs or not calibration.slopes):
            bench = self._probed(low, bench, calibration, notes)
        best = self._made(bench, cut) if cut != "auto" else self._best(bench, trains, start, notes)
        bench.show(best)
        told = Told(best.way, {stage: dict(found) for stage, found in best.dropped.items()}, notes)
        scores = {stage: dict(found) for stage, found in best.scores.items()}
        if self.reconstruction is not None:
            self._reconstruct(low, self.reconstruction, told, scores)
        orthonormalize_(low)
        return low, told, scores

    def _calibrated(self, low: nn.Module, notes: list[str]) -> Calibration:
        """Return the moments, of as many examples as the time allows."""
        given, dims = None if self.seconds is None else self.seconds / 4, self.batch_dims
        try:
            found = calibrate(low, self.judge.known, self.judge.loss, examples=None, seconds=given, batch_dims=dims)
        except BackwardError as error:
            notes.append(f"the loss has no known curvature, only inputs count: {error}")
            found = calibrate(low, self.judge.known, None, examples=None, seconds=given, batch_dims=dims)
            self.blind = True
        self.examples = first_examples(self.judge.known, found.examples, dims=dims)
        if len(self.examples) < len(self.judge.known):
            notes.append(f"calibrated on {found.examples} examples: calibration_seconds={self.seconds:g} allows no more")
        return found

    def _probed(self, low: nn.Module, bench: Workbench, calibration: Calibration, notes: list[str]) -> Workbench:
        """Where the loss has no slope to speak of, as on targets that are the network's outputs, measure curvature by random directions."""
        try:
            check_gradients(bench.decomposed)
            return bench
        except SettingError:
            distance = relative_distance(with_outputs(self.judge.model, self.examples))
            probed = calibrate(low, self.examples, distance, examples=None, batch_dims=self.batch_dims)
            notes.append("the gradient of the loss vanishes: its curvature is that of the distance of the outputs, in random directions")
            return Workbench(low, self.inputs, probed, latency=self.prices.latency, prices=self.prices)

    def _reconstruct(self, low: nn.Module, settings: Reconstruction, told: Told, scores: dict[str, dict[str, float]]) -> None:
        """Reconstruct the blocks in place; put everything back where the loss is not lower."""
        self.step("reconstructing blocks")
        before = copy.deepcopy(low.state_dict())
        parts = reconstruct_(low, self.judge.model, self.unlabeled or self.judge.known, settings, progress=self.progress)
        found = self.judge(low)
        kept = any(part.kept for part in parts) and found["loss"] < list(scores.values())[-1]["loss"]
        (scores if kept else told.dropped)["reconstructed"] = found
        if not kept:
            low.load_state_dict(before)
        shown = ", ".join(
            f"{part.name or 'network'} {part.before:.3g} -> {part.after:.3g}{'' if part.kept else ' (not kept)'}" for part in parts
        )
        told.notes.append(f"reconstructed, error on held-out examples: {shown}")

    def _best(self, bench: Workbench, trains: bool, start: float, notes: list[str]) -> CutNetwork:
        kinds = AT_ONCE if not trains else TRAINED if self.importance is None else TRAINED[:-1]
        made = self._tried(bench, kinds, trains, start, notes)
        if not trains:
            return min(made, key=_rank)
        return min(made, key=lambda one: one.last["loss"]) if self.recovery is None else self._recovered(bench, made, self.recovery, notes)

    def _recovered(self, bench: Workbench, made: Sequence[CutNetwork], recovery: Recovery, notes: list[str]) -> CutNetwork:
        """Return the cut whose network has the lowest loss after a short recovery; none of them is trained by it."""
        found: dict[str, float] = {}
        for one in made:
            self.step(f"recovering: {one.way}")
            bench.show(one)
            found[one.way] = self.judge(recovery(bench.network, self.judge.far(one.way, bench.network, one.scores)))["loss"]
        shown = ", ".join(f"{one.way} {one.last['loss']:.4g} -> {found[one.way]:.4g}" for one in made)
        notes.append(f"compared by the loss after {recovery.steps} steps of recovery: {shown}")
        return min(made, key=lambda one: found[one.way])

    def _tried(self, bench: Workbench, kinds: Sequence[Cut], trains: bool, start: float, notes: list[str]) -> list[CutNetwork]:
        """Make cuts in this order, as many as there are work and time for; return them, equal ones by their order in `WAYS`."""
        made: list[CutNetwork] = []
        large = not trains and self.seconds is None and work_of_a_cut(bench.network) > LARGE
        for place, kind in enumerate(kinds):
            if made and (large or not self._has_time(start, len(made))):
                why = "the network is large; cut= takes one of them" if large else f"calibration_seconds={self.seconds:g} are spent"
                notes.append(f"not tried: {', '.join(kinds[place:])} ({why})")
                break
            try:
                made.append(self._made(bench, kind))
            except SettingError as error:
                if WAYS[kind].needs != "loss":
                    raise
                notes.append(f"not tried: {kind} ({error})")
        return sorted(made, key=lambda one: list(WAYS).index(one.way))

    def _has_time(self, start: float, count: int) -> bool:
        """Return whether there is time for another cut, after so many since `start`."""
        spent = time.monotonic() - start
        return self.seconds is None or spent * (count + 1) / count <= self.seconds

    def _made(self, bench: Workbench, kind: str) -> CutNetwork:
        way = WAYS[kind]
        self.step(f"cutting: {kind}")
        if way.needs == "loss":
            bench.distortions(way)  # refuses a loss without gradients, also with other ranks
        dense, held = self.judge.source, self._held_out()
        return bench.cut_to(self.budget, way, self.judge, dense=dense, examples=self.examples, importance=self.importance, held=held)

    def _held_out(self) -> tuple[Sequence[Any], Callable[[nn.Module], Scores]] | None:
        """Return what to try a refit on, and the score on the rest, where the few examples that it is made of judge it as well."""
        batches = list(self.examples)
        few = len(batches) > 1 and len(first_examples(batches, FEW, dims=self.batch_dims)) == len(batches)
        if self.judge.judged is not self.judge.known or not few:
            return None
        held = set(range(3, len(batches), 4)) or {len(batches) - 1}
        rest, tried = ([batch for place, batch in enumerate(batches) if (place in held) == left] for left in (True, False))
        return tried, lambda net: evaluate(net, rest, self.judge.loss)


def _rank(made: CutNetwork) -> tuple[float, float]:
    """Return what is smaller for a better network that is not trained any more: by accuracy where there is one, then by loss."""
    return -made.last.get("accuracy", 0.0), made.last["loss"]
