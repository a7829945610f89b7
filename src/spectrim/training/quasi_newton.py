"""BFGS in few dimensions: the settings of its line search, and the update of the inverse Hessian."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.checks.words import check_words
from spectrim.errors import SettingError


@dataclass(frozen=True)
class BFGS:
    """Step along ``-H g`` with a line search, where ``H`` is the BFGS estimate of the inverse Hessian in the subspace.

    Each step calls the closure once for the loss and gradient at hand, and once for each trial: usually twice in all.

    Args:
        armijo: share of the decrease that the slope promises which a trial has to reach, in (0, 0.5].
        shrink: factor of the length after a trial that does not, in (0, 1).
        trials: at most, >= 1. Where none is accepted the parameters stay, and the estimate begins again.
        least: an update is skipped where ``y^T s`` is at most this, so that ``H`` stays positive definite.
        curvature: whether ``y`` is the difference of the gradients of two consecutive ``steps``, each on its batch, as in the published
            code, or of one ``batch``, before and after a step.

    Raises:
        SettingError: for a value outside its range.

    Source: Li et al., TPAMI 2022, algorithm P-BFGS, and its code; Nocedal and Wright, Numerical Optimization, equation 6.17.
    Deviation: a failed line search makes no step, where the published code makes the shortest one.
    """

    armijo: float = 0.4
    shrink: float = 0.4
    trials: int = 20
    least: float = 1e-20
    curvature: Literal["steps", "batch"] = "steps"

    def __post_init__(self) -> None:
        if not 0 < self.armijo <= 0.5:
            raise SettingError("BFGS", "armijo", got=self.armijo, rule="a number in (0, 0.5]")
        if not 0 < self.shrink < 1:
            raise SettingError("BFGS", "shrink", got=self.shrink, rule="a number in (0, 1)")
        if isinstance(self.trials, bool) or self.trials < 1:
            raise SettingError("BFGS", "trials", got=self.trials, rule="an integer >= 1")
        if not self.least >= 0:
            raise SettingError("BFGS", "least", got=self.least, rule="a number >= 0")
        check_words(self)

    def updated(
        self, inverse: Float[Tensor, "size size"], step: Float[Tensor, " size"], change: Float[Tensor, " size"]
    ) -> Float[Tensor, "size size"]:
        """Return ``(1 - s y^T / y^T s) H (1 - y s^T / y^T s) + s s^T / y^T s``, which maps ``y`` to ``s``; `inverse` where that is skipped.

        Args:
            inverse: ``H``, symmetric and positive definite.
            step: ``s``.
            change: ``y``, of the gradient.

        Examples:
            >>> s, y = torch.tensor([1.0, 0.0]), torch.tensor([4.0, 1.0])
            >>> BFGS().updated(torch.eye(2), s, y) @ y
            tensor([1., 0.])
        """
        along = torch.dot(change, step)
        if not float(along) > self.least:
            return inverse
        turned = torch.eye(len(step), dtype=step.dtype) - torch.outer(step, change) / along
        made = turned @ inverse @ turned.mT + torch.outer(step, step) / along
        return (made + made.mT) / 2
