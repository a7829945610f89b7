"""Singular values of convolutions as operators on images, and bounds on the largest; those of the folded kernel are other numbers."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor

from spectrim.analysis.operators import Convolution, apply, basis, each, of_group, operators_of
from spectrim.analysis.symbols import GRID, inputs_of, sampled_norm, slack, symbol_values, total_strides
from spectrim.errors import SettingError

Method = Literal["exact", "circular", "symbol"]
Bound = Literal["symbol", "unfoldings", "taps"]

DENSE_LIMIT = 2**25
"""Entries of the largest operator that is written out for ``method="exact"``: 256 MB, a minute of one core."""


def conv_singular_values(layer: Any, size: int | Sequence[int] = (), method: Method = "exact") -> Tensor:
    """Singular values of the operator that a convolution applies to inputs of `size`, descending, in float64.

    ``exact`` writes the operator out and decomposes it; a periodic one (circular padding to the same size) is block-diagonal in the Fourier
    basis, where the blocks are decomposed instead. ``circular`` takes any padding as circular: the symbol ``F(w) = sum_k K_k e^{i k w}``
    at the frequencies of the grid. ``symbol`` takes quantiles of its singular values over a finer grid, one for each that the operator
    has. Both are asymptotically right for zero padding, and cost a thousandth. With a stride ``F`` is the polyphase matrix
    ``out x (in stride...)``; groups are blocks; of a pair of factors the symbols are multiplied at each frequency, never the kernels.

    Args:
        layer: see `operators_of`.
        size: of the input along each axis, >= 1, or one number for all; nothing for a linear layer.
        method: see above; ``circular`` needs sizes divisible by the stride.

    Raises:
        LayerError: for a layer that is neither a convolution nor linear.
        SettingError: for a size that does not fit, or an operator of more than 2**25 entries to be written out.

    Examples:
        >>> average = Convolution(torch.full((1, 1, 3), 1 / 3), padding_mode="circular")
        >>> conv_singular_values(average, 4).round(decimals=3).tolist()  # |1 + 2 cos w| / 3 at w = 0, pi / 2, pi, 3 pi / 2
        [1.0, 0.333, 0.333, 0.333]

    Source: Sedghi, Gupta and Long, arXiv 1805.10408 (circular); Yi, arXiv 2006.07117 (the symbol and its quantiles).
    Deviation: stride by polyphase blocks, groups, and pairs of factors are ours.
    """
    if method not in get_args(Method):
        raise SettingError("conv_singular_values", "method", got=method, rule="'exact', 'circular' or 'symbol'")
    parts = operators_of(layer)
    sizes = _sizes(parts, size)
    if method == "symbol":
        return _quantiles(parts, sizes)
    strides = total_strides(parts)
    divides = all(n % s == 0 for n, s in zip(sizes, strides, strict=True))
    if method == "exact" and not (divides and all(part.periodic for part in parts)):
        return _written_out(parts, sizes)
    if not divides:
        rule, hint = f"divisible by the stride {strides}", "method='symbol' takes any size"
        raise SettingError("conv_singular_values", "size", got=sizes, rule=rule, hint=hint)
    return _sorted(symbol_values(parts, [n // s for n, s in zip(sizes, strides, strict=True)]))


def spectral_norm_bound(layer: Any, method: Bound = "symbol", grid: int = GRID) -> float:
    """Upper bound on the largest singular value of a convolution, for inputs of every size; circular ones divisible by the stride.

    ``symbol``: the largest ``||F(w)||`` on a grid of ``N`` points along each axis, divided by ``cos(pi d / (2 N))`` for each, ``d`` the
    degree of ``F`` along it: Riesz's lemma on ``|u^H F v|^2`` bounds what lies between the points. ``unfoldings``: ``sqrt(taps)`` times the
    smallest spectral norm of the kernel folded with each set of axes on the output side. ``taps``: ``sum_k ||K_k||``. The last two bound a
    pair by the product of its parts.

    Args:
        layer: see `operators_of`.
        method: see above; the first is at most 1 % above the supremum for three taps.
        grid: points along each axis for ``symbol``; more than the degree.

    Raises:
        LayerError: for a layer that is neither a convolution nor linear.
        SettingError: for another method, or a grid that is too coarse.

    Examples:
        >>> round(spectral_norm_bound(Convolution(torch.full((1, 1, 3), 1 / 3))), 3)  # the supremum is 1
        1.005
        >>> round(spectral_norm_bound(Convolution(torch.full((1, 1, 3), 1 / 3)), "taps"), 3)
        1.0

    Source: Yi, arXiv 2006.07117 (supremum of the symbol); Singla and Feizi, arXiv 1911.10258 (unfoldings).
    Deviation: what lies between the points is bounded, too.
    """
    if method not in get_args(Bound):
        raise SettingError("spectral_norm_bound", "method", got=method, rule="'symbol', 'unfoldings' or 'taps'")
    parts = operators_of(layer)
    if method != "symbol":
        crude = unfolding_norm if method == "unfoldings" else taps_norm
        return math.prod(crude(part) for part in parts)
    return float(sampled_norm(parts, grid)) * slack(parts, grid)


def operator_norm(layer: Any, size: int | Sequence[int] = (), tol: float = 1e-9) -> float:
    """Largest singular value of the operator on inputs of `size`, by Lanczos iterations: for operators too large to write out.

    Args:
        layer: see `operators_of`.
        size: of the input along each axis, or one number for all.
        tol: relative; the value converges from below.

    Examples:
        >>> kernel = torch.tensor([[[1.0, 2.0, 1.0]]])
        >>> round(operator_norm(kernel, 5), 6)  # 2 + 2 cos(pi / 6): a Toeplitz matrix with three diagonals
        3.732051
    """
    parts = operators_of(layer)
    shape = (inputs_of(parts), *_sizes(parts, size))

    def forward(x: Tensor) -> Tensor:
        return apply(parts, x.reshape(1, *shape)).flatten()

    zero = torch.zeros(math.prod(shape), dtype=torch.float64)
    count = forward(zero).numel()
    pull: Any = torch.func.vjp(forward, zero)[1]

    def times(x: Any) -> Any:
        return forward(torch.as_tensor(x.ravel())).numpy()

    def back(y: Any) -> Any:
        return pull(torch.as_tensor(y.ravel()))[0].numpy()

    if min(count, len(zero)) <= 2:
        return float(conv_singular_values(layer, size)[0])
    operator: Any = LinearOperator((count, len(zero)), matvec=times, rmatvec=back, dtype="float64")
    start = torch.randn(min(count, len(zero)), generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    return float(svds(operator, k=1, tol=tol, v0=start, return_singular_vectors=False)[0])


def _sizes(parts: Sequence[Convolution], size: int | Sequence[int]) -> tuple[int, ...]:
    """Return the size along each axis of the layer."""
    axes = parts[0].axes
    sizes = each(size, axes)
    if len(sizes) != axes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        rule = f"{axes} integers >= 1, one for each axis, or one for all" if axes else "nothing for a linear layer"
        raise SettingError("conv_singular_values", "size", got=size, rule=rule)
    return sizes


def _sorted(values: Tensor) -> Tensor:
    return values.flatten().sort(descending=True).values


def _written_out(parts: Sequence[Convolution], sizes: Sequence[int]) -> Tensor:
    """Decompose the operator itself, group by group."""
    groups = parts[0].groups
    ones = basis(1, sizes)[:1].expand(1, inputs_of(parts), *sizes)
    inputs = math.prod(ones.shape) // groups
    entries = inputs * max(inputs, apply(parts, ones).numel() // groups)
    if entries > DENSE_LIMIT:
        hint = "use method='circular' or 'symbol', or operator_norm for the largest value"
        raise SettingError("conv_singular_values", "size", got=tuple(sizes), rule=f"one with at most {DENSE_LIMIT} entries", hint=hint)
    units = basis(inputs_of(parts) // groups, sizes)
    return _sorted(torch.cat([torch.linalg.svdvals(apply(of_group(parts, g), units).flatten(1)) for g in range(groups)]))


def _quantiles(parts: Sequence[Convolution], sizes: Sequence[int]) -> Tensor:
    """Return as many quantiles of the symbol's singular values as the operator has values."""
    groups, strides = parts[0].groups, total_strides(parts)
    inputs = inputs_of(parts) * math.prod(sizes)
    outputs = apply(of_group(parts, 0), basis(1, sizes)[:1].expand(1, inputs_of(parts) // groups, *sizes)).numel() * groups
    grid = [max(GRID, 4 * -(-n // s)) for n, s in zip(sizes, strides, strict=True)]
    values = _sorted(symbol_values(parts, grid))
    count = min(inputs, outputs)
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count * len(values)
    return values[places.long()]


def unfolding_norm(part: Convolution) -> float:
    """Return ``sqrt(taps)`` times the smallest spectral norm over all foldings of the kernel into a matrix."""
    kernel, axes = part.blocks(), part.axes
    norms = []
    for chosen in range(2**axes):
        out_side = [3 + a for a in range(axes) if chosen >> a & 1]
        in_side = [3 + a for a in range(axes) if not chosen >> a & 1]
        rows = len(out_side) + 1
        folded = kernel.permute(0, 1, *out_side, 2, *in_side)
        matrix = folded.reshape(part.groups, math.prod(folded.shape[1 : 1 + rows]), -1)
        norms.append(torch.linalg.matrix_norm(matrix, 2).max())
    return math.sqrt(math.prod(kernel.shape[3:])) * float(min(norms))


def taps_norm(part: Convolution) -> float:
    """Return ``sum_k ||K_k||``, the largest over groups."""
    taps = part.blocks().flatten(3) if part.axes else part.blocks().unsqueeze(3)
    return float(torch.linalg.matrix_norm(taps.movedim(3, 1), 2).sum(1).max())
