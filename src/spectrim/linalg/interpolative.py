"""A matrix of rank r in ``r (m + n - r)`` numbers: some of its rows or columns, and the coefficients that give the others."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.errors import SettingError

Side = Literal["rows", "columns"]

PIVOT_BOUND = 2.0
"""Largest ``|T|`` that free pivots leave: rows are exchanged until no entry is above it."""

SEARCH_FLOPS = 1e9
"""Floating-point operations that the search for a window may take in one matrix; at least 32 windows are tried."""

FINALISTS = 3
"""Windows whose coefficients are computed, of those with the smallest inverse."""


@dataclass(frozen=True, eq=False)
class Interpolation:
    """A matrix ``W`` of rank r as r of its own rows (or columns) and the coefficients of the others.

    Rows: ``W = P [I; mix] kept``. Columns: ``W = kept [I, mix] P``. The permutation ``P`` follows from `start` or `order`.

    Attributes:
        side: what is kept, rows or columns.
        kept: float64, ``(..., r, n)`` or ``(..., m, r)``; in the order in which they stand in ``W``.
        mix: float64, ``(..., m - r, r)`` or ``(..., r, n - r)``; the others in the order in which they stand in ``W``.
        start: first kept position of a cyclic window, the same in all blocks; None for free pivots.
        order: of free pivots, ``(..., m)`` or ``(..., n)``: the kept positions, ascending, then the others; None for a window.
        growth: the largest ``|mix|``; 0 where nothing is left to mix.
    """

    side: Side
    kept: Tensor = field(repr=False)
    mix: Tensor = field(repr=False)
    start: int | None
    order: Tensor | None = field(repr=False)
    growth: float

    @property
    def rank(self) -> int:
        """Number of kept rows or columns."""
        return self.kept.shape[-2 if self.side == "rows" else -1]

    @property
    def stored(self) -> int:
        """Number of stored coefficients: ``r (m + n - r)`` for each block; the positions of free pivots are not among them."""
        return self.kept.numel() + self.mix.numel()

    def positions(self) -> Tensor:
        """Return the kept positions, then the others: ``(m,)`` or ``(n,)``, with leading axes for the free pivots of blocks."""
        if self.order is not None:
            return self.order
        size = self.rank + self.mix.shape[-2 if self.side == "rows" else -1]
        assert self.start is not None
        return window_order(size, self.rank, self.start).to(self.kept.device)

    def matrix(self) -> Tensor:
        """Multiply out, ``(..., m, n)`` in float64."""
        axis = -2 if self.side == "rows" else -1
        others = self.mix @ self.kept if self.side == "rows" else self.kept @ self.mix
        whole, order = torch.cat([self.kept, others], axis), self.positions().argsort(-1)
        if order.dim() == 1:
            return whole.index_select(axis, order)
        return whole.gather(axis, order.unsqueeze(-1 if axis == -2 else -2).expand(whole.shape))

    def rounding(self, dtype: torch.dtype) -> float:
        """Bound ``||W - stored W||_F / ||W||_F`` when both parts are stored in `dtype` and nothing underflows.

        Entry by entry ``u |kept|`` for what is kept and ``(2 u + u^2) |mix| |kept|`` for the rest, ``u`` half the machine epsilon.

        Args:
            dtype: a floating-point type.
        """
        unit = torch.finfo(dtype).eps / 2
        kept, mix = self.kept.abs(), self.mix.abs()
        others = mix @ kept if self.side == "rows" else kept @ mix
        error = unit * torch.hypot(kept.norm(), (2 + unit) * others.norm())
        size = self.matrix().norm()
        return float(error / size) if size > 0 else 0.0


def interpolate(
    U: Float[Tensor, "*blocks out rank"],
    Vh: Float[Tensor, "*blocks rank in_"],
    S: Float[Tensor, "*blocks rank"] | None = None,
    *,
    side: Side = "rows",
    pivots: bool = False,
    bound: float = 32.0,
) -> Interpolation:
    """Write ``U diag(S) Vh`` as rows or columns of the product and the coefficients of the others; exact at every rank.

    Rows are chosen from an orthonormal basis of the columns of `U`, so that zeros in `S` and its signs do not matter; columns from one of
    the rows of `Vh`.

    Args:
        U: left factor; its columns need not be orthonormal.
        Vh: right factor; its rows need not be orthonormal.
        S: of either sign, zeros included; ones when omitted.
        side: whether rows or columns of the product are kept.
        pivots: keep any rows (a gather is then needed to apply it), ``|mix| <= 2``; else a contiguous, cyclic window.
        bound: of ``|mix|``: a window at the very start or end, which takes one piece less to apply, is taken where it is within
            the bound; otherwise the best one that was tried, even if it is above the bound: look at `Interpolation.growth`.

    Raises:
        SettingError: when the rank is above ``min(out, in)``, an entry is not finite, or `side` is neither of the two.

    Examples:
        >>> left, right = torch.tensor([[1.0], [2.0], [-1.0]]), torch.tensor([[3.0, 1.0]])
        >>> form = interpolate(left, right)
        >>> form.start, form.kept.tolist(), form.mix.round(decimals=12).tolist(), form.stored
        (0, [[3.0, 1.0]], [[2.0], [-1.0]], 4)

    Source: Cheng, Gimbutas, Martinsson and Rokhlin, "On the compression of low rank matrices", SIAM J. Sci. Comput. 26 (2005), theorem 3;
    as a format of layers: arXiv 2501.19090.
    Deviation: contiguous windows, whose coefficients are larger, instead of free pivots, which cost a gather at every call.
    """
    if side not in ("rows", "columns"):
        raise SettingError("interpolate", "side", got=side, rule="'rows' or 'columns'")
    left, right = U.detach().double(), Vh.detach().double()
    values = torch.ones(left.shape[:-2] + left.shape[-1:], dtype=left.dtype, device=left.device) if S is None else S.detach().double()
    _check(left, values, right)
    mirrored = side == "columns"
    if mirrored:
        left, right = right.mT, left.mT
    basis, right = torch.linalg.qr(left).Q, right * values.unsqueeze(-1)
    start, order = (None, free_pivots(basis)) if pivots else (_best_window(basis, bound), None)
    positions = window_order(basis.shape[-2], basis.shape[-1], start).to(left.device) if start is not None else order
    assert positions is not None
    mix = _coefficients(basis, positions)
    kept = _take(left, positions[..., : basis.shape[-1]]) @ right
    growth = float(mix.abs().max()) if mix.numel() else 0.0
    return Interpolation(side, kept.mT if mirrored else kept, mix.mT if mirrored else mix, start, order, growth)


def window_order(size: int, rank: int, start: int) -> Tensor:
    """Return the positions in the cyclic window from `start`, ascending, then the others, ascending.

    Examples:
        >>> window_order(5, 3, 4).tolist()
        [0, 1, 4, 2, 3]
    """
    inside = torch.zeros(size, dtype=torch.bool)
    inside[(start + torch.arange(rank)) % size] = True
    return torch.cat([inside.nonzero().flatten(), (~inside).nonzero().flatten()])


def free_pivots(basis: Float[Tensor, "*blocks size rank"]) -> Tensor:
    """Choose rows whose span holds all others with coefficients of at most `PIVOT_BOUND`: the kept ones, ascending, then the others.

    QR with column pivoting, then exchanges: each multiplies the volume of the kept rows by more than the bound.

    Args:
        basis: orthonormal columns, float64.

    Returns:
        ``(..., size)`` int64.

    Source: Gu and Eisenstat, SIAM J. Sci. Comput. 17 (1996), algorithm 4, with the rank given.
    """
    flat = basis.reshape(-1, *basis.shape[-2:])
    return torch.stack([_pivots(block) for block in flat]).reshape(basis.shape[:-1]).to(basis.device)


def _pivots(block: Tensor) -> Tensor:
    from scipy.linalg import qr  # here, because it takes long to import and few commands need it

    rank, block = block.shape[-1], block.cpu()
    order = torch.from_numpy(qr(block.mT.numpy(), mode="r", pivoting=True)[1]).long()
    mix = _coefficients(block, order)
    while mix.numel() and float(mix.abs().max()) > PIVOT_BOUND:
        row, column = divmod(int(mix.abs().argmax()), rank)
        _exchange(mix, row, column)
        order[rank + row], order[column] = order[column].clone(), order[rank + row].clone()
    return torch.cat([order[:rank].sort().values, order[rank:].sort().values])


def _exchange(mix: Tensor, row: int, column: int) -> None:
    """Let a row that was mixed and one that was kept change places, in place: one Gauss-Jordan step."""
    step = mix[row].clone()
    step[column] -= 1
    step /= mix[row, column].clone()
    mix -= torch.outer(mix[:, column].clone(), step)
    mix[row] = -step
    mix[row, column] += 1


def _best_window(basis: Tensor, bound: float) -> int:
    """Return the start of a window at either end that is within the bound, else that of the best window tried."""
    size, rank = basis.shape[-2:]
    if rank == size:
        return 0
    ends = _growths(basis, (0, size - rank))
    start = min(ends, key=lambda end: ends[end])
    if ends[start] <= bound:
        return start
    step = max(1, round(size / max(32, SEARCH_FLOPS / (2 * rank**3 * basis.shape[:-2].numel()))))
    tried = range(0, size, step)
    inverses = _inverse_norms(basis, tried)
    found = ends | _growths(basis, [tried[k] for k in inverses.argsort()[:FINALISTS].tolist()])
    return min(found, key=lambda start: found[start])


def _growths(basis: Tensor, starts: Sequence[int]) -> dict[int, float]:
    """Return the largest ``|mix|`` of each window."""
    orders = {start: window_order(basis.shape[-2], basis.shape[-1], start).to(basis.device) for start in starts}
    largest = {start: _coefficients(basis, order).abs().amax().nan_to_num(torch.inf) for start, order in orders.items()}
    return {start: float(value) for start, value in largest.items()}


def _inverse_norms(basis: Tensor, starts: Sequence[int]) -> Tensor:
    """Return for each window the Frobenius norm of the inverse of its block: with orthonormal columns ``||mix||_F^2 = norm^2 - rank``.

    Of several blocks the largest; infinite for singular ones.
    """
    size, rank = basis.shape[-2:]
    norms = []
    for start in starts:
        block = basis[..., (start + torch.arange(rank, device=basis.device)) % size, :]
        inverse, info = torch.linalg.inv_ex(block)
        norm = torch.linalg.matrix_norm(inverse).where(info == 0, torch.inf)
        norms.append(norm.amax().nan_to_num(torch.inf))
    return torch.stack(norms)


def _coefficients(basis: Tensor, order: Tensor) -> Tensor:
    """Return what gives the other rows from the first ``rank`` ones of `order`; infinite or nan where these are singular."""
    rank = basis.shape[-1]
    kept, others = _take(basis, order[..., :rank]), _take(basis, order[..., rank:])
    mix, info = torch.linalg.solve_ex(kept, others, left=False)
    found: Tensor = mix.where((info == 0)[..., None, None], torch.inf)
    return found


def _take(matrix: Tensor, rows: Tensor) -> Tensor:
    if rows.dim() == 1:
        return matrix.index_select(-2, rows)
    return matrix.gather(-2, rows.unsqueeze(-1).expand(*rows.shape, matrix.shape[-1]))


def _check(left: Tensor, values: Tensor, right: Tensor) -> None:
    rank, full = left.shape[-1], min(left.shape[-2], right.shape[-1])
    if not 1 <= rank <= full:
        raise SettingError("interpolate", "rank", got=rank, rule=f"in [1, {full}]", hint="give factors of the product's own rank")
    if not all(torch.isfinite(factor).all() for factor in (left, values, right)):
        raise SettingError("interpolate", "U, S, Vh", got="nan or infinity", rule="finite")
