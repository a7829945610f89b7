"""Train and ship low-rank neural networks: the public names and nothing else.

What is not here lives in its room: ``spectrim.penalties.L1``, ``spectrim.budget.LatencyTable``, ``spectrim.layers.named_factors``.
"""

from importlib.metadata import version

from spectrim.budget.allocate import allocate
from spectrim.budget.budget import Budget
from spectrim.budget.latency_table import latency_table
from spectrim.budget.plan import plan
from spectrim.budget.rules import Energy
from spectrim.metrics.clock import compare_latency
from spectrim.metrics.evaluate import evaluate
from spectrim.metrics.measurement import measure
from spectrim.penalties import Hoyer, Orthogonality
from spectrim.pipeline.compress import compress
from spectrim.report import write_report
from spectrim.runtimes.export import export
from spectrim.runtimes.int8 import quantize
from spectrim.storage.save import load, save
from spectrim.surgery.calibrate import calibrate
from spectrim.surgery.correct import correct
from spectrim.surgery.coverage import coverage
from spectrim.surgery.factorize import factorize
from spectrim.surgery.merge import merge
from spectrim.surgery.prune import prune, prune_
from spectrim.surgery.recalibrate import recalibrate
from spectrim.surgery.same_function import same_function
from spectrim.surgery.select import match
from spectrim.training.distillation import Distillation
from spectrim.training.fit import fit
from spectrim.training.ramp import Ramp
from spectrim.training.squeeze import Squeeze
from spectrim.training.tuning import Tuning

__version__ = version("spectrim")

__all__ = [
    "Budget",
    "Distillation",
    "Energy",
    "Hoyer",
    "Orthogonality",
    "Ramp",
    "Squeeze",
    "Tuning",
    "allocate",
    "calibrate",
    "compare_latency",
    "compress",
    "correct",
    "coverage",
    "evaluate",
    "export",
    "factorize",
    "fit",
    "latency_table",
    "load",
    "match",
    "measure",
    "merge",
    "plan",
    "prune",
    "prune_",
    "quantize",
    "recalibrate",
    "same_function",
    "save",
    "write_report",
]
