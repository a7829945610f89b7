"""Smooth measures of rank as penalties: entropy of the spectrum, logarithm of the determinant, Schatten quasi-norm."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.penalties.sparsity import over_spectra
from spectrim.penalties.sums import check_positive, check_weight


def effective_rank(S: Tensor, eps: float) -> Tensor:
    """Return ``exp(-sum p ln(p + eps))`` with ``p = S / sum S`` of non-negative rows ``(blocks, rank)``; 1 for a row of zeros.

    Rows are scaled by their largest value first; one so small that its gradient would overflow is treated as zeros.
    """
    largest = S.detach().amax(dim=-1, keepdim=True)
    zero = largest < torch.finfo(S.dtype).tiny * S.shape[-1]
    S = torch.where(zero, torch.ones_like(S), S) / torch.where(zero, 1.0, largest)
    p = S / S.sum(-1, keepdim=True)
    rank = torch.exp(-(p * (p + eps).log()).sum(-1))
    return torch.where(zero.squeeze(-1), 1.0, rank)


@dataclass(frozen=True)
class EffectiveRank:
    """``weight * sum_l (exp(H_l) - 1)``, ``H_l = -sum_k p_k ln(p_k + eps)`` the entropy of ``p = |S_l| / sum |S_l|``: scale-free.

    ``exp(H)`` is the effective rank: 1 when one singular value is left, the rank when all are equal. The derivative of ``-p ln p`` grows
    without bound at zero; `eps` bounds it.

    Args:
        weight: strength, >= 0.
        eps: in the logarithm, in (0, 0.01]: shares of the spectrum far below it are no longer pushed harder. With it the value is lower
            by at most ``rank * eps * exp(H)``; it is never below zero.

    Raises:
        SettingError: for a setting outside its range.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight.data = torch.diag(torch.tensor([3.0, 3.0]))
        >>> round(EffectiveRank(1.0)(factorize(layer)).item(), 4)  # two equal values: 2 - 1
        1.0

    Source: Roy and Vetterli, EUSIPCO 2007 (the measure); as a penalty in the survey of Ou, Chen, Zhu and Liu, arXiv 2303.13635.
    Deviation: ``eps``.
    """

    weight: float
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_weight(self, self.weight)
        if not 0 < self.eps <= 0.01:
            raise SettingError("EffectiveRank", "eps", got=self.eps, rule="a number in (0, 0.01]")

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the weighted penalty of all factorized layers, a scalar."""
        return self.weight * over_spectra(model, lambda S: (effective_rank(S, self.eps) - 1).clamp(min=0))


@dataclass(frozen=True)
class LogDeterminant:
    """``weight * sum_l sum_k ln(1 + |S_lk| / scale)``: each value counts by its order of magnitude, so that small ones are pushed hardest.

    Its gradient ``1 / (scale + |S|)`` is that of `L1` near zero, and falls for values that stay.

    Args:
        weight: strength, >= 0.
        scale: > 0, in the unit of the singular values: those far below it count as with ``L1``, those far above hardly change.

    Raises:
        SettingError: for a setting outside its range.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
        >>> round(LogDeterminant(1.0, scale=1.0)(factorize(layer)).item(), 4)  # ln(4) + ln(2)
        2.0794

    Source: Fazel, Hindi and Boyd, ACC 2003 (log-det heuristic), of ``(W^T W)^(1/2) + scale I``.
    """

    weight: float
    scale: float = 0.1

    def __post_init__(self) -> None:
        check_weight(self, self.weight)
        check_positive(self, scale=self.scale)

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the weighted penalty of all factorized layers, a scalar."""
        return self.weight * over_spectra(model, lambda S: (S / self.scale).log1p().sum(-1))


@dataclass(frozen=True)
class Schatten:
    """``weight * sum_l sum_k ((|S_lk| + eps)^p - eps^p)``: between the rank (``p`` near 0) and the nuclear norm (``p = 1``).

    Args:
        weight: strength, >= 0.
        p: in (0, 1].
        eps: > 0, in the unit of the singular values: bounds the gradient at zero by ``p eps^(p - 1)``.

    Raises:
        SettingError: for a setting outside its range.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight.data = torch.diag(torch.tensor([9.0, 4.0]))
        >>> round(Schatten(1.0, p=0.5, eps=1e-8)(factorize(layer)).item(), 3)  # 3 + 2, less twice the root of eps
        5.0

    Source: Nie, Huang and Ding, AAAI 2012 (Schatten p-norm minimization).
    Deviation: the sum of the powers, without the root, smoothed by ``eps``.
    """

    weight: float
    p: float = 0.5
    eps: float = 1e-3

    def __post_init__(self) -> None:
        check_weight(self, self.weight)
        if not 0 < self.p <= 1:
            raise SettingError("Schatten", "p", got=self.p, rule="a number in (0, 1]")
        check_positive(self, eps=self.eps)

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the weighted penalty of all factorized layers, a scalar."""
        scale = float(self.weight * self.eps**self.p)
        return scale * over_spectra(model, lambda S: (self.p * (S / self.eps).log1p()).expm1().sum(-1))
