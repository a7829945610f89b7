"""Budgets: what each rank costs, what it distorts, and the ranks that fit."""

from spectrim.budget.budget import Budget
from spectrim.budget.plan_table import Plan
from spectrim.budget.rules import Energy, Fixed, Fraction
from spectrim.budget.timed import LatencyTable

__all__ = ["Budget", "Energy", "Fixed", "Fraction", "LatencyTable", "Plan"]
