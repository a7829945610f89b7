"""The training loop and its parts: courses, lessons, checkpoints, progress, several processes."""

from spectrim.training.admm import ADMM
from spectrim.training.basis import Basis
from spectrim.training.distillation import Distillation
from spectrim.training.execution import choose_execution
from spectrim.training.fit import EpochCallback
from spectrim.training.history import History
from spectrim.training.magnitude import Gradual, Hold, OneShot
from spectrim.training.quasi_newton import BFGS
from spectrim.training.ramp import Ramp
from spectrim.training.sampling import Sampling
from spectrim.training.squeeze import Squeeze
from spectrim.training.straight_through import StraightThrough
from spectrim.training.subspace import Subspace
from spectrim.training.trajectory import Trajectory
from spectrim.training.tuning import Tuning

__all__ = [
    "ADMM",
    "BFGS",
    "Basis",
    "Distillation",
    "EpochCallback",
    "Gradual",
    "History",
    "Hold",
    "OneShot",
    "Ramp",
    "Sampling",
    "Squeeze",
    "StraightThrough",
    "Subspace",
    "Trajectory",
    "Tuning",
    "choose_execution",
]
