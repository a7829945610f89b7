"""Penalties on factors and weights, one file for each family.

`METHODS` is the table that contract tests and docs read. It holds the penalties with one strength for the whole model; `TailEnergy`,
with a strength for each weight, is part of `Squeeze`.
"""

from spectrim.penalties.decay import FrobeniusDecay
from spectrim.penalties.dense import NuclearNorm, PolarHoyer
from spectrim.penalties.measures import EffectiveRank, LogDeterminant, Schatten
from spectrim.penalties.orthogonality import Orthogonality
from spectrim.penalties.shrinkage import CumulativeShrinkage
from spectrim.penalties.sparsity import L1, Hoyer, HoyerSquare
from spectrim.penalties.tail import TailEnergy, tail_shares
from spectrim.protocols import Penalty
from spectrim.tables import Row

LAWS = {
    "orthonormal": "zero for orthonormal factors, whatever their singular values; the gradient reaches U and Vh",
    "spectral": "a function of the singular values, finite with its gradient at every spectrum; a weight of zeros adds nothing",
    "rank-one": "zero for weights of rank one",
    "definite": "zero for weights of zeros only",
    "scale-free": "unchanged when all singular values of a weight are multiplied by a positive factor",
    "degree-1": "multiplied by the factor when all singular values are",
    "degree-2": "multiplied by the square of the factor when all singular values are multiplied by it",
    "in a unit": "measures singular values in a unit, which is one of its settings",
    "dense": "also penalizes dense weights, by an iterative polar factor: no singular value decomposition",
}
"""The laws that some penalties obey, beyond those of every penalty."""

METHODS: tuple[Row[Penalty], ...] = (
    Row(Orthogonality, example=Orthogonality(1.0), card="svd-training", laws={"orthonormal"}),
    Row(Hoyer, example=Hoyer(0.05), card="svd-training", laws={"spectral", "rank-one", "scale-free"}),
    Row(HoyerSquare, example=HoyerSquare(0.05), card="svd-training", laws={"spectral", "rank-one", "scale-free"}),
    Row(L1, example=L1(0.1), card="svd-training", laws={"spectral", "definite", "degree-1"}),
    Row(EffectiveRank, example=EffectiveRank(0.01), card="rank-measures", laws={"spectral", "rank-one", "scale-free"}),
    Row(LogDeterminant, example=LogDeterminant(0.01), card="rank-measures", laws={"spectral", "definite", "in a unit"}),
    Row(Schatten, example=Schatten(0.01), card="rank-measures", laws={"spectral", "definite", "in a unit"}),
    Row(CumulativeShrinkage, example=CumulativeShrinkage(0.1), card="bayesian-ranks", laws={"spectral", "definite", "degree-1"}),
    Row(PolarHoyer, example=PolarHoyer(0.001), card="dense-regularizers", laws={"dense", "spectral", "rank-one", "scale-free"}),
    Row(NuclearNorm, example=NuclearNorm(0.001), card="dense-regularizers", laws={"dense", "spectral", "definite", "degree-1"}),
    Row(FrobeniusDecay, example=FrobeniusDecay(1e-4), card="squeeze", laws={"spectral", "definite", "degree-2"}),
)

__all__ = [
    "L1",
    "LAWS",
    "METHODS",
    "CumulativeShrinkage",
    "EffectiveRank",
    "FrobeniusDecay",
    "Hoyer",
    "HoyerSquare",
    "LogDeterminant",
    "NuclearNorm",
    "Orthogonality",
    "PolarHoyer",
    "Schatten",
    "TailEnergy",
    "tail_shares",
]
