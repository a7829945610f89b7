"""Train and ship low-rank neural networks: the public names and nothing else."""

from importlib.metadata import version

from spectrim.budget.allocate import allocate
from spectrim.budget.budget import Budget
from spectrim.budget.distortion.compare import compare_importances
from spectrim.budget.distortion.energy import SpectralEnergy, WhitenedEnergy
from spectrim.budget.distortion.loss import LossSensitivity
from spectrim.budget.distortion.measured import MeasuredLoss
from spectrim.budget.distortion.normalized import NormalizedEnergy
from spectrim.budget.latency_table import latency_table
from spectrim.budget.plan import plan
from spectrim.budget.plan_table import Plan
from spectrim.budget.rules import Energy, Fixed, Fraction
from spectrim.budget.timed import LatencyTable
from spectrim.integrations.tracking import Tracking
from spectrim.layers import named_factors
from spectrim.layers.sharded import gathered
from spectrim.metrics.clock import compare_latency
from spectrim.metrics.evaluate import evaluate
from spectrim.metrics.measurement import Measurement, compare_table, measure
from spectrim.penalties import L1, FrobeniusDecay, Hoyer, HoyerSquare, NuclearNorm, Orthogonality, PolarHoyer
from spectrim.pipeline.compress import compress
from spectrim.report import write_report
from spectrim.runtimes.export import export
from spectrim.runtimes.int8 import Int8, quantize
from spectrim.storage.save import load, save
from spectrim.surgery.balance import balance_
from spectrim.surgery.calibrate import calibrate
from spectrim.surgery.correct import correct
from spectrim.surgery.coverage import coverage
from spectrim.surgery.factorize import factorize
from spectrim.surgery.merge import merge
from spectrim.surgery.optimizer_state import prune_optimizer_state
from spectrim.surgery.prune import prune, prune_
from spectrim.surgery.recalibrate import recalibrate
from spectrim.surgery.same_function import same_function
from spectrim.surgery.select import match
from spectrim.training.distillation import Distillation
from spectrim.training.execution import choose_execution
from spectrim.training.fit import fit
from spectrim.training.ramp import Ramp
from spectrim.training.squeeze import Squeeze
from spectrim.training.tuning import Tuning

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
    "Tuning",
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
    "same_function",
    "save",
    "write_report",
]
