"""The weight of a given rank, and the bias, that fit one layer's outputs best: the regression of `correct`."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectrim.layers.weights import OneWeight
from spectrim.linalg.fold import leading
from spectrim.linalg.gram import MomentSum, precise
from spectrim.linalg.spectral import LEFT_FLOOR, metric_root
from spectrim.surgery.decompositions import unit_rows
from spectrim.surgery.side_by_side import _Met

CUTOFF = 1e-6
"""Directions of the inputs whose second moment is far below this share of its Frobenius norm keep the dense weight: they tell nothing."""


GROWTH = 4.0
"""A refitted weight has at most so many times the norm of the dense one."""


REFINEMENTS = 4
"""Solutions of the regularized equations that are added up, each for what the ones before have left."""

WIDE_TARGET = 2048
"""Convolutions with more taps in all, in the other schemes, take one solution: of the target only the rows of the first factor are used."""


FLOOR = 1e-12
"""Added to the second moments of all inputs, as a share of the largest: above what rounding leaves of constant inputs when centered."""


Parts = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Moments:
    """Of the outputs ``y`` of one layer in the dense network and its present inputs ``x~``, as rows of the channel fold, in float64.

    Attributes:
        own: ``E[x~ x~^T]``, ``(blocks, in, in)``; less the means where the layer has a bias.
        wanted: ``E[y x~^T]``, ``(blocks, out, in)``, likewise.
        wanted_mean: ``E[y]``, ``(blocks, out)``, the dense layer's bias included.
        own_mean: ``E[x~]``, ``(blocks, in)``.
    """

    own: Tensor
    wanted: Tensor
    wanted_mean: Tensor
    own_mean: Tensor


def rows_of(layer: OneWeight, met: Iterable[_Met], most: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows ``x~ (blocks, n, in)`` of a layer and ``y (blocks, n, out)`` for each part of what it meets.

    Args:
        layer: of the corrected network.
        met: what it meets, each time it is called.
        most: how many rows to look at each time, drawn among all; neighbors tell little more.
    """
    generator = torch.Generator().manual_seed(0)
    blocks, out = layer.factors_of("weight").blocks, folded_rows(layer)
    for y, x_now in met:
        wanted = _channels_last(layer, y, blocks, out)
        share, start = most / max(1, wanted.shape[-2]), 0
        for rows in layer.input_rows(x_now, y.shape, "channel"):
            size = rows.shape[-2]
            part = wanted[..., start : start + size, :]
            start += size
            if share < 1:
                drawn = torch.randperm(size, generator=generator)[: math.ceil(share * size)].to(rows.device)
                rows, part = rows.index_select(-2, drawn), part.index_select(-2, drawn)
            yield precise(rows), precise(part)


