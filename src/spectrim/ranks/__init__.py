"""Rank rules: one layer's spectrum in, its rank out. `METHODS` is the table that contract tests, command line and docs read."""

from spectrim.ranks.rules import Energy, Fixed, Fraction

METHODS = (Energy, Fixed, Fraction)

__all__ = ["METHODS", "Energy", "Fixed", "Fraction"]
