"""Distortion of a truncated weight, measured in five ways.

`METHODS` is the table that contract tests and docs read.
"""

from spectrim.budget.distortion.energy import SpectralEnergy, WhitenedEnergy
from spectrim.budget.distortion.loss import LossSensitivity
from spectrim.budget.distortion.measured import MeasuredLoss
from spectrim.budget.distortion.normalized import NormalizedEnergy
from spectrim.protocols import Importance

METHODS: dict[str, type[Importance]] = {
    "spectral": SpectralEnergy,
    "normalized": NormalizedEnergy,
    "whitened": WhitenedEnergy,
    "sensitivity": LossSensitivity,
    "measured": MeasuredLoss,
}
"""Every importance by a short name, for the contract tests."""
