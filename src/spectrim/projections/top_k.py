"""`TopK`: at most so many entries are not zero."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.projections.counts import check_keep, count_of, largest
from spectrim.projections.positions import position_bits
from spectrim.protocols import Bits


@dataclass(frozen=True)
class TopK:
    """Keep the entries of largest magnitude, exactly so many, and set all others to zero.

    Args:
        keep: a count (an integer >= 1; all entries where there are fewer), or a fraction (a float in (0, 1]) of which the largest whole
            number of entries is kept, at least one.

    Raises:
        SettingError: for anything else.

    Examples:
        >>> TopK(2)(torch.tensor([[3.0, -1.0], [1.0, -4.0]]))
        tensor([[ 3.,  0.],
                [ 0., -4.]])
        >>> TopK(0.5).stored_bits(torch.tensor([3.0, 0.0, 0.0, -4.0]))
        Bits(data=64, index=4)
    """

    keep: int | float

    def __post_init__(self) -> None:
        check_keep("TopK", self.keep)

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the nearest tensor with that many entries that are not zero; equal magnitudes: the first are kept."""
        flat = tensor.flatten()
        return torch.where(largest(flat.abs(), count_of(self.keep, flat.numel())), flat, 0).reshape(tensor.shape)

    def things(self, tensor: Tensor) -> int:
        """Return of how many things `keep` is a count or a fraction: entries."""
        return tensor.numel()

    def stored(self, tensor: Tensor) -> tuple[int, int]:
        """Return how many values of a member are stored, and the bits of their positions."""
        return int(tensor.count_nonzero()), position_bits(tensor != 0)

    def stored_bits(self, tensor: Tensor) -> Bits:
        """Return the stored bits of a member: its values in their dtype, and their positions."""
        values, index = self.stored(tensor)
        return Bits(values * 8 * tensor.element_size(), index)
