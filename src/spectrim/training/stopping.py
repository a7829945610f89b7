"""Early stopping, and the weights of the best epoch."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from spectrim.errors import SettingError


def wants_to_stop(answer: Any) -> bool:
    """Whether a callback's answer ends training: True, as bool, as NumPy's or as a tensor; anything else does not."""
    return isinstance(answer, bool | np.bool_ | Tensor) and bool(answer)


def monitored(keep_best: bool | str, owner: str) -> tuple[str, str]:
    """Return the number that `keep_best` names, and whether its ``min`` or ``max`` is the best.

    Args:
        keep_best: see `Best`.
        owner: whose setting it is, for errors.

    Raises:
        SettingError: for a name without a direction.

    Examples:
        >>> monitored(True, "fit"), monitored("max mine", "fit")
        (('eval_loss', 'min'), ('mine', 'max'))
    """
    name = "eval_loss" if keep_best is True else str(keep_best)
    way, _, rest = name.partition(" ")
    monitor = rest if rest and way in ("min", "max") else name
    if way not in ("min", "max") or not rest:
        way = "min" if name.endswith("loss") else "max" if name.endswith("accuracy") else ""
    if not way or not isinstance(keep_best, bool | str):
        rule = "True, a name that ends on 'loss' or 'accuracy', 'min NAME' or 'max NAME'"
        raise SettingError(owner, "keep_best", got=keep_best, rule=rule, hint="the names are those of a line in the log")
    return monitor, way


class Best:
    """The weights of the best epoch so far, by one number of its line in the log.

    Attributes:
        monitor: the name of the number.
        found: ``epoch`` (counted from 1), ``monitor`` and ``value``; None before the first epoch.
    """

    def __init__(self, keep_best: bool | str, judged: bool) -> None:
        """Set the monitored number.

        Args:
            keep_best: the number's name, where it ends on ``loss`` or ``accuracy``, else ``min NAME`` or ``max NAME``; True for
                ``eval_loss``.
            judged: whether there is a validation split.

        Raises:
            SettingError: for a name without a direction, or without a validation split.
        """
        self.monitor, way = monitored(keep_best, "fit")
        if self.monitor.startswith("eval_") and not judged:
            rule = f"given with eval_data, the validation split, for '{self.monitor}'"
            raise SettingError("fit", "keep_best", got=keep_best, rule=rule)
        self.sign = 1.0 if way == "min" else -1.0
        self.found: dict[str, Any] | None = None
        self.weights: dict[str, Tensor] = {}

    def value(self, line: dict[str, float]) -> float:
        """Return the number in a line of the log."""
        if self.monitor not in line:
            raise SettingError("fit", "keep_best", got=self.monitor, rule=f"a number of the log: {', '.join(line)}")
        return float(line[self.monitor])

    def note(self, epoch: int, line: dict[str, float], model: nn.Module, cut: bool) -> None:
        """Keep the weights of a finished epoch if it is the best.

        Args:
            epoch: its number, counted from 1.
            line: of the log.
            model: after it.
            cut: whether ranks were cut in it: epochs before it are of a larger network and count no more.
        """
        value = self.value(line)
        if cut:
            self.found, self.weights = None, {}
        if math.isnan(value) or (self.found is not None and not self.sign * value < self.sign * self.found["value"]):
            return
        self.found = {"epoch": epoch, "monitor": self.monitor, "value": value}
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Give the model the weights of the best epoch."""
        if self.found is not None:
            own = model.state_dict()
            for name, tensor in self.weights.items():
                own[name].copy_(tensor)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"found": self.found, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.found, self.weights = state["found"], dict(state["weights"])


def check_plateau(scheduler: Any, scheduler_steps: str, judged: bool, best: Best | None) -> None:
    """Raise a SettingError for a plateau schedule without a number to monitor, or with another direction than `keep_best`."""
    if not isinstance(scheduler, ReduceLROnPlateau):
        return
    if scheduler_steps != "epoch":
        raise SettingError("fit", "scheduler_steps", got=scheduler_steps, rule="'epoch' for ReduceLROnPlateau, which looks at epochs")
    got = f"mode='{scheduler.mode}'"
    if best is not None and (best.sign > 0) != (scheduler.mode == "min"):
        rule = f"mode='{'min' if best.sign > 0 else 'max'}' for '{best.monitor}', which keep_best monitors"
        raise SettingError("fit", "scheduler", got=got, rule=rule)
    if best is None and scheduler.mode == "max" and not judged:
        raise SettingError("fit", "scheduler", got=got, rule="mode='min' without eval_data: the training loss is monitored")


def plateau_value(scheduler: ReduceLROnPlateau, line: dict[str, float], best: Best | None) -> float:
    """Return the number that a plateau schedule monitors: that of `keep_best`, else eval_accuracy or eval_loss by its mode, else the loss.

    Raises:
        SettingError: when there is none.
    """
    if best is not None:
        return best.value(line)
    name = "eval_accuracy" if scheduler.mode == "max" else "eval_loss" if "eval_loss" in line else "loss"
    if name not in line:
        hint = "name the number: keep_best='max NAME'"
        raise SettingError("fit", "scheduler", got="mode='max'", rule="mode='min' where the log has no eval_accuracy", hint=hint)
    return float(line[name])
