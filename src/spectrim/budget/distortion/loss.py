"""Distortion as the loss that a cut adds to second order."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from spectrim.budget.distortion.energy import spectral_energy
from spectrim.errors import LayerError, SettingError
from spectrim.forms.form import Form
from spectrim.layers import named_factors
from spectrim.surgery.decompositions import Decompositions
from spectrim.surgery.moments import Calibration

VANISHING = 8.0
"""Gradients at a layer's outputs below so many roundings of these outputs, at every weight, are no gradients."""


@dataclass(frozen=True, eq=False)
class LossSensitivity:
    """The rise of the loss that a cut would cause, in units of the loss, from gradients and second moments.

    ``order=2``: ``distortion(r) = 1/2 min_{rank(W_r) = r} tr(G D A D^T)`` with ``D = W - W_r``, ``A`` the second moment of the inputs and
    ``G`` that of the loss's gradient at the outputs: the quadratic model of the loss about a trained network with Kronecker-factored
    curvature (the Fisher matrix), for a weight cut as ``prune(..., calibration=...)`` cuts it. ``order=1``:
    ``distortion(r) = sum_{k>r} |S_k dL/dS_k|``, the linear model, each value by itself; small where training has converged, and the
    better model where it has not.

    Neither model is accurate for large changes: distortions rank the weights, they do not predict the loss. A weight that the calibration
    skipped, or that no gradient reached, has its `SpectralEnergy` times the median, over the others, of the distortion of losing all; so
    all distortions have one unit.

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
        """Return the distortions, in units of the loss.

        Args:
            model: factorized.
        """
        decomposed = Decompositions(model, self.calibration)
        return (
            loss_sensitivity(decomposed)
            if self.order == 2
            else _of_all(decomposed, {n: self._first(n, f) for n, f in named_factors(model)})
        )

    def _first(self, name: str, factors: Form) -> Tensor | None:
        self.calibration.metrics(name, factors.shape)  # that it is of this model
        if name not in self.calibration.slopes:
            return None
        slopes = self.calibration.slopes[name]
        if slopes.shape != factors.slope_parameters()[0].shape:
            known = slopes.shape[-1] if factors.is_matrix else tuple(slopes.shape)
            raise LayerError(name, f"holds {factors.size} singular values, its slopes are for {known}", hint="calibrate this model")
        return factors.first_order_rises(slopes)


def loss_sensitivity(decomposed: Decompositions) -> dict[str, Tensor]:
    """Return the distortions of `LossSensitivity` of order 2 from decompositions that are at hand, made with its calibration.

    Raises:
        SettingError: when the gradients consist of rounding errors.
    """
    names = [name for name in decomposed.factors if decomposed.has(name, "loss")]
    check_gradients(decomposed)
    return _of_all(decomposed, {name: decomposed.tail(name, "loss") / 2 for name in names})


def _of_all(decomposed: Decompositions, found: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Give a weight without a distortion its spectral energy, in the unit of the others."""
    known = {name: entry.cpu() for name, entry in found.items() if entry is not None}
    typical = float(np.median([float(entry[0]) for entry in known.values()])) if known else 1.0
    relative = spectral_energy(decomposed)
    return {name: known.get(name, typical * relative[name]) for name in relative}


def check_gradients(decomposed: Decompositions) -> None:
    """Raise a SettingError when no weight has gradients at its outputs that are more than rounding of these outputs."""
    shares = []
    for name in (name for name in decomposed.factors if decomposed.has(name, "loss")):
        factors, calibration = decomposed.factors[name], decomposed.calibration
        assert calibration is not None
        squares = float(calibration.outputs[name].diagonal(dim1=-2, dim2=-1).sum())
        outputs = float(decomposed.spectrum(name, "inputs").square().sum())
        rounding = torch.finfo(factors.dtype).eps
        shares.append(math.sqrt(squares / outputs) / rounding if outputs > 0 else 0.0)
    no_slope = decomposed.calibration is not None and not decomposed.calibration.slopes  # a loss that cannot be differentiated
    if no_slope or (shares and max(shares) < VANISHING):
        got = "no gradients" if no_slope else f"gradients of at most {max(shares):.2g} times the rounding of the outputs"
        hint = "targets that are the network's own outputs give none; use WhitenedEnergy(calibration)"
        raise SettingError("LossSensitivity", "calibration", got=got, rule="made with a loss whose gradient does not vanish", hint=hint)
