"""`fingerprint`: numbers by which a change of tensors is seen, however it was made."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

FEW = 4096
"""Entries up to which tensors are taken together, and the ramp that they are multiplied with is kept: 32 KB."""


@torch.no_grad()
def fingerprint(tensors: Sequence[Tensor]) -> tuple[float, ...] | None:
    """Return numbers that change with any entry, however it was written (through ``.data`` too, which torch's version counters do not see).

    Args:
        tensors: of one weight.

    Returns:
        Products with rising weights, in float64; None where there are no values, or shards of them.

    Examples:
        >>> fingerprint([torch.ones(3)])
        (3.0,)
    """
    if tensors[0].is_meta or hasattr(tensors[0], "full_tensor"):
        return None
    flat = [tensor.flatten() for tensor in tensors]
    if sum(map(len, flat)) <= FEW:
        flat = [torch.cat(flat)]
    return tuple([float(torch.dot(entries.double(), _ramp(entries))) for entries in flat])


def _ramp(entries: Tensor) -> Tensor:
    return (_kept if len(entries) <= FEW else _made)(len(entries), entries.device)


def _made(count: int, device: torch.device) -> Tensor:
    return torch.linspace(0.5, 1.5, count, dtype=torch.float64, device=device)


_kept = lru_cache(maxsize=256)(_made)
