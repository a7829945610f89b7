"""Distortion as discarded energy, plain or whitened by the inputs."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from spectrim.budget.distortion.base import _relative
from spectrim.surgery.decompositions import Decompositions
from spectrim.surgery.moments import Calibration


@dataclass(frozen=True)
class SpectralEnergy:
    """The energy that a cut discards, as a fraction of the weight's: ``distortion(r) = sum_{k>r} s_k^2 / sum_k s_k^2``.

    Uses the weights only: free to compute, but it ignores the inputs, the normalization after a layer, and the loss.

    Examples:
        >>> import torch
        >>> from spectrim.surgery.factorize import factorize
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.diag(torch.tensor([2.0, 1.0])))
        >>> [round(distortion, 6) for distortion in SpectralEnergy()(factorize(layer))[""].tolist()]
        [1.0, 0.2, 0.0]

    Source: Idelbayev and Carreira-Perpinan, "Low-rank compression of neural nets: learning the rank of each layer", CVPR 2020.
    """

    def __call__(self, model: nn.Module, /) -> dict[str, Tensor]:
        """Return the distortions, in [0, 1].

        Args:
            model: factorized, at any rank.
        """
        return spectral_energy(Decompositions(model))


@dataclass(frozen=True, eq=False)
class WhitenedEnergy:
    """Energy of what a cut changes in a weight's output, relative to all of it: that of ``W A^(1/2)``, ``A`` the inputs' second moment.

    Where a bias absorbs the mean (`Calibration.means`) it is the variance of the output that counts.

    ``distortion(r) = min_{rank(W_r) = r} tr((W - W_r) A (W - W_r)^T) / tr(W A W^T)``: the share of the output's energy that is lost when
    the weight is cut as ``prune`` cuts it with a calibration made without a loss. Directions into which no input points cost nothing.

    A weight that the calibration skipped has its plain `SpectralEnergy`: the same share for inputs that are alike in all directions.

    Args:
        calibration: what `calibrate` measured on this model, before or after a cut.

    Raises:
        LayerError: when called, if the calibration is of another model.

    Source: Yuan et al. (ASVD), arXiv 2312.05821; Wang et al. (SVD-LLM), arXiv 2403.07378, section 3.1, and BALF, as a budget over layers.
    Deviation: the symmetric root by eigenvalues and not Cholesky's factor: inputs may span less than the whole space; centered inputs.
    """

    calibration: Calibration = field(repr=False)

    def __call__(self, model: nn.Module, /) -> dict[str, Tensor]:
        """Return the distortions, in [0, 1].

        Args:
            model: factorized.
        """
        return whitened_energy(Decompositions(model, self.calibration))


def spectral_energy(decomposed: Decompositions) -> dict[str, Tensor]:
    """Return the distortions of `SpectralEnergy` from decompositions that are at hand."""
    return {name: _relative(decomposed.tail(name)).cpu() for name in decomposed.factors}


def whitened_energy(decomposed: Decompositions) -> dict[str, Tensor]:
    """Return the distortions of `WhitenedEnergy` from decompositions that are at hand, made with its calibration."""
    return {name: _relative(decomposed.tail(name, "inputs")).cpu() for name in decomposed.factors}
