"""Penalties on factors and weights, one file for each family. `METHODS` is the table that contract tests, command line and docs read."""

from spectrim.penalties.dense import NuclearNorm, PolarHoyer
from spectrim.penalties.orthogonality import Orthogonality
from spectrim.penalties.sparsity import L1, Hoyer, HoyerSquare

METHODS = (Orthogonality, Hoyer, HoyerSquare, L1, PolarHoyer, NuclearNorm)

__all__ = ["L1", "METHODS", "Hoyer", "HoyerSquare", "NuclearNorm", "Orthogonality", "PolarHoyer"]
