"""Penalty that keeps singular vectors orthonormal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.layers import named_factors
from spectrim.layers.sharded import defect_of_shards, is_sharded, of_shards
from spectrim.penalties.sums import batches, check_every, check_weight, stack, total, unstack


def gram_defect(A: Tensor) -> Tensor:
    """Return ``A^T A - I`` of matrices ``(..., rows, rank)``."""
    gram = A.mT @ A
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return gram


class _Defect(torch.autograd.Function):
    """``sum ||A^T A - I||_F^2`` over matrices of one shape, with the gradient ``4 A (A^T A - I)``; saves only ``A^T A - I``."""

    @staticmethod
    def forward(*matrices: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(matrices[0].device.type, enabled=False):
            defect = gram_defect(stack(matrices))
        return defect.square().sum(), defect

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        *matrices, defect = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            if torch.is_grad_enabled():  # this gradient will be differentiated again
                defect = gram_defect(stack(matrices))
            return unstack(stack(matrices) @ (4 * grad * defect), [matrix.shape for matrix in matrices])


def defect_of(group: Sequence[Tensor]) -> Tensor:
    """Return ``sum ||A^T A - I||_F^2 / rank^2`` over matrices ``(..., rows, rank)`` of one shape."""
    value: Tensor = _Defect.apply(*group)[0]  # type: ignore[no-untyped-call]
    return value / group[0].shape[-1] ** 2


def sampled_defect_of(group: Sequence[Tensor], sample: float) -> Tensor:
    """Return an unbiased estimate of `defect_of` from a random fraction of the columns of ``A^T A - I``."""
    A, rank = stack(group), group[0].shape[-1]
    count = max(1, round(sample * rank))
    columns = torch.randperm(rank)[:count].to(A.device)
    with torch.autocast(A.device.type, enabled=False):
        defect = A.mT @ A[..., columns] - torch.eye(rank, dtype=A.dtype, device=A.device)[:, columns]
    return defect.square().sum() * (rank / count) / rank**2


@dataclass(frozen=True)
class Orthogonality:
    """``weight * sum_l (||U^T U - I||_F^2 + ||Vh Vh^T - I||_F^2) / r_l^2``, over layers and their blocks; in float32 at least.

    Factors of equal shape share one product, and the gradient is in closed form. For factors that are sharded over processes, Gram
    matrices are computed on the shards and summed.

    Args:
        weight: strength, >= 0. The paper uses 1.0 on CIFAR-10 and for the LSTM, 2.0 on ImageNet.
        sample: None for the exact penalty; or the fraction in (0, 1] of the columns of ``A^T A - I`` that is drawn at each call (from
            torch's global generator) for an unbiased estimate. For a wide layer and a batch with few rows the exact penalty costs as
            much as the layer; a sample of 1/8 costs about a fifth of that. The paper has no sampling.
        every: `fit` and the integrations add `every` times the penalty at each `every`-th optimizer step and nothing between: the same in
            the mean at a fraction of the cost. A call by hand returns the penalty as it is. The paper has 1.

    Raises:
        SettingError: for a negative or infinite strength, a fraction outside (0, 1], or `every` below 1.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> round(Orthogonality()(factorize(nn.Linear(4, 3))).item(), 6)
        0.0

    Source: Yang et al., arXiv 2004.09031, equation 3.
    """

    weight: float = 1.0
    sample: float | None = None
    every: int = 1

    def __post_init__(self) -> None:
        check_weight(self, self.weight)
        check_every(self, self.every)
        if self.sample is not None and not 0 < self.sample <= 1:
            raise SettingError("Orthogonality", "sample", got=self.sample, rule="a fraction in (0, 1], or None")

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the weighted penalty of all factorized layers, a scalar."""
        matrices = [matrix for _, factors in named_factors(model) for matrix in factors.sides()]
        groups = batches(matrix for matrix in matrices if not is_sharded(matrix))
        terms = [defect_of(group) if self.sample is None else sampled_defect_of(group, self.sample) for group in groups]
        return self.weight * total(model, [*terms, *(self._of_shards(matrix) for matrix in matrices if is_sharded(matrix))])

    def _of_shards(self, matrix: Tensor) -> Tensor:
        """Return the penalty of one sharded matrix; every process draws its own sample and gets the gradient of it."""
        matrix, sample = matrix.to(torch.promote_types(matrix.dtype, torch.float32)), self.sample
        if sample is None:
            return defect_of_shards(matrix) / matrix.shape[-1] ** 2
        return of_shards(lambda A: sampled_defect_of([A], sample), matrix)
