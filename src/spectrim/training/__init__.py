"""The training loop and its parts: courses, lessons, checkpoints, progress, several processes."""

from spectrim.training.admm import ADMM
from spectrim.training.basis import Basis
from spectrim.training.distillation import Distillation
from spectrim.training.execution import choose_execution
from spectrim.training.fit import EpochCallback
from spectrim.training.history import History
from spectrim.training.low_bits import bits_of, float_in_int8, rounding
from spectrim.training.magnitude import Gradual, Hold, OneShot
from spectrim.training.masked_mapping import MaskedMapping
from spectrim.training.precision import CyclicPrecision, LearnedPrecision, StaticPrecision
from spectrim.training.quasi_newton import BFGS
from spectrim.training.ramp import Ramp
from spectrim.training.retraction import Retraction
from spectrim.training.rise import Rise
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
    "CyclicPrecision",
    "Distillation",
    "EpochCallback",
    "Gradual",
    "History",
    "Hold",
    "LearnedPrecision",
    "MaskedMapping",
    "OneShot",
    "Ramp",
    "Retraction",
    "Rise",
    "Sampling",
    "Squeeze",
    "StaticPrecision",
    "StraightThrough",
    "Subspace",
    "Trajectory",
    "Tuning",
    "bits_of",
    "choose_execution",
    "float_in_int8",
    "rounding",
]
