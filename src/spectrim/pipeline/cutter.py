"""The cut of `compress`: in the way asked for, or in the one that suits best."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from spectrim.budget.budget import Budget
from spectrim.budget.cut_to import CutNetwork, Workbench
from spectrim.budget.ladder import Ladder
from spectrim.budget.ways import WAYS
from spectrim.errors import SettingError
from spectrim.metrics.batch import BatchDims
from spectrim.pipeline.judge import Judge
from spectrim.pipeline.store import Found, Told
from spectrim.pipeline.ways import Cut, allowed_for_mixed
from spectrim.protocols import Importance
from spectrim.surgery.calibrate import calibrate
from spectrim.surgery.moments import Calibration
from spectrim.surgery.states import orthonormalize_


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

    def cut(self, low: nn.Module, cut: Cut, trains: bool) -> Found:
        """Cut the network by the given method, or by the best one; return it, how, and its scores by stage."""
        calibration = self.calibration
        if calibration is None and (cut == "auto" or WAYS[cut].needs != "none"):
            self.step("calibrating")
            calibration = calibrate(low, self.judge.known, self.judge.loss, examples=None, batch_dims=self.batch_dims)
        bench = Workbench(low, self.inputs, calibration, latency=self.prices.latency, prices=self.prices)
        notes: list[str] = []
        best = self._made(bench, cut) if cut != "auto" else self._best(bench, trains, notes)
        bench.show(best)
        orthonormalize_(low)
        told = Told(best.way, {stage: dict(found) for stage, found in best.dropped.items()}, notes)
        return low, told, {stage: dict(found) for stage, found in best.scores.items()}

    def _best(self, bench: Workbench, trains: bool, notes: list[str]) -> CutNetwork:
        made = [self._made(bench, kind) for kind in ("plain", "whitened")]
        try:
            made.append(self._made(bench, "sensitive"))
        except SettingError as error:
            notes.append(f"not tried: sensitive ({error})")
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
