"""`Cut`: the ways to cut that `compress` knows."""

from typing import Literal

Cut = Literal["auto", "plain", "whitened", "sensitive", "mixed", "both", "curved"]
"""What ``cut=`` takes: a name in `spectrim.budget.ways.WAYS`, or the choice among them."""
