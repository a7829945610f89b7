"""The bits that positions take: of the entries that are not zero, among all."""

import math

import torch
from jaxtyping import Bool
from torch import Tensor


def gap_bits(mask: Bool[Tensor, "..."], width: int) -> int:
    """Return the bits of all positions as gaps of `width` bits: the number of skipped entries before each one that is kept.

    The largest code means "skip that many, nothing here", as often as needed.

    Args:
        mask: True for what is kept, in the order of memory.
        width: bits of a code, >= 1.

    Examples:
        >>> gap_bits(torch.tensor([False, True, False, False, False, False, True]), 2)  # codes 1; 3, 1
        6

    Source: relative indices as in Han, Mao and Dally, arXiv 1510.00149, section 2.
    Deviation: there a filler is a zero among the values; an escape code needs no value, so that values without a zero level work, too.
    """
    kept = mask.flatten().nonzero().flatten()
    if not len(kept):
        return 0
    before = torch.cat([kept.new_tensor([-1]), kept[:-1]])
    escapes = (kept - before - 1) // (2**width - 1)
    return width * (len(kept) + int(escapes.sum()))


def position_bits(mask: Bool[Tensor, "..."]) -> int:
    """Return the bits of the positions of what is kept, in the shortest plain way: gaps of the best width, or one bit for each entry.

    Nothing is needed where all or none are kept. An entropy coder may take fewer, see `entropy_bits`.

    Examples:
        >>> position_bits(torch.ones(5, dtype=torch.bool)), position_bits(torch.tensor([True, False, True, True]))
        (0, 4)
    """
    kept, total = int(mask.sum()), mask.numel()
    if kept in (0, total):
        return 0
    return min(total, *(gap_bits(mask, width) for width in range(1, max(2, total.bit_length() + 1))))


def entropy_bits(mask: Bool[Tensor, "..."]) -> float:
    """Return ``n H(k / n)``, the bits of the positions under an ideal coder that knows the density alone.

    Examples:
        >>> entropy_bits(torch.tensor([True, False, False, True]))
        4.0
    """
    kept, total = int(mask.sum()), mask.numel()
    shares = [part / total for part in (kept, total - kept) if part]
    return -total * sum(share * math.log2(share) for share in shares) if len(shares) > 1 else 0.0
