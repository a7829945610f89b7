"""Distortion as the loss that a cut adds to second order."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from spectrim.budget.distortion.energy import SpectralEnergy
from spectrim.errors import LayerError, SettingError
from spectrim.forms.svd import Factors
from spectrim.layers import named_factors
from spectrim.linalg.spectral import pooled_spectrum, tail_energy, weighted_spectrum
from spectrim.surgery.calibrate import Calibration


@dataclass(frozen=True, eq=False)
class LossSensitivity:
    """The rise of the loss that a cut would cause, in units of the loss, from gradients and second moments.

    ``order=2``: ``harm(r) = 1/2 min_{rank(W_r) = r} tr(G D A D^T)`` with ``D = W - W_r``, ``A`` the second moment of the inputs and ``G``
    that of the loss's gradient at the outputs: the quadratic model of the loss about a trained network with Kronecker-factored curvature
    (the Fisher matrix), for a weight cut as ``prune(..., calibration=...)`` cuts it. ``order=1``: ``harm(r) = sum_{k>r} |S_k dL/dS_k|``,
    the linear model, each value by itself; small where training has converged, and the better guide where it has not.

    Far from zero neither model is the loss: a harm says which weight loses more, not what will be lost. A weight that the calibration
    skipped, or that no gradient reached, has its `SpectralEnergy` times the median, over the others, of the harm of losing all; so all
    harms have one unit.

    Args:
        calibration: what `calibrate` measured on this model with a loss.
        order: 1 or 2.

    Raises:
        SettingError: for another order, or when the calibration was made without a loss.
        LayerError: when called, if the calibration is of another model, or for order 1 of another rank.

    Source: order 2: LeCun, Denker and Solla, "Optimal brain damage", NIPS 1989, equation 3, with the curvature of Martens and Grosse, arXiv
    1503.05671, section 3, and Grosse and Martens, arXiv 1602.01407, section 3, for convolutions. Order 1: Molchanov et al., arXiv
    1906.10771, equation 8.
    Deviation: order 1 adds absolute values where the source adds squares, so that sums over values of one weight have the loss's unit.
    """

    calibration: Calibration = field(repr=False)
    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (1, 2) or isinstance(self.order, bool):
            raise SettingError("LossSensitivity", "order", got=self.order, rule="1 or 2")
        if not (self.calibration.outputs if self.order == 2 else self.calibration.slopes):
            hint = "calibrate(model, data, loss) has the gradients"
            raise SettingError("LossSensitivity", "calibration", got="one without gradients", rule="made with a loss", hint=hint)

    def __call__(self, model: nn.Module, /) -> dict[str, Tensor]:
        """Return the harms, in units of the loss.

        Args:
            model: factorized.
        """
        relative = SpectralEnergy()(model)
        known = {}
        for name, factors in named_factors(model):
            harm = self._second(name, factors) if self.order == 2 else self._first(name, factors)
            if harm is not None:
                known[name] = harm.cpu()
        typical = float(np.median([float(harm[0]) for harm in known.values()])) if known else 1.0
        return {name: known.get(name, typical * relative[name]) for name in relative}

    def _second(self, name: str, factors: Factors) -> Tensor | None:
        G, A = self.calibration.metrics(name, factors.shape)
        if G is None or A is None:
            return None
        return tail_energy(pooled_spectrum(weighted_spectrum(factors.U, factors.S, factors.Vh, G, A))) / 2

    def _first(self, name: str, factors: Factors) -> Tensor | None:
        self.calibration.metrics(name, factors.shape)  # that it is of this model
        if name not in self.calibration.slopes:
            return None
        slopes, S = self.calibration.slopes[name].to(factors.S), factors.S.detach()
        if slopes.shape != S.shape:
            raise LayerError(
                name, f"holds {factors.rank} singular values, its slopes are of {slopes.shape[-1]}", hint="calibrate this very model"
            )
        size = S.abs() * factors.U.detach().norm(dim=-2) * factors.Vh.detach().norm(dim=-1)  # what a cut sorts by, up to the angles
        rises = (slopes * S).abs().double().gather(-1, size.argsort(dim=-1)).cumsum(-1)  # of the least ones, the least first
        rises = rises.flatten(0, -2).sum(0) if S.dim() > 1 else rises
        return torch.cat([rises.new_zeros(1), rises]).flip(0)
