"""The weight of a given rank, and the bias, that fit one layer's outputs best: the regression of `correct`."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectrim import linalg
from spectrim.layers.weights import OneWeight
from spectrim.linalg.fold import leading
from spectrim.surgery.decompositions import unit_rows
from spectrim.surgery.side_by_side import _Met

CUTOFF = 1e-6
"""Directions of the inputs whose second moment is far below this share of its Frobenius norm keep the dense weight: they tell nothing."""


REFINEMENTS = 4
"""Solutions of the regularised equations that are added up, each for what the ones before have left."""


FLOOR = 1e-12
"""Added to the second moments of all inputs, as a share of the largest: above what rounding leaves of constant inputs when centered."""


@dataclass(frozen=True)
class Moments:
    """Of the inputs of one layer, dense ``x`` and present ``x~``, as rows of the channel fold: means over rows, in float64.

    Attributes:
        own: ``E[x~ x~^T]``, ``(blocks, in, in)``; less the means where the layer has a bias.
        cross: ``E[x x~^T]``, likewise.
        dense_mean: ``E[x]``, ``(blocks, in)``.
        own_mean: ``E[x~]``.
    """

    own: Tensor
    cross: Tensor
    dense_mean: Tensor
    own_mean: Tensor


def moments_of(layer: OneWeight, met: Iterable[_Met], outputs: int, most: float) -> Moments:
    """Add up over what a layer meets.

    Args:
        layer: of the corrected network.
        met: what it meets, each time it is called.
        outputs: of the layer, at one position.
        most: how many rows to look at each time, drawn among all; neighbors tell little more.
    """
    generator = torch.Generator().manual_seed(0)
    own = cross = dense_sum = own_sum = torch.zeros((), dtype=torch.float64)
    count = 0
    for x, shape, x_now in met:
        share = most * outputs / max(1, shape.numel())
        for pair in zip(layer.input_rows(x, shape, "channel"), layer.input_rows(x_now, shape, "channel"), strict=True):
            if share < 1:
                size = pair[0].shape[-2]
                drawn = torch.randperm(size, generator=generator)[: math.ceil(share * size)].to(x.device)
                rows, rows_now = (part.index_select(-2, drawn).double() for part in pair)
            else:
                rows, rows_now = (part.double() for part in pair)
            own, cross = own + rows_now.mT @ rows_now, cross + rows.mT @ rows_now
            dense_sum, own_sum = dense_sum + rows.sum(-2), own_sum + rows_now.sum(-2)
            count += rows.shape[-2]
    own, cross, dense_mean, own_mean = own / count, cross / count, dense_sum / count, own_sum / count
    floor = torch.diag_embed(FLOOR * own.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True).expand_as(own_mean))
    own, cross = own + floor, cross + floor  # in both: directions without inputs do not change the weight
    if layer.bias is not None:
        own = own - own_mean.unsqueeze(-1) * own_mean.unsqueeze(-2)
        cross = cross - dense_mean.unsqueeze(-1) * own_mean.unsqueeze(-2)
    return Moments(own, cross, dense_mean, own_mean)


def folded(layer: Any, original: Any) -> Tensor:
    """Return the weight that a layer had before the cut, in the channel fold, ``(blocks, out, in)``, in float64."""
    matrix: Tensor = layer.fold(original, "weight", original.weight.detach().double(), "channel")
    return matrix if matrix.dim() == 3 else matrix.unsqueeze(0)


def refit_(layer: Any, original: Any, dense: Tensor, moments: Moments, left: Tensor | None) -> bool:
    """Give one layer its best weight and bias, in place; ``dense`` is the original's weight, folded, ``(blocks, out, in)``.

    Returns:
        Whether the weight is another one.
    """
    factors = layer.factors_of("weight")
    held = _composed(layer, *factors.block_parts())
    wanted = dense @ moments.cross
    target = dense + _divided(wanted - dense @ moments.own, moments.own)
    candidates = (
        _of_columns(layer, wanted, target, moments, left)
        if layer.scheme != "channel"
        else [_truncated(factors.rank, target, moments.own, left)]
    )
    judged = left if layer.scheme == "channel" else None
    best, error = None, _error(held, wanted, moments.own, judged)
    for candidate in candidates:
        found = _error(_composed(layer, *candidate), wanted, moments.own, judged)
        if found < error:
            best, error = candidate, found
    with torch.no_grad():
        if best is not None:
            factors.set_(*best)
        if layer.bias is not None and original.bias is not None:
            weight = _composed(layer, *factors.block_parts())
            shift = dense @ moments.dense_mean.unsqueeze(-1) - weight @ moments.own_mean.unsqueeze(-1)
            layer.bias.copy_(original.bias.detach().double() + shift.flatten())
    return best is not None


def _error(weight: Tensor, wanted: Tensor, own: Tensor, left: Tensor | None) -> float:
    """Return the mean squared error of the output, in the metric `left`, less what no weight can change; ``wanted = W C_xx~``."""
    change = weight @ own - 2 * wanted
    return float(((change if left is None else left @ change) * weight).sum())


def _divided(right: Tensor, moment: Tensor) -> Tensor:
    """Return ``right @ moment^+``, where eigenvalues far below `CUTOFF` of the norm count as zero.

    By iterated Tikhonov regularisation: an eigenvalue ``s`` is inverted to ``(1 - (r / (s + r))^n) / s``, with ``r`` the ridge and ``n``
    `REFINEMENTS`. An eigendecomposition of thousands of inputs would take ten times as long.
    """
    moment = (moment + moment.mT) / 2
    ridge = (CUTOFF * torch.linalg.matrix_norm(moment)).clamp_min(torch.finfo(moment.dtype).tiny)[..., None, None]
    triangle = torch.linalg.cholesky(moment + ridge * torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device))
    solution = torch.zeros_like(right)
    for _ in range(REFINEMENTS):
        solution = solution + torch.cholesky_solve((right - solution @ moment).mT, triangle).mT
    return solution


Parts = tuple[Tensor, Tensor, Tensor]


def _truncated(rank: int, target: Tensor, metric: Tensor, left: Tensor | None) -> Parts:
    """Return the best approximation of `target` of that rank in the metrics of the inputs and, where given, the outputs.

    Without a metric of the outputs it is the projection of `target` onto the leading eigenvectors of ``T metric T^T``.
    """
    if left is not None and rank < min(target.shape[-2:]):
        X, _, Y = linalg.weighted_svd(*linalg.svd(target), left, metric)
        return unit_rows(X[..., :rank], Y[..., :rank, :])
    Q, R = torch.linalg.qr(target)  # of the smaller side
    gram = R @ metric @ R.mT
    basis = torch.linalg.eigh((gram + gram.mT) / 2).eigenvectors[..., -rank:]
    return unit_rows(Q @ basis, basis.mT @ R)


def _sizes(layer: Any) -> tuple[int, int, int, int]:
    """Return out and in of one block, and the taps of the first and of the second operation."""
    count = leading(layer.scheme, layer.kernel_size)
    taps = (math.prod(layer.kernel_size[:count]), math.prod(layer.kernel_size[count:]))
    return (layer.out_channels // layer.groups, layer.in_channels // layer.groups, *taps)


def _composed(layer: Any, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """Return the weight ``(blocks, out, in * k...)`` of factors in the layer's scheme."""
    matrix = U * S.unsqueeze(-2) @ Vh
    if layer.scheme == "channel":
        return matrix
    out, in_, height, width = _sizes(layer)
    return matrix.reshape(-1, out, width, in_, height).permute(0, 1, 3, 4, 2).reshape(-1, out, in_ * height * width)


