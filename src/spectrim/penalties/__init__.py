"""Penalties on factors and weights, one file for each family.

`METHODS` is the table that contract tests, command line and docs read: those whose one strength is for the whole model.
"""

from spectrim.penalties.decay import FrobeniusDecay
from spectrim.penalties.dense import NuclearNorm, PolarHoyer
from spectrim.penalties.orthogonality import Orthogonality
from spectrim.penalties.sparsity import L1, Hoyer, HoyerSquare
from spectrim.penalties.tail import TailEnergy, tail_shares

METHODS = (Orthogonality, Hoyer, HoyerSquare, L1, PolarHoyer, NuclearNorm, FrobeniusDecay)

__all__ = [
    "L1",
    "METHODS",
    "FrobeniusDecay",
    "Hoyer",
    "HoyerSquare",
    "NuclearNorm",
    "Orthogonality",
    "PolarHoyer",
    "TailEnergy",
    "tail_shares",
]
