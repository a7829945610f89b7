"""Orders of hidden units that bring free pivots to the ends, so that no gather is needed to apply them."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from spectrim.errors import SettingError
from spectrim.linalg.interpolative import free_pivots


def end_order(first: Float[Tensor, "size rank"], last: Float[Tensor, "size other_rank"] | None = None) -> Int64[Tensor, " size"]:
    """Return an order of hidden units after which one weight's window at the start, and another's at the end, is well conditioned.

    Where nothing but elementwise operations lies between layers, their common units can stand in any order: the outputs of the up and gate
    projections of a feed-forward block, which are the inputs of its down projection; the outputs of a value projection within one head.
    Reorder them once, in the weights, and a window at an end has the coefficients of free pivots: at most `PIVOT_BOUND` for `first`. For
    `last` the choice is among the units that are left, and as good as these allow; with ranks that together exceed the size the two windows
    overlap.

    For a feed-forward block ``down(act(gate(x)) * up(x))`` with weights of which ``U`` and ``Vh`` are factors take
    ``end_order(Vh_down.mT)`` to write `down` by columns (no concatenation, no gather), or ``end_order(U_up, U_gate)`` to write the others
    by rows. Then ``U_up[order]``, ``U_gate[order]``, the biases of both ``[order]``, and ``Vh_down[:, order]`` give the same function,
    and `interpolate` finds the windows.

    Args:
        first: factor with a row for each unit, ``U`` of a layer whose outputs they are or ``Vh`` transposed of one whose inputs they are.
        last: the same of another layer.

    Returns:
        A permutation of the units: place ``k`` takes unit ``order[k]``.

    Raises:
        SettingError: when the two have another number of rows, or one has more columns than rows.

    Examples:
        >>> end_order(torch.tensor([[0.1], [0.2], [2.0], [0.3]]), torch.tensor([[0.0], [3.0], [0.0], [1.0]])).tolist()
        [2, 0, 3, 1]
    """
    for name, factor in (("first", first), ("last", last)):
        if factor is not None and (factor.shape[0] != first.shape[0] or factor.shape[1] > factor.shape[0]):
            raise SettingError("end_order", name, got=tuple(factor.shape), rule=f"of {first.shape[0]} rows and at most as many columns")
    order, rank = free_pivots(_basis(first)), first.shape[1]
    if last is None:
        return order
    basis, kept, others = _basis(last), order[:rank], order[rank:]
    if last.shape[1] <= len(others):
        chosen = _independent(basis[others], last.shape[1])
        return torch.cat([kept, others[~chosen], others[chosen]])
    span = torch.linalg.qr(basis[others].mT).Q  # all others are in the second window; some of the first join them
    left = basis[kept] - (basis[kept] @ span) @ span.mT
    chosen = _independent(left, last.shape[1] - len(others))
    return torch.cat([kept[~chosen], kept[chosen], others])


def _basis(factor: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(factor.detach().double()).Q
    return basis


def _independent(rows: Tensor, count: int) -> Tensor:
    """Mark the rows that QR with pivoting takes first."""
    from scipy.linalg import qr  # here, because it takes long to import and few commands need it

    marked = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    marked[torch.from_numpy(qr(rows.mT.cpu().numpy(), mode="r", pivoting=True)[1][:count]).long()] = True
    return marked