def _of_columns(layer: Any, wanted: Tensor, target: Tensor, moments: Moments, metric: Tensor | None) -> list[Parts]:
    """Refit the second factor to the output, where it has taps: with the first one that is held, and with that of the truncation.

    With ``B`` the map from patches to the outputs of the first operation at each tap of the second one, ``L <- L + (W C_xx~ - L B C) B^T
    (B C B^T)^+``; ``wanted = W C_xx~``.
    """
    out, in_, height, width = _sizes(layer)
    factors = layer.factors_of("weight")
    folded = target.reshape(-1, out, in_, height, width).permute(0, 1, 4, 2, 3).reshape(-1, out * width, in_ * height)
    by_offset = moments.own.reshape(-1, in_ * height, width, in_ * height, width)
    columns = by_offset.diagonal(dim1=-3, dim2=-1).mean(-1)
    candidates = []
    for U, S, Vh in (factors.block_parts(), _truncated(factors.rank, folded, columns, metric)):
        rank, eye = S.shape[-1], torch.eye(width, dtype=Vh.dtype, device=Vh.device)
        left = (U * S.unsqueeze(-2)).reshape(-1, out, width * rank)
        B = torch.einsum("grm,bc->gbrmc", Vh, eye).reshape(-1, width * rank, in_ * height * width)
        seen = moments.own @ B.mT
        left = left + _divided(wanted @ B.mT - left @ (B @ seen), B @ seen)
        candidates.append(unit_rows(left.reshape(-1, out * width, rank), Vh))
    return candidates
