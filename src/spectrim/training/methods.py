"""Schedules: methods that cut, or change a penalty, while a network trains. `METHODS` is the table that docs read."""

from typing import Any

from spectrim.budget.budget import Budget
from spectrim.penalties import L1
from spectrim.projections import Levels, TopK
from spectrim.tables import Row
from spectrim.training.admm import ADMM
from spectrim.training.magnitude import Gradual, Hold, OneShot
from spectrim.training.masked_mapping import MaskedMapping
from spectrim.training.precision import CyclicPrecision, LearnedPrecision, StaticPrecision
from spectrim.training.ramp import Ramp
from spectrim.training.retraction import Retraction
from spectrim.training.rise import Rise
from spectrim.training.sampling import Sampling
from spectrim.training.squeeze import Squeeze
from spectrim.training.straight_through import StraightThrough
from spectrim.training.trajectory import Trajectory

LAWS: dict[str, str] = {}
"""No laws beyond those of every schedule."""

METHODS: tuple[Row[Any], ...] = (
    Row(Ramp, example=Ramp(Budget(macs=0.5)), card="svd-training"),
    Row(Retraction, example=Retraction(), card="svd-training"),
    Row(Squeeze, example=Squeeze(Budget(macs=0.5)), card="squeeze"),
    Row(Rise, example=Rise(L1(0.1)), card="rank-measures"),
    Row(ADMM, example=ADMM({"*": TopK(0.1)}), card="admm"),
    Row(OneShot, example=OneShot({"*": TopK(0.1)}), card="magnitude-pruning"),
    Row(Gradual, example=Gradual({"*": TopK(0.1)}), card="magnitude-pruning"),
    Row(StraightThrough, example=StraightThrough({"*": TopK(0.1)}), card="admm"),
    Row(Hold, example=Hold(), card="magnitude-pruning"),
    Row(MaskedMapping, example=MaskedMapping({"*": Levels(5)}), card="crossbars"),
    Row(LearnedPrecision, example=LearnedPrecision(0.6), card="learned-precision"),
    Row(CyclicPrecision, example=CyclicPrecision(), card="learned-precision"),
    Row(StaticPrecision, example=StaticPrecision(8), card="learned-precision"),
    Row(Sampling, example=Sampling(Trajectory()), card="subspace"),
)
