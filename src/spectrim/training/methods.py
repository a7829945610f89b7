"""Schedules: methods that cut, or change a penalty, while a network trains. `METHODS` is the table that docs read."""

from typing import Any

from spectrim.budget.budget import Budget
from spectrim.tables import Row
from spectrim.training.ramp import Ramp
from spectrim.training.squeeze import Squeeze

LAWS: dict[str, str] = {}
"""No laws beyond those of every schedule."""

METHODS: tuple[Row[Any], ...] = (
    Row(Ramp, example=Ramp(Budget(macs=0.5)), card="svd-training"),
    Row(Squeeze, example=Squeeze(Budget(macs=0.5)), card="squeeze"),
)
