"""Model in, model out: select, factorize, calibrate, prune, correct, merge, coverage."""

from spectrim.surgery.balance import balance_
from spectrim.surgery.moments import Calibration
from spectrim.surgery.optimizer_state import prune_optimizer_state
from spectrim.surgery.shared import params_of_task, sharing
from spectrim.surgery.tasks import add_task, one_task, prune_task, select_task, selected_task, tasks_of

__all__ = [
    "Calibration",
    "add_task",
    "balance_",
    "one_task",
    "params_of_task",
    "prune_optimizer_state",
    "prune_task",
    "select_task",
    "selected_task",
    "sharing",
    "tasks_of",
]
