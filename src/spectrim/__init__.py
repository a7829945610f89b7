"""Train and ship low-rank neural networks: the public names, each imported when it is first used."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

    __version__: str

_PLACES = {
    "budget.allocate": "allocate",
    "budget.budget": "Budget",
    "budget.distortion.compare": "compare_importances",
    "budget.distortion.energy": "SpectralEnergy WhitenedEnergy",
    "budget.distortion.loss": "LossSensitivity",
    "budget.distortion.measured": "MeasuredLoss",
    "budget.distortion.normalized": "NormalizedEnergy",
    "budget.latency_table": "latency_table",
    "budget.plan": "plan",
    "budget.plan_table": "Plan",
    "budget.rules": "Energy Fixed Fraction",
    "budget.timed": "LatencyTable",
    "integrations.tracking": "Tracking",
    "layers": "named_factors",
    "layers.sharded": "gathered",
    "metrics.clock": "compare_latency",
    "metrics.evaluate": "evaluate",
    "metrics.measurement": "Measurement compare_table measure",
    "penalties": "L1 FrobeniusDecay Hoyer HoyerSquare NuclearNorm Orthogonality PolarHoyer",
    "pipeline.compress": "compress",
    "report": "write_report",
    "runtimes.export": "export",
    "runtimes.int8": "Int8 quantize",
    "storage.save": "load save",
    "surgery.balance": "balance_",
    "surgery.calibrate": "calibrate",
    "surgery.correct": "correct",
    "surgery.coverage": "coverage",
    "surgery.factorize": "factorize",
    "surgery.merge": "merge",
    "surgery.optimizer_state": "prune_optimizer_state",
    "surgery.prune": "prune prune_",
    "surgery.recalibrate": "recalibrate",
    "surgery.same_function": "same_function",
    "surgery.select": "match",
    "training.distillation": "Distillation",
    "training.execution": "choose_execution",
    "training.fit": "fit",
    "training.ramp": "Ramp",
    "training.squeeze": "Squeeze",
}
"""The public names by module; a test compares them with the imports above."""

_MODULES = {name: module for module, names in _PLACES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a public name, or a folder such as `spectrim.penalties`, when it is first used: ``import spectrim`` does not import torch."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("spectrim")
    elif name in _MODULES:
        value = getattr(import_module(f"spectrim.{_MODULES[name]}"), name)
    elif not name.startswith("_") and find_spec(f"spectrim.{name}") is not None:
        return import_module(f"spectrim.{name}")
    else:
        raise AttributeError(f"module 'spectrim' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
    "same_function",
    "save",
    "write_report",
]
