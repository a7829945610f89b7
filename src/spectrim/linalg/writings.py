"""What a weight of rank r costs in each of its writings, and which one is the cheapest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.errors import SettingError
from spectrim.linalg.interpolative import Interpolation, Side, interpolate

Name = Literal["dense", "columns", "rows", "pair"]
Unit = Literal["params", "macs"]

WRITINGS: dict[str, tuple[Name, ...]] = {
    "linear": ("dense", "rows", "columns", "pair"),
    "pointwise": ("dense", "rows", "columns", "pair"),
    "convolution": ("dense", "rows", "pair"),
    "channels first": ("dense", "columns", "pair"),
    "embedding": ("dense", "columns", "pair"),
    "spatial": ("dense", "pair"),
}
"""By kind of layer, its writings in the order in which one is preferred at equal cost.

``linear``: also attention projections and recurrent input weights, whose outputs and inputs are plain axes. ``pointwise``: a convolution
of kernel size one. ``convolution``: ``out x (in * taps)``, also transposed: whole output channels can be kept, input channels cannot.
``channels first``: ``(out * taps) x in``, a convolution of kernel size one before the taps: input channels can be kept. ``embedding``:
``(count, width)``: columns are kept, as a look-up has no rows to mix. ``spatial``: what is kept would be single taps of a channel, which
no plain convolution gives.
"""


@dataclass(frozen=True)
class Uses:
    """How often one example applies each entry of a weight's pieces: rows of a linear layer, positions of a convolution.

    Attributes:
        right: what stands on the input side, ``(r, n)`` of the pair.
        left: what stands on the output side, ``(m, r)``; 0 for an embedding, which looks it up.
        dense: the dense weight; as `right` when omitted.
    """

    right: float = 1.0
    left: float = 1.0
    dense: float | None = None


@dataclass(frozen=True)
class Price:
    """What one writing costs.

    Attributes:
        params: stored coefficients.
        macs: multiply-accumulates of one example.
    """

    params: int
    macs: float


def prices(out: int, in_: int, rank: int, *, kind: str = "linear", blocks: int = 1, uses: Uses | None = None) -> dict[Name, Price]:
    """Return what each writing of a weight costs, in the order in which they are preferred at equal cost.

    ``dense: m n``; ``pair: r (m + n)``; ``rows`` and ``columns``: ``r (m + n - r)``, which is never more than dense; for each block.

    Args:
        out: rows of the matrix (of one block), ``m``.
        in_: its columns, ``n``.
        rank: in ``[1, min(out, in_)]``.
        kind: a key of `WRITINGS`.
        blocks: number of blocks of a grouped convolution.
        uses: for multiply-accumulates.

    Examples:
        >>> {name: price.params for name, price in prices(64, 64, 40).items()}
        {'dense': 4096, 'rows': 3520, 'columns': 3520, 'pair': 5120}
    """
    _check(out, in_, rank, kind)
    uses = uses or Uses()
    dense = uses.right if uses.dense is None else uses.dense
    parts: dict[Name, list[tuple[int, float]]] = {
        "dense": [(out * in_, dense)],
        "pair": [(rank * in_, uses.right), (out * rank, uses.left)],
        "rows": [(rank * in_, uses.right), ((out - rank) * rank, uses.left)],
        "columns": [(rank * (in_ - rank), uses.right), (out * rank, uses.left)],
    }
    counted: dict[Name, Price] = {}
    for name in WRITINGS[kind]:
        sizes = parts[name]
        counted[name] = Price(blocks * sum(size for size, _ in sizes), float(blocks * sum(size * times for size, times in sizes)))
    return counted


def cheapest(prices: dict[Name, Price], unit: Unit = "params", least_gain: float = 0.0) -> Name:
    """Return the cheapest writing; the first of those that cost the same.

    Args:
        prices: of `prices`.
        unit: what is counted.
        least_gain: fraction of the pair's cost that an interpolative writing must save to be taken instead of it, in [0, 1): at small
            ranks it saves next to nothing, ``r / (m + n)``, and concatenating its pieces takes time.

    Examples:
        >>> cheapest(prices(64, 64, 40)), cheapest(prices(64, 64, 64)), cheapest(prices(64, 64, 4), least_gain=0.05)
        ('rows', 'dense', 'pair')
    """
    cost = {name: float(getattr(price, unit)) for name, price in prices.items()}
    for name in ("rows", "columns"):
        if name in cost and cost[name] > (1 - least_gain) * cost["pair"]:
            del cost[name]
    return min(cost, key=lambda name: cost[name])


def window_bound(dtype: torch.dtype) -> float:
    """Return the largest ``|T|`` of a window that is taken without a look at pivots: 32, in half precision 4.

    Coefficients multiply the rounding of what they mix. In float32 a bound of 32 leaves a relative error of some 1e-6; bfloat16 has no
    digits to give.
    """
    return 32.0 if torch.finfo(dtype).bits >= 32 else 4.0


@dataclass(frozen=True, eq=False)
class Writing:
    """How to write one weight.

    Attributes:
        name: ``dense``, ``pair``, ``rows`` or ``columns``.
        price: what it costs.
        positions: stored int32 positions, beside the parameters: 0 unless pivots are free.
        interpolation: its parts, for rows and columns.
    """

    name: Name
    price: Price
    positions: int = 0
    interpolation: Interpolation | None = None


def write(
    U: Float[Tensor, "*blocks out rank"],
    Vh: Float[Tensor, "*blocks rank in_"],
    S: Float[Tensor, "*blocks rank"] | None = None,
    *,
    kind: str = "linear",
    dtype: torch.dtype = torch.float32,
    unit: Unit = "params",
    uses: Uses | None = None,
    bound: float | None = None,
    pivots: bool = True,
    least_gain: float = 0.0,
) -> Writing:
    """Choose the cheapest writing of ``U diag(S) Vh`` that is accurate enough, and compute it.

    Of rows and columns at the same cost the one whose window at either end is within the bound, rows first; then any window within it; free
    pivots where there is none; then the cheaper one of the pair and the dense layer.

    Args:
        U: left factor.
        Vh: right factor.
        S: of either sign; ones when omitted.
        kind: a key of `WRITINGS`.
        dtype: in which the parts will be stored.
        unit: what is counted.
        uses: for multiply-accumulates.
        bound: of ``|T|``, positive; `window_bound` of `dtype` when omitted.
        pivots: whether a writing with free pivots, which needs a gather, may be taken.
        least_gain: see `cheapest`.

    Returns:
        The writing; its cost is that of `cheapest` unless only a gather would do and is not allowed.

    Examples:
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> found = write(torch.randn(64, 40), torch.randn(40, 64))
        >>> found.name, found.price.params, found.interpolation.growth <= 32
        ('rows', 3520, True)
    """
    *blocks, out, rank = U.shape
    listed = prices(out, Vh.shape[-1], rank, kind=kind, blocks=torch.Size(blocks).numel(), uses=uses)
    limit = window_bound(dtype) if bound is None else bound
    if not limit > 0:
        raise SettingError("write", "bound", got=bound, rule="positive")
    best = cheapest(listed, unit, least_gain)
    if best in ("rows", "columns"):
        least = getattr(listed[best], unit)
        level: list[Side] = [name for name in listed if (name == "rows" or name == "columns") and getattr(listed[name], unit) <= least]
        if (form := _interpolated(U, Vh, S, level, limit, pivots)) is not None:
            positions = 0 if form.order is None else form.order.numel()
            return Writing(form.side, listed[form.side], positions, form)
        best = cheapest({name: price for name, price in listed.items() if name in ("dense", "pair")}, unit)
    return Writing(best, listed[best])


def _interpolated(U: Tensor, Vh: Tensor, S: Tensor | None, sides: Sequence[Side], bound: float, pivots: bool) -> Interpolation | None:
    """Return a window within the bound, best at an end; else free pivots, if they may be."""
    windows = []
    for side in sides:
        form = interpolate(U, Vh, S, side=side, bound=bound)
        if form.growth <= bound:
            if _at_an_end(form):
                return form
            windows.append(form)
    if windows:
        return windows[0]
    if pivots:
        form = interpolate(U, Vh, S, side=sides[0], pivots=True)
        return form if form.growth <= bound else None
    return None


def _at_an_end(form: Interpolation) -> bool:
    return form.start in (0, form.mix.shape[-2 if form.side == "rows" else -1])


def _check(out: int, in_: int, rank: int, kind: str) -> None:
    if kind not in WRITINGS:
        raise SettingError("prices", "kind", got=kind, rule=f"one of {', '.join(WRITINGS)}")
    if not 1 <= rank <= min(out, in_):
        raise SettingError("prices", "rank", got=rank, rule=f"in [1, {min(out, in_)}]")
