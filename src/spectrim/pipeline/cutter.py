"""The cut of `compress`: in the way asked for, or in the one that suits best."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from spectrim.budget.budget import Budget
from spectrim.budget.cut_to import CutNetwork, Workbench
from spectrim.budget.distortion.loss import check_gradients
from spectrim.budget.ladder import Ladder
from spectrim.budget.ways import WAYS
from spectrim.errors import SettingError
from spectrim.metrics.batch import BatchDims
from spectrim.metrics.distance import relative_distance, with_outputs
from spectrim.pipeline.judge import Judge
from spectrim.pipeline.store import Found, Told
from spectrim.pipeline.ways import Cut, allowed_for_mixed
from spectrim.protocols import Importance
from spectrim.surgery.calibrate import calibrate
from spectrim.surgery.moments import Calibration
from spectrim.surgery.states import orthonormalize_
from spectrim.training.parts import Reconstruction
from spectrim.training.reconstruct import reconstruct_


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
    progress: bool = False

    def cut(self, low: nn.Module, cut: Cut, trains: bool) -> Found:
        """Cut the network by the given method, or by the best one; return it, how, and its scores by stage."""
        calibration = self.calibration
        if calibration is None and (cut == "auto" or WAYS[cut].needs != "none"):
            self.step("calibrating")
            calibration = calibrate(low, self.judge.known, self.judge.loss, examples=None, batch_dims=self.batch_dims)
        bench = Workbench(low, self.inputs, calibration, latency=self.prices.latency, prices=self.prices)
        notes: list[str] = []
        if self.calibration is None and calibration is not None and (calibration.outputs or not calibration.slopes):
            bench = self._probed(low, bench, calibration, notes)
        best = self._made(bench, cut) if cut != "auto" else self._best(bench, trains, notes)
        bench.show(best)
        told = Told(best.way, {stage: dict(found) for stage, found in best.dropped.items()}, notes)
        scores = {stage: dict(found) for stage, found in best.scores.items()}
        if self.reconstruction is not None:
            self._reconstruct(low, self.reconstruction, told, scores)
        orthonormalize_(low)
        return low, told, scores

    def _probed(self, low: nn.Module, bench: Workbench, calibration: Calibration, notes: list[str]) -> Workbench:
        """Where the loss has no slope to speak of, as on targets that are the network's outputs, measure curvature by random directions."""
        try:
            check_gradients(bench.decomposed)
            return bench
        except SettingError:
            distance = relative_distance(with_outputs(self.judge.model, self.judge.known))
            probed = calibrate(low, self.judge.known, distance, examples=None, batch_dims=self.batch_dims)
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

    def _best(self, bench: Workbench, trains: bool, notes: list[str]) -> CutNetwork:
        made = [self._made(bench, kind) for kind in ("plain", "whitened")]
        kinds = ("sensitive",) if trains else ("sensitive", "both")
        try:
            made.extend(self._made(bench, kind) for kind in kinds)
        except SettingError as error:
            notes.append(f"not tried: {', '.join(kinds)} ({error})")
        if not trains:
            return min(made, key=_rank)
        best = min(made, key=lambda one: one.last["loss"])
        if self.importance is None:
            mixed = self._made(bench, "mixed")
            bench.show(best)
            if mixed.last["loss"] <= allowed_for_mixed(
                best, self.judge.dense["loss"], self.judge.far(best.way, bench.network, best.scores)
            ):
                return mixed
        return best

    def _made(self, bench: Workbench, kind: str) -> CutNetwork:
        way = WAYS[kind]
        self.step(f"cutting: {kind}")
        if way.needs == "loss":
            bench.distortions(way)  # refuses a loss without gradients, also with other ranks
        return bench.cut_to(self.budget, way, self.judge, dense=self.judge.model, examples=self.judge.known, importance=self.importance)


def _rank(made: CutNetwork) -> tuple[float, float]:
    """Return what is smaller for a better network that is not trained any more: by accuracy where there is one, then by loss."""
    return -made.last.get("accuracy", 0.0), made.last["loss"]
