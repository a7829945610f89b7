"""Model in, model out: select, factorize, calibrate, prune, correct, merge, coverage."""

from spectrim.surgery.balance import balance_
from spectrim.surgery.moments import Calibration
from spectrim.surgery.optimizer_state import prune_optimizer_state

__all__ = ["Calibration", "balance_", "prune_optimizer_state"]
