"""`Rise`: a penalty whose strength rises from zero."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.protocols import Change, Penalty


@dataclass(frozen=True)
class Scaled:
    """A penalty times a number.

    Args:
        penalty: any.
        factor: >= 0.
    """

    penalty: Penalty
    factor: float

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the product, a scalar."""
        return self.factor * self.penalty(model)


@dataclass(frozen=True)
class Rise:
    """A penalty whose strength rises linearly from zero over the first part of training, and stays.

    A strong penalty on spectra that are still flat has a large gradient; with a high learning rate it can diverge in the first steps.

    Args:
        penalty: at its full strength.
        end: share of training in (0, 1] at which that is reached.

    Raises:
        SettingError: for a setting outside its range.

    Examples:
        >>> from spectrim.penalties import L1
        >>> rise = Rise(L1(0.1), end=0.5)
        >>> [round(rise.factor(step, 100), 2) for step in (0, 25, 50, 99)]
        [0.0, 0.5, 1.0, 1.0]

    Source: ours.
    """

    penalizes: ClassVar[bool] = True

    penalty: Penalty
    end: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.penalty, Penalty) or isinstance(self.penalty, type):
            raise SettingError("Rise", "penalty", got=self.penalty, rule="a penalty, such as Hoyer(0.05)")
        if not 0 < self.end <= 1:
            raise SettingError("Rise", "end", got=self.end, rule="a share in (0, 1]")

    def factor(self, step: int, steps: int) -> float:
        """Return what the penalty is multiplied with at a step, in [0, 1]."""
        return min(1.0, step / (self.end * steps))

    def start(self, model: nn.Module, inputs: Any, steps: int) -> dict[str, Any]:
        """Return an empty memory, see `Course`."""
        return {}

    def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any]) -> Change:
        """Return the penalty at its present strength, see `Course`."""
        return Change(penalty=Scaled(self.penalty, self.factor(step, steps)))

    def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any]) -> None:
        """Do nothing, see `Course`."""