def folded_rows(layer: Any) -> int:
    """Return the outputs of one block of a layer in the channel fold."""
    out: int = layer.factors_of("weight").shape[0]
    return out if layer.scheme == "channel" else int(layer.out_channels // layer.groups)


def _channels_last(layer: Any, y: Tensor, blocks: int, out: int) -> Tensor:
    """Return the outputs of a layer as rows ``(blocks, n, out)``, in the order of `input_rows`."""
    axes = len(getattr(layer, "kernel_size", ()))
    if not axes:
        return y.reshape(1, -1, out)
    y = y if y.dim() == axes + 2 else y.unsqueeze(0)
    return y.reshape(len(y), blocks, out, -1).permute(1, 0, 3, 2).reshape(blocks, -1, out)


def moments_of(layer: OneWeight, met: Iterable[_Met], dense: Tensor, most: float, basis: Tensor | None = None) -> Moments:
    """Add up over what a layer meets.

    Args:
        layer: as for `rows_of`.
        met: as for `rows_of`.
        dense: the dense weight, ``(blocks, out, in)``; of what is looked at.
        most: as for `rows_of`.
        basis: what is looked at of the inputs, ``(blocks, seen, in)``; all of them when omitted.
    """
    centered, seen = layer.bias is not None, None if basis is None else lambda rows: rows @ basis.mT.to(rows)
    own, cross, total = MomentSum(shifted=True, seen=seen), torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    level: Tensor | None = None
    for rows, wanted in rows_of(layer, met, most):
        level = wanted.mean(-2, keepdim=True) if level is None else level  # single precision is for deviations
        rows, wanted = own.add(rows), wanted - level
        cross, total = cross + (wanted.mT @ rows).double(), total + wanted.sum(-2, dtype=torch.float64)
    assert level is not None
    assert own.shift is not None
    second, mean, shift, level = own.second(centered=centered).div_(own.count), own.mean, own.shift.double(), level.double()
    wanted_mean = total / own.count
    cross = cross / own.count - wanted_mean.unsqueeze(-1) * (mean.unsqueeze(-2) - shift)
    wanted_mean = wanted_mean + level.squeeze(-2)
    if not centered:
        cross = cross + wanted_mean.unsqueeze(-1) * mean.unsqueeze(-2)
    floor = FLOOR / own.count * own.diagonal().amax(-1)[..., None, None]
    _diagonal(second).add_(floor.squeeze(-1))
    return Moments(second, cross + floor * dense, wanted_mean, mean)  # directions without inputs do not change the weight


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def folded(layer: Any, original: Any) -> Tensor:
    """Return the weight that a layer had before the cut, in the channel fold, ``(blocks, out, in)``, in float64."""
    matrix: Tensor = layer.fold(original, "weight", original.weight.detach().double(), "channel")
    return matrix if matrix.dim() == 3 else matrix.unsqueeze(0)


def refit_(layer: Any, original: Any, dense: Tensor, moments: Moments, left: Tensor | None, basis: Tensor | None = None) -> bool:
    """Give one layer its best weight and bias, in place.

    Args:
        layer: of the network that is corrected.
        original: of the dense network.
        dense: the original's weight, folded, ``(blocks, out, in)``; of what is looked at.
        moments: of the layer.
        left: metric of the outputs.
        basis: what was looked at, for wide layers.

    Returns:
        Whether the weight is another one.
    """
    factors, wanted, own = layer.factors_of("weight"), moments.wanted, moments.own
    short = layer.scheme != "channel" and own.shape[-1] > WIDE_TARGET
    target = _toward(dense, wanted - dense @ own, own, 1 if short else REFINEMENTS)
    held = factors.block_parts()
    held = held if basis is None else (*held[:2], held[2] @ basis.mT)
    fits = (
        _of_rows(factors.rank, held, target, moments, left)
        if layer.scheme == "channel"
        else _of_columns(layer, held, target, moments, left)
    )
    errors, parts = zip(*fits, strict=True)
    better = min(range(len(errors)), key=errors.__getitem__)
    U, S, Vh = parts[better]
    if better:
        factors.set_(U, S, Vh if basis is None else Vh @ basis)
    _set_bias(layer, original, _composed(layer, *factors.block_parts()) if basis is None else _composed(layer, U, S, Vh), moments)
    return better > 0


@torch.no_grad()
def _set_bias(layer: Any, original: Any, weight: Tensor, moments: Moments) -> None:
    """Let the mean of the output be that of the dense layer; ``weight`` is the new one, of what was looked at."""
    if layer.bias is not None and original.bias is not None:
        layer.bias.copy_((moments.wanted_mean - (weight @ moments.own_mean.unsqueeze(-1)).squeeze(-1)).flatten())


def _error(left_factor: Tensor, cross: Tensor, gram: Tensor, metric: Tensor | None) -> float:
    """Return the mean squared error of the output, in the metric of the outputs, less what no weight can change.

    Of a weight ``L B``: ``cross`` is ``W C_xx~ B^T`` and ``gram`` is ``B C B^T``.
    """
    change = left_factor @ gram - 2 * cross
    return float(((change if metric is None else metric @ change) * left_factor).sum())


def _toward(start: Tensor, rest: Tensor, moment: Tensor, solutions: int = REFINEMENTS) -> Tensor:
    """Return ``start + rest @ moment^+``; with fewer directions of the inputs where the result would outgrow `start`.

    What few examples leave nearly undetermined would else be weights of any size, whose outputs cancel on these examples up to rounding.
    """
    most, found, cutoff = GROWTH * torch.linalg.vector_norm(start), start, CUTOFF
    while cutoff < 1:
        found = start + _divided(rest, moment, cutoff, solutions)
        if torch.linalg.vector_norm(found) <= most:
            break
        cutoff *= 10
    return found


def _divided(right: Tensor, moment: Tensor, cutoff: float, solutions: int) -> Tensor:
    """Return ``right @ moment^+``, where eigenvalues far below `cutoff` of the norm count as zero.

    By iterated Tikhonov regularization: an eigenvalue ``s`` is inverted to ``(1 - (r / (s + r))^n) / s``, with ``r`` the ridge and ``n``
    the number of `solutions`. What a solution ``X`` of the regularized equations leaves of the right side is ``r X``. An
    eigendecomposition of thousands of inputs would take ten times as long.
    """
    ridge = (cutoff * torch.linalg.matrix_norm(moment)).clamp_min(torch.finfo(moment.dtype).tiny)[..., None, None]
    triangle = moment.clone()  # of which the lower half is read
    _diagonal(triangle).add_(ridge.squeeze(-1))
    triangle = torch.linalg.cholesky(triangle)
    rest, solution = right.mT, torch.zeros((), dtype=right.dtype, device=right.device)
    for _ in range(solutions):
        step = torch.cholesky_solve(rest, triangle)
        rest, solution = ridge * step, solution + step
    return solution.mT


def truncated(rank: int, target: Tensor, metric: Tensor, left: Tensor | None) -> Parts:
    """Return the best approximation of `target` of that rank in the metrics of the inputs and, where given, the outputs.

    With ``R^T R`` the metric of the outputs it is ``R^-1 E E^T R target``, with ``E`` the leading eigenvectors of ``R T metric T^T R^T``.
    """
    if left is None and target.shape[-2] <= target.shape[-1]:
        basis = _leading(target @ metric @ target.mT, rank)
        return unit_rows(basis, basis.mT @ target)
    Q, core = torch.linalg.qr(target)  # of the smaller side
    root, inverse = metric_root(Q, left, LEFT_FLOOR)
    seen = core if left is None else root @ core
    basis = _leading(seen @ metric @ seen.mT, rank)
    return unit_rows(Q @ (basis if left is None else inverse @ basis), basis.mT @ seen)


def _leading(gram: Tensor, rank: int) -> Tensor:
    """Return the leading eigenvectors of a symmetric matrix."""
    vectors: Tensor = torch.linalg.eigh((gram + gram.mT) / 2).eigenvectors
    return vectors[..., -rank:]


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


def _of_rows(rank: int, held: Parts, target: Tensor, moments: Moments, metric: Tensor | None) -> list[tuple[float, Parts]]:
    """Return the parts that are held and the truncation of the target, each with its error."""
    fits = []
    for U, S, Vh in (held, truncated(rank, target, moments.own, metric)):
        cross, gram = moments.wanted @ Vh.mT, Vh @ moments.own @ Vh.mT
        fits.append((_error(U * S.unsqueeze(-2), cross, gram, metric), (U, S, Vh)))
    return fits


def _of_columns(layer: Any, held: Parts, target: Tensor, moments: Moments, metric: Tensor | None) -> list[tuple[float, Parts]]:
    """Return the parts that are held, and the second factor refitted to the output, each with its error.

    It is refitted where it has taps, with the first factor that is held and with that of the truncation. With ``B`` the map from patches
    to the outputs of the first operation at each tap of the second one, ``L <- L + (W C_xx~ - L B C) B^T (B C B^T)^+``;
    ``wanted = W C_xx~``.
    """
    out, in_, height, width = _sizes(layer)
    by_offset = moments.own.reshape(-1, in_ * height, width, in_ * height, width)
    columns = by_offset.diagonal(dim1=-3, dim2=-1).mean(-1)
    fits: list[tuple[float, Parts]] = []
    for U, S, Vh in (held, truncated(held[1].shape[-1], in_scheme(layer, target), columns, metric)):
        cross = _seen_by_taps(moments.wanted, Vh, width)
        gram = _seen_by_taps(_seen_by_taps(moments.own, Vh, width).mT, Vh, width).mT
        left = (U * S.unsqueeze(-2)).reshape(-1, out, width * S.shape[-1])
        if not fits:
            fits.append((_error(left, cross, gram, None), held))
        left = _toward(left, cross - left @ gram, gram)
        fits.append((_error(left, cross, gram, None), unit_rows(left.reshape(-1, out * width, S.shape[-1]), Vh)))
    return fits


def _seen_by_taps(rows: Tensor, Vh: Tensor, width: int) -> Tensor:
    """Return ``rows B^T``, ``(blocks, n, width * rank)``, of rows of patches ``(blocks, n, in * height * width)``.

    ``B`` maps patches to what the second operation meets at each of its taps.
    """
    by_taps = rows.reshape(*rows.shape[:-1], -1, width)
    return torch.cat([by_taps[..., tap] @ Vh.mT for tap in range(width)], -1)


def in_scheme(layer: Any, weight: Tensor) -> Tensor:
    """Return a weight ``(blocks, out, in * k...)`` in the layer's scheme, ``(blocks, out * width, in * height)``."""
    out, in_, height, width = _sizes(layer)
    return weight.reshape(-1, out, in_, height, width).permute(0, 1, 4, 2, 3).reshape(-1, out * width, in_ * height)
