"""`Way`: how ranks are chosen and weights are cut, as a value. `WAYS` is the table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.budget.distortion.energy import spectral_energy, whitened_energy
from spectrim.budget.distortion.loss import loss_sensitivity
from spectrim.budget.distortion.normalized import normalized_energy
from spectrim.surgery.decompositions import Decompositions, Metric
from spectrim.surgery.moments import Calibration


@dataclass(frozen=True)
class Way:
    """One way to cut a network: what `cut_to` takes.

    Attributes:
        name: as in `WAYS`.
        distortion: ``(model, decompositions, inputs) -> {name: (rank + 1,)}``: what ranks are chosen by.
        metric: in which each weight is cut; ``inputs`` and ``loss`` need a calibration, ``loss`` one with a loss.
        needs: which part of a calibration the distortion needs: ``none``, ``inputs`` or ``loss``.
        importance: name of the distortion, in plans.
        refit: whether the factors are refitted to the dense network's outputs after the cut, where that lowers the loss.
        refit_metric: in which the refit measures errors of a layer's output: ``inputs``, all alike; ``both`` and ``loss``, by curvature.
    """

    name: str
    distortion: Callable[[nn.Module, Decompositions, Any], Mapping[str, Tensor]]
    metric: Metric
    needs: Metric
    importance: str
    refit: bool = True
    refit_metric: Metric = "inputs"

    def able(self, calibration: Calibration | None) -> bool:
        """Return whether a calibration has what this way needs.

        Args:
            calibration: of the network, or None.
        """
        return self.needs == "none" or (calibration is not None and (self.needs == "inputs" or bool(calibration.outputs)))


def _whitened(model: nn.Module, decomposed: Decompositions, inputs: Any) -> dict[str, Tensor]:
    return whitened_energy(decomposed)


def _sensitive(model: nn.Module, decomposed: Decompositions, inputs: Any) -> dict[str, Tensor]:
    return loss_sensitivity(decomposed)


def _mixed(model: nn.Module, decomposed: Decompositions, inputs: Any) -> dict[str, Tensor]:
    """The mean of the plain and the whitened energy: both are shares."""
    plain, whitened = spectral_energy(decomposed), whitened_energy(decomposed)
    return {name: torch.stack([plain[name], whitened[name]]).mean(0) for name in plain}


WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        Way("plain", lambda model, decomposed, inputs: spectral_energy(decomposed), "none", "none", "SpectralEnergy"),
        Way("normalized", normalized_energy, "none", "none", "NormalizedEnergy"),
        Way("whitened", _whitened, "inputs", "inputs", "WhitenedEnergy"),
        Way("sensitive", _sensitive, "loss", "loss", "LossSensitivity"),
        Way("mixed", _mixed, "inputs", "inputs", "MixedEnergy"),
        Way("both", _whitened, "both", "loss", "WhitenedEnergy", refit_metric="both"),
        Way("curved", _sensitive, "loss", "loss", "LossSensitivity", refit_metric="loss"),
    )
}
"""Every way by its name: the one place where a name is looked up."""
