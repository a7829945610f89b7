"""Polar factors by Newton-Schulz iterations."""

import math
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

POLAR_FLOOR = 1e-3
"""Smallest singular value, relative to the scale, that `polar_factor` is tuned to bring to one."""


@lru_cache(maxsize=64)
def polar_schedule(steps: int) -> tuple[tuple[float, float, float], ...]:
    """Coefficients ``a, b, c`` of the odd quintics ``a x + b x^3 + c x^5`` whose composition brings ``[POLAR_FLOOR, 1]`` nearest to one.

    Each is the best uniform approximation of one on the interval that the one before it left (Remez exchange: the error has equal size
    and alternating sign at both ends and at the two extrema), which is optimal for the composition.

    Source: Amsel, Persson, Musco and Gower, arXiv 2505.16932, theorem 3.1.
    """
    low, high = POLAR_FLOOR, 1.0
    schedule = []
    for _ in range(steps):
        if high - low < 0.01:  # the limit of a narrow interval about one
            schedule.append((15 / 8, -10 / 8, 3 / 8))
            continue
        points = np.linspace(low, high, 4)
        for _ in range(100):
            system = np.stack([points, points**3, points**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
            a, b, c, error = np.linalg.solve(system, np.ones(4)).tolist()
            root = math.sqrt(9 * b * b - 20 * a * c)
            points = np.array([low, math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c)), high])
        schedule.append((a, b, c))
        low, high = 1 - error, 1 + error
    return tuple(schedule)


def polar_factor(matrix: Float[Tensor, "*blocks out in_"], steps: int = 7) -> Float[Tensor, "*blocks out in_"]:
    """Return the orthonormal polar factor ``U Vh`` of ``U diag(S) Vh`` by matrix products alone, with the small Gram side inside.

    Each step applies a quintic to the singular values: ``X <- X (a I + b X^T X + c (X^T X)^2)``. The first also scales, by the eighth root
    of the sum of their eighth powers, which lies between the largest value and ``rank^(1/8)`` times it.

    With 7 steps every singular value above 1/1000 of that scale becomes one to 2e-9; with 6 to 1e-3; smaller ones become something in
    ``[0, 1)``, and zero stays zero. So the factor of a matrix of condition 400 and rank up to 1000 has an error (spectral norm) of 2e-9 in
    float64, and of 5e-5 at most in float32, where rounding is what counts; more with TF32 products.

    Args:
        matrix: float32 or float64.
        steps: number of quintics, >= 1; two products on the large side for each.

    Source: Amsel, Persson, Musco and Gower, arXiv 2505.16932, section 3 (the composition); Higham, "Functions of Matrices", section 8.6.
    Deviation: scaled by a Schatten norm that the first step computes anyway; no safety factor, as it runs in float32 at least.
    """
    X = matrix.mT if matrix.shape[-2] < matrix.shape[-1] else matrix
    largest = X.abs().amax((-2, -1), keepdim=True)
    X = X / torch.where(largest > 0, largest, 1.0)
    for step, (a, b, c) in enumerate(polar_schedule(steps)):
        gram = X.mT @ X
        square = gram @ gram
        if step == 0:
            norm = torch.linalg.matrix_norm(square, keepdim=True).sqrt().sqrt()
            scale = torch.where(norm > 0, norm, 1.0).reciprocal()
            X, gram, square = X * scale, gram * scale**2, square * scale**4
        polynomial = b * gram + c * square
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        X = X @ polynomial
    return X.mT if matrix.shape[-2] < matrix.shape[-1] else X


def retracted(A: Float[Tensor, "*blocks rows rank"]) -> Float[Tensor, "*blocks rows rank"]:
    """Return matrices with columns nearer to orthonormal ones: one Newton-Schulz step ``A (3 I - A^T A) / 2``.

    The defect ``||A^T A - I||`` falls to about three quarters of its square. Where it is 1 or more in the Frobenius norm, the step would
    not bring singular values nearer to one, and the polar factor is returned instead.

    Args:
        A: float32 or wider; lower precision is computed in float32. ``rows >= rank``.

    Examples:
        >>> A = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64)).Q * 1.01
        >>> bool((retracted(A).mT @ retracted(A) - torch.eye(4)).norm() < 0.001)
        True

    Source: Higham, "Functions of Matrices", section 8.3.
    """
    wide = A.detach().to(torch.promote_types(A.dtype, torch.float32))
    defect = wide.mT @ wide
    defect.diagonal(dim1=-2, dim2=-1).sub_(1)
    if bool((defect.square().sum((-2, -1)) < 1).all()):
        return (wide - 0.5 * wide @ defect).to(A.dtype)
    return polar_factor(wide).to(A.dtype)
