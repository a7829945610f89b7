"""Orthonormal factors without a penalty: every few steps they are moved back toward orthonormal columns."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from spectrim.errors import LayerError, SettingError
from spectrim.layers import named_factors
from spectrim.layers.sharded import is_sharded


@dataclass(frozen=True)
class Retraction:
    """Keeps factors near orthonormal by one Newton-Schulz step on each every few optimizer steps, in place of `Orthogonality`.

    ``A <- A (3 I - A^T A) / 2``, after which singular values take over the lengths of their vectors. It adds nothing to the loss, and by
    default at most 3 % to a step, where the penalty adds up to 85 % (ResNet-18 at batch 4).

    Args:
        every: optimizer steps from one to the next, >= 1.

    Raises:
        SettingError: for `every` below 1.
        LayerError: at the first step, for factors that are sharded over processes.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> from spectrim.linalg import orthogonality_defect
        >>> low = factorize(nn.Linear(6, 4), where=lambda name, module: True)
        >>> ((_, factors),) = named_factors(low)
        >>> left = factors.sides()[0]
        >>> _ = left.data.mul_(1.1)
        >>> before = orthogonality_defect(left)
        >>> Retraction(every=8).after(low, 7, 100, {})
        >>> orthogonality_defect(left) < 0.3 * before
        True

    Source: the step is that of Higham, "Functions of Matrices", section 8.3.
    Deviation: SVD training (Yang et al., arXiv 2004.09031) has a penalty at every step.
    """

    every: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise SettingError("Retraction", "every", got=self.every, rule="a whole number of steps, >= 1")

    def start(self, model: nn.Module, inputs: Any, steps: int) -> dict[str, Any]:
        """Return an empty memory; refuse sharded factors."""
        for name, factors in named_factors(model):
            if any(is_sharded(side) for side in factors.sides()):
                raise LayerError(name, "has factors that are sharded over processes", hint="use Orthogonality(every=8) there")
        return {}

    def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any]) -> None:
        """Do nothing."""

    def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any]) -> None:
        """Retract all factors that learn, after every few steps and after the last one."""
        if (step + 1) % self.every == 0 or step + 1 == steps:
            for _, factors in named_factors(model):
                if any(part.requires_grad for part in factors.parameters()):
                    factors.retract_()
