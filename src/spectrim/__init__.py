"""Train and ship low-rank neural networks: the public names and nothing else."""

from importlib.metadata import version

from spectrim.allocate import Budget, allocate
from spectrim.checkpoint import load, save
from spectrim.execution import choose_execution
from spectrim.factorize import factorize, merge
from spectrim.fit import Distillation, fit
from spectrim.latency import LatencyTable, latency_table
from spectrim.layers import named_factors
from spectrim.measure import Measurement, compare_latency, compare_table, evaluate, measure
from spectrim.penalties import L1, Hoyer, HoyerSquare, NuclearNorm, Orthogonality, PolarHoyer
from spectrim.prune import prune, prune_, prune_optimizer_state
from spectrim.ranks import Energy, Fixed, Fraction
from spectrim.schedule import Ramp
from spectrim.surgery import coverage, match

__version__ = version("spectrim")

__all__ = [
    "L1",
    "Budget",
    "Distillation",
    "Energy",
    "Fixed",
    "Fraction",
    "Hoyer",
    "HoyerSquare",
    "LatencyTable",
    "Measurement",
    "NuclearNorm",
    "Orthogonality",
    "PolarHoyer",
    "Ramp",
    "allocate",
    "choose_execution",
    "compare_latency",
    "compare_table",
    "coverage",
    "evaluate",
    "factorize",
    "fit",
    "latency_table",
    "load",
    "match",
    "measure",
    "merge",
    "named_factors",
    "prune",
    "prune_",
    "prune_optimizer_state",
    "save",
]
