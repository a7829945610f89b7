"""Penalties for sparse singular values."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectrim.layers import named_factors
from spectrim.layers.sharded import whole
from spectrim.penalties.sums import batches, check_weight, stack, total


def over_spectra(model: nn.Module, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum a measure, ``(blocks, rank) -> (blocks,)``, of every spectrum; those of equal rank together."""
    groups = batches((whole(values) for _, factors in named_factors(model) for values in factors.values()), axes=1)
    return total(model, [measure(stack(group, axes=1).abs()).sum() for group in groups])


def ratio_of_norms(S: Float[Tensor, "blocks rank"]) -> Float[Tensor, " blocks"]:
    """Return ``||S||_1 / ||S||_2`` of non-negative rows, in ``[1, sqrt(rank)]``; 1 with zero gradient for a row of zeros.

    Rows are scaled by their largest value first, so that squares neither underflow nor overflow. A row so small that its gradient, about
    ``rank / largest``, would overflow is treated as zeros.
    """
    largest = S.detach().amax(dim=-1, keepdim=True)
    zero = largest < torch.finfo(S.dtype).tiny * S.shape[-1]
    S = torch.where(zero, torch.ones_like(S), S) / torch.where(zero, 1.0, largest)
    return torch.where(zero.squeeze(-1), 1.0, S.sum(-1) / S.square().sum(-1).sqrt())


@dataclass(frozen=True)
class Hoyer:
    """``weight * sum_l (||S_l||_1 / ||S_l||_2 - 1)``: scale-free, zero when one singular value is left. The paper uses this one.

    Args:
        weight: strength, >= 0. The paper uses 0.001 to 0.1 for its CIFAR-10 networks.

    Raises:
        SettingError: for a negative or infinite strength.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
        >>> round(Hoyer(1.0)(factorize(layer)).item(), 4)  # (3 + 1) / sqrt(9 + 1) - 1
        0.2649

    Source: Yang et al., arXiv 2004.09031, equation 5.
    """

    weight: float

    def __post_init__(self) -> None:
        check_weight(self, self.weight)

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the weighted penalty of all factorized layers, a scalar."""
        return self.weight * over_spectra(model, lambda S: ratio_of_norms(S) - 1)


@dataclass(frozen=True)
class HoyerSquare:
    """``weight * sum_l (||S_l||_1^2 / ||S_l||_2^2 - 1)``: scale-free; without the -1 it counts the values of a flat spectrum.

    Args:
        weight: strength, >= 0.

    Raises:
        SettingError: for a negative or infinite strength.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
        >>> round(HoyerSquare(1.0)(factorize(layer)).item(), 4)  # (3 + 1)^2 / (9 + 1) - 1
        0.6

    Source: Yang, Wen and Li, DeepHoyer, ICLR 2020, arXiv 1908.09979, equation 3.
    """

    weight: float

    def __post_init__(self) -> None:
        check_weight(self, self.weight)

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the weighted penalty of all factorized layers, a scalar."""
        return self.weight * over_spectra(model, lambda S: ratio_of_norms(S).square() - 1)


@dataclass(frozen=True)
class L1:
    """``weight * sum_l ||S_l||_1``: shrinks every singular value at the same speed.

    Args:
        weight: strength, >= 0. The paper uses 0.1 to 0.3 in its ablation.

    Raises:
        SettingError: for a negative or infinite strength.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
        >>> round(L1(1.0)(factorize(layer)).item(), 4)
        4.0

    Source: Yang et al., arXiv 2004.09031, equation 4.
    """

    weight: float

    def __post_init__(self) -> None:
        check_weight(self, self.weight)

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the weighted penalty of all factorized layers, a scalar."""
        return self.weight * over_spectra(model, lambda S: S.sum(-1))
