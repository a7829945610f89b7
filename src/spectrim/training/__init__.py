"""The training loop and its parts: courses, lessons, checkpoints, progress, several processes."""

from spectrim.training.distillation import Distillation
from spectrim.training.execution import choose_execution
from spectrim.training.fit import EpochCallback
from spectrim.training.history import History
from spectrim.training.ramp import Ramp
from spectrim.training.squeeze import Squeeze
from spectrim.training.tuning import Tuning

__all__ = ["Distillation", "EpochCallback", "History", "Ramp", "Squeeze", "Tuning", "choose_execution"]
