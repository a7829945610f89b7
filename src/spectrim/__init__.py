"""Train and ship low-rank neural networks: the public names, each imported when it is first used.

What is not here lives in its room: ``spectrim.penalties.L1``, ``spectrim.budget.LatencyTable``, ``spectrim.layers.named_factors``.
"""

from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectrim.budget.allocate import allocate
    from spectrim.budget.budget import Budget
    from spectrim.budget.latency_table import latency_table
    from spectrim.budget.plan import plan
    from spectrim.budget.rules import Energy, Fixed
    from spectrim.metrics.clock import compare_latency
    from spectrim.metrics.evaluate import evaluate
    from spectrim.metrics.measurement import measure
    from spectrim.penalties import Hoyer, Orthogonality
    from spectrim.pipeline.compress import compress
    from spectrim.pipeline.elastic import load
    from spectrim.report import write_report
    from spectrim.runtimes.export import export
    from spectrim.runtimes.int8 import quantize
    from spectrim.storage.save import save
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

    __version__: str

_PLACES = {
    "budget.allocate": "allocate",
    "budget.budget": "Budget",
    "budget.latency_table": "latency_table",
    "budget.plan": "plan",
    "budget.rules": "Energy Fixed",
    "metrics.clock": "compare_latency",
    "metrics.evaluate": "evaluate",
    "metrics.measurement": "measure",
    "penalties": "Hoyer Orthogonality",
    "pipeline.compress": "compress",
    "pipeline.elastic": "load",
    "report": "write_report",
    "runtimes.export": "export",
    "runtimes.int8": "quantize",
    "storage.save": "save",
    "surgery.calibrate": "calibrate",
    "surgery.correct": "correct",
    "surgery.coverage": "coverage",
    "surgery.factorize": "factorize",
    "surgery.merge": "merge",
    "surgery.prune": "prune prune_",
    "surgery.recalibrate": "recalibrate",
    "surgery.same_function": "same_function",
    "surgery.select": "match",
    "training.distillation": "Distillation",
    "training.fit": "fit",
    "training.ramp": "Ramp",
    "training.squeeze": "Squeeze",
    "training.tuning": "Tuning",
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


def _register() -> None:
    """Let ``AutoModel.from_pretrained`` read compressed networks; a version of transformers that cannot is left alone."""
    with suppress(ImportError):
        import_module("spectrim.integrations.quantizer")


import_module("spectrim.late").when_imported("transformers.modeling_utils", _register)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Budget",
    "Distillation",
    "Energy",
    "Fixed",
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
