"""Rounding to equally spaced levels between the smallest and the largest value, and the gradient of the number of bits."""

import math
from typing import Any

import torch
from torch import Tensor

EXACT = 32
"""Bits from which on nothing is rounded."""


def on_grid(x: Tensor, bits: int, *, by_row: bool = False, stochastic: bool = False) -> Tensor:
    """Return the nearest of ``2^bits`` equally spaced values, ``min + k (max - min) / (2^bits - 1)``; smallest and largest value stay.

    Args:
        x: of any shape; computed with in float32 at least.
        bits: at least 1; `EXACT` and more return `x` itself.
        by_row: a separate range for each entry of the first axis, instead of one for the tensor.
        stochastic: go to one of the two neighbors at random, so that the mean is `x`; draws from torch's global generator.

    Examples:
        >>> on_grid(torch.tensor([0.0, 0.3, 0.9, 3.0]), 2)
        tensor([0., 0., 1., 3.])
    """
    if bits >= EXACT or not x.numel():
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rows = wide.reshape(len(wide), -1) if by_row and wide.dim() else wide.reshape(1, -1)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    most = 2**bits - 1
    step = ((high - low) / most).clamp(min=torch.finfo(wide.dtype).tiny)
    codes = (rows - low) / step
    codes = (codes + torch.rand_like(codes)).floor() if stochastic else codes.round()
    return torch.addcmul(low, codes.clamp(max=most), step).reshape(x.shape).to(x.dtype)


class Rounded(torch.autograd.Function):
    """`on_grid`, straight through for what is rounded, with a gradient for the bits.

    The step ``s = (max - min) / (2^b - 1)`` of a value ``Q(x) = min + s round((x - min) / s)`` has ``ds/db = -s ln2 2^b / (2^b - 1)``. With
    the residual of rounding held fixed, ``dL/db = -ln2 2^b / (2^b - 1) sum g (Q(x) - x)``, whatever the ranges of the rows.

    Source: Yu et al., arXiv 2203.07713; the formula is that of the quantizer in GATECH-EIC/ViTALiTy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor, bits: int, by_row: bool) -> Tensor:
        """Round `x`; `slope` is a scalar that gets the gradient of the bits."""
        rounded = on_grid(x, bits, by_row=by_row)
        ctx.factor, ctx.dtype, ctx.device = -math.log(2) * 2**bits / (2**bits - 1), slope.dtype, slope.device
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(rounded - x)
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Pass the gradient on, and sum what it is along the error of rounding."""
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None
        (error,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        slope = ctx.factor * (grad.to(wide) * error.to(wide)).sum()
        return grad, slope.to(ctx.device, ctx.dtype), None, None


class RoundedGradient(torch.autograd.Function):
    """The identity, whose gradient is rounded stochastically on its way back, with one range for the tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        """Return `x`."""
        ctx.bits = bits
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Round the gradient."""
        return on_grid(grad, ctx.bits, stochastic=True), None
