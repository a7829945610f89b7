"""The training loop and its parts: courses, lessons, checkpoints, progress, several processes."""

from spectrim.training.admm import ADMM
from spectrim.training.distillation import Distillation
from spectrim.training.execution import choose_execution
from spectrim.training.fit import EpochCallback
from spectrim.training.history import History
from spectrim.training.magnitude import Gradual, Hold, OneShot
from spectrim.training.ramp import Ramp
from spectrim.training.rise import Rise
from spectrim.training.squeeze import Squeeze
from spectrim.training.straight_through import StraightThrough
from spectrim.training.tuning import Tuning

__all__ = [
    "ADMM",
    "Distillation",
    "EpochCallback",
    "Gradual",
    "History",
    "Hold",
    "OneShot",
    "Ramp",
    "Rise",
    "Squeeze",
    "StraightThrough",
    "Tuning",
    "choose_execution",
]
