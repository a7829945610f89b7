"""Distortion of a truncated weight, measured in five ways.

`METHODS` is the table that contract tests and docs read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from spectrim.budget.distortion.compare import compare_importances
from spectrim.budget.distortion.energy import SpectralEnergy, WhitenedEnergy
from spectrim.budget.distortion.loss import LossSensitivity
from spectrim.budget.distortion.measured import MeasuredLoss
from spectrim.budget.distortion.normalized import NormalizedEnergy
from spectrim.protocols import Importance
from spectrim.surgery.moments import Calibration
from spectrim.tables import Row


@dataclass(frozen=True)
class Evidence:
    """Data that the methods of this table are made from.

    Args:
        batches: pairs of inputs and targets.
        loss: of outputs and targets, a scalar.
        calibration: moments of the network on the batches, with gradients of the loss.
    """

    batches: Sequence[Any]
    loss: nn.Module | Callable[[Any, Any], Tensor]
    calibration: Calibration


LAWS = {
    "data-free": "depends on the weights alone",
    "plain-cut": "equals the squared error of the truncated weight, relative to the squared norm of the weight",
}
"""The laws that some methods obey, beyond those of every distortion."""

METHODS: tuple[Row[Callable[[Evidence], Importance]], ...] = (
    Row(SpectralEnergy, lambda given: SpectralEnergy(), card="calibrated-cuts", laws={"data-free", "plain-cut"}),
    Row(NormalizedEnergy, lambda given: NormalizedEnergy(given.batches[0][0]), card="calibrated-cuts"),
    Row(WhitenedEnergy, lambda given: WhitenedEnergy(given.calibration), card="calibrated-cuts"),
    Row(LossSensitivity, lambda given: LossSensitivity(given.calibration), card="calibrated-cuts"),
    Row(
        LossSensitivity, lambda given: LossSensitivity(given.calibration, order=1), card="calibrated-cuts", label="LossSensitivity, order=1"
    ),
    Row(MeasuredLoss, lambda given: MeasuredLoss(given.batches, given.loss, points=1), card="calibrated-cuts"),
)

__all__ = [
    "LAWS",
    "METHODS",
    "Evidence",
    "LossSensitivity",
    "MeasuredLoss",
    "NormalizedEnergy",
    "SpectralEnergy",
    "WhitenedEnergy",
    "compare_importances",
]
