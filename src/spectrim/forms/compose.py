"""The product `U diag(S) Vh` as one node of the graph."""

from typing import Any

import torch
from torch import Tensor


class Compose(torch.autograd.Function):
    """``U diag(S) Vh``; keeps the factors alone for the backward pass, no scaled copy of them, and is one node of the graph.

    ``dU = G Vh^T diag(S)``, ``dS = sum_rows(U * G Vh^T)``, ``dVh = diag(S) U^T G`` for the gradient ``G`` of the product.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
        """Return the product."""
        return (U * S.unsqueeze(-2)) @ Vh

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        """Keep the factors."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of the factors."""
        U, S, Vh = ctx.saved_tensors
        left = (grad @ Vh.mT.to(grad.dtype)).to(U.dtype)  # under autocast the product, and so `grad`, is in half precision
        right = (U.mT.to(grad.dtype) @ grad).to(Vh.dtype)
        return left * S.unsqueeze(-2), (U * left).sum(-2), S.unsqueeze(-1) * right
