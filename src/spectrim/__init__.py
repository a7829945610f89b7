"""Train and ship low-rank neural networks: the public names and nothing else."""

from importlib.metadata import version

from spectrim.allocate import Budget, allocate
from spectrim.balance import balance_
from spectrim.calibration import calibrate
from spectrim.checkpoint import load, save
from spectrim.compress import compress
from spectrim.correction import correct, recalibrate
from spectrim.distillation import Distillation
from spectrim.execution import choose_execution
from spectrim.export import export
from spectrim.factorize import factorize, merge
from spectrim.fit import fit
from spectrim.importance import (
    LossSensitivity,
    MeasuredLoss,
    NormalizedEnergy,
    SpectralEnergy,
    WhitenedEnergy,
    compare_importances,
)
from spectrim.latency import LatencyTable, latency_table
from spectrim.layers import named_factors
from spectrim.measure import Measurement, compare_latency, compare_table, evaluate, measure
from spectrim.penalties import L1, FrobeniusDecay, Hoyer, HoyerSquare, NuclearNorm, Orthogonality, PolarHoyer
from spectrim.plan import Plan, plan
from spectrim.prune import prune, prune_, prune_optimizer_state
from spectrim.quantize import Int8, quantize
from spectrim.ranks import Energy, Fixed, Fraction
from spectrim.report import write_report
from spectrim.schedule import Ramp, Squeeze
from spectrim.sharded import gathered
from spectrim.surgery import coverage, match
from spectrim.tracking import Tracking

__version__ = version("spectrim")

__all__ = [
    "L1",
    "Budget",
    "Distillation",
    "Energy",
    "Fixed",
    "Fraction",
    "FrobeniusDecay",
    "Hoyer",
    "HoyerSquare",
    "Int8",
    "LatencyTable",
    "LossSensitivity",
    "MeasuredLoss",
    "Measurement",
    "NormalizedEnergy",
    "NuclearNorm",
    "Orthogonality",
    "Plan",
    "PolarHoyer",
    "Ramp",
    "SpectralEnergy",
    "Squeeze",
    "Tracking",
    "WhitenedEnergy",
    "allocate",
    "balance_",
    "calibrate",
    "choose_execution",
    "compare_importances",
    "compare_latency",
    "compare_table",
    "compress",
    "correct",
    "coverage",
    "evaluate",
    "export",
    "factorize",
    "fit",
    "gathered",
    "latency_table",
    "load",
    "match",
    "measure",
    "merge",
    "named_factors",
    "plan",
    "prune",
    "prune_",
    "prune_optimizer_state",
    "quantize",
    "recalibrate",
    "save",
    "write_report",
]
