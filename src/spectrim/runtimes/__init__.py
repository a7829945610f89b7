"""Other engines: exports to their formats, and int8."""

from spectrim.runtimes.formats import run_exported
from spectrim.runtimes.int8 import Int8, evaluate_exported, sensitivity

__all__ = ["Int8", "evaluate_exported", "run_exported", "sensitivity"]
