"""The penalties' formulas once more, independently and in float64: by the name of the method in its table."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def orthogonality(U: NDArray[Any], S: NDArray[Any], Vh: NDArray[Any]) -> float:
    r = len(S)
    return float((np.sum((U.T @ U - np.eye(r)) ** 2) + np.sum((Vh @ Vh.T - np.eye(r)) ** 2)) / r**2)


def spectrum(U: NDArray[Any], S: NDArray[Any], Vh: NDArray[Any]) -> NDArray[Any]:
    return np.linalg.svd(U * S @ Vh, compute_uv=False)


def shares(S: NDArray[Any]) -> NDArray[Any]:
    made: NDArray[Any] = np.abs(S) / np.abs(S).sum()
    return made


OF_FACTORS: dict[str, Callable[..., Any]] = {
    "Orthogonality": orthogonality,
    "Hoyer": lambda U, S, Vh: np.abs(S).sum() / np.sqrt((S**2).sum()) - 1,
    "HoyerSquare": lambda U, S, Vh: np.abs(S).sum() ** 2 / (S**2).sum() - 1,
    "L1": lambda U, S, Vh: np.abs(S).sum(),
    "EffectiveRank": lambda U, S, Vh: np.exp(-(shares(S) * np.log(shares(S) + 1e-6)).sum()) - 1,
    "LogDeterminant": lambda U, S, Vh: np.log(1 + np.abs(S) / 0.1).sum(),
    "Schatten": lambda U, S, Vh: (np.sqrt(np.abs(S) + 1e-3) - np.sqrt(1e-3)).sum(),
    "CumulativeShrinkage": lambda U, S, Vh: ((1 - (5 / 6) ** np.arange(1, len(S) + 1)) * np.sort(np.abs(S))[::-1]).sum(),
    "PolarHoyer": lambda U, S, Vh: spectrum(U, S, Vh).sum() ** 2 / (spectrum(U, S, Vh) ** 2).sum() - 1,
    "NuclearNorm": lambda U, S, Vh: spectrum(U, S, Vh).sum(),
    "FrobeniusDecay": lambda U, S, Vh: ((U * S @ Vh) ** 2).sum() / 2,
}
"""Value of one block ``U diag(S) Vh``."""


def nuclear_norm(W: Tensor, S: Tensor, polar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return S.sum(), polar, torch.zeros_like(W)


def polar_hoyer(W: Tensor, S: Tensor, polar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, squares = S.sum(), S.square().sum()
    return n**2 / squares - 1, 2 * n / squares * polar, -2 * n**2 / squares**2 * W


OF_DENSE: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "NuclearNorm": nuclear_norm,
    "PolarHoyer": polar_hoyer,
}
"""Value and the two terms of the gradient at a matrix with singular values ``S`` and a polar factor."""


def of_dense(method: str, W: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return value, gradient and the spectral norm of the gradient's first term, by the singular value decomposition."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    held = S.gt(1e-10 * S[0])  # the polar factor of a matrix of lower rank has that rank
    value, first, second = OF_DENSE[method](W.double(), S[held], U[:, held] @ Vh[held])
    return value, first + second, float(torch.linalg.matrix_norm(first, 2))
