"""The penalty that keeps singular vectors orthonormal."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.layers import named_factors


def check_weight(owner: object, weight: float) -> None:
    """Raise a SettingError unless `weight` is a finite number >= 0."""
    if not 0 <= weight < float("inf"):
        raise SettingError(type(owner).__name__, "weight", got=weight, rule="a finite number >= 0")


def total(model: nn.Module, terms: list[Tensor]) -> Tensor:
    """Sum terms; zero, on the model's device, for a model without factors."""
    if terms:
        return torch.stack(terms).sum()
    parameter = next(model.parameters(), torch.zeros(()))
    return torch.zeros((), device=parameter.device)


@dataclass(frozen=True)
class Orthogonality:
    """``weight * sum_l (||U^T U - I||_F^2 + ||Vh Vh^T - I||_F^2) / r_l^2``, over layers and their blocks; in float32 at least.

    Args:
        weight: strength, >= 0. The paper takes 1.0 on CIFAR-10 and for the LSTM, 2.0 on ImageNet.

    Raises:
        SettingError: for a negative or infinite strength.

    Examples:
        >>> from spectrim.factorize import factorize
        >>> round(Orthogonality()(factorize(nn.Linear(4, 3))).item(), 6)
        0.0

    Source: Yang et al., arXiv 2004.09031, equation 3.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_weight(self, self.weight)

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the weighted penalty of all factorized layers, a scalar."""
        terms = []
        for _, factors in named_factors(model):
            eye = torch.eye(factors.rank, device=factors.U.device)
            with torch.autocast(factors.U.device.type, enabled=False):
                grams = (factors.U.mT @ factors.U, factors.Vh @ factors.Vh.mT)
                defects = ((gram - eye).square().sum() for gram in grams)
                terms.append(sum(defects, start=torch.zeros((), device=eye.device)) / factors.rank**2)
        return self.weight * total(model, terms)
