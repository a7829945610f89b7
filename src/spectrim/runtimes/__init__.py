"""Other engines: exports to their formats, and int8."""

from spectrim.runtimes.evaluation import evaluate_exported
from spectrim.runtimes.int8 import sensitivity
from spectrim.runtimes.int8_settings import Int8
from spectrim.runtimes.readers import run_exported

__all__ = ["Int8", "evaluate_exported", "run_exported", "sensitivity"]
