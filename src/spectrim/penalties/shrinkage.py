"""Penalty whose weights grow with the place of a value in its spectrum."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectrim.penalties.sparsity import over_spectra
from spectrim.penalties.sums import check_positive, check_weight


@dataclass(frozen=True)
class CumulativeShrinkage:
    """``weight * sum_l sum_h (1 - (a / (1 + a))^h) |S_l|_(h)``, ``|S_l|_(h)`` the h-th largest value: later ones are shrunk ever harder.

    The weights are the prior probabilities that a component is noise under a cumulative shrinkage process. The first value of a weight
    costs ``1 / (1 + a)`` of what it would with `L1`, the last ones as much. `spectrim.analysis.bayes` finds ranks by the same prior.

    Args:
        weight: strength, >= 0.
        concentration: ``a``, > 0: the number of components that are expected to stay.

    Raises:
        SettingError: for a setting outside its range.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
        >>> round(CumulativeShrinkage(1.0, concentration=1.0)(factorize(layer)).item(), 4)  # 3 / 2 + 1 * 3 / 4
        2.25

    Source: Legramanti, Durante and Dunson, arXiv 1902.04349 (the weights).
    Deviation: a penalty for training, the mode of a Laplace prior of these rates; its weights follow the order of the values.
    """

    weight: float
    concentration: float = 5.0

    def __post_init__(self) -> None:
        check_weight(self, self.weight)
        check_positive(self, concentration=self.concentration)

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the weighted penalty of all factorized layers, a scalar."""
        kept = self.concentration / (1 + self.concentration)

        def measure(S: Tensor) -> Tensor:
            places = torch.arange(1, S.shape[-1] + 1, dtype=S.dtype, device=S.device)
            return ((1 - kept**places) * S.sort(dim=-1, descending=True).values).sum(-1)

        return self.weight * over_spectra(model, measure)
