"""Penalties on the factors, one file for each family. `METHODS` is the table that contract tests, command line and docs read."""

from spectrim.penalties.orthogonality import Orthogonality
from spectrim.penalties.sparsity import L1, Hoyer, HoyerSquare

METHODS = (Orthogonality, Hoyer, HoyerSquare, L1)

__all__ = ["L1", "METHODS", "Hoyer", "HoyerSquare", "Orthogonality"]
