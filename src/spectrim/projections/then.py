"""`Then`: prune, then round what is left."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spectrim.errors import SettingError
from spectrim.protocols import Bits


@dataclass(frozen=True)
class Then:
    """Prune, then round to levels what is left; zeros stay.

    With `TopK` and symmetric levels this is the nearest tensor of the set: the gain of keeping a value grows with its magnitude, so that no
    other positions are better, whatever the step.

    Args:
        first: a projection that prunes: `TopK`, `Structured` or `Tiles`.
        second: one that rounds: `Levels`, `PowersOfTwo` or `LevelTable`.

    Raises:
        SettingError: for another order or other projections.

    Examples:
        >>> import torch
        >>> from spectrim.projections import Levels, TopK
        >>> small = Then(TopK(3), Levels(2, zero=False))
        >>> small(torch.tensor([0.9, -0.2, -1.1, 2.0]))
        tensor([ 1.,  0., -1.,  2.])
        >>> small.stored_bits(torch.tensor([1.0, 0.0, -1.0, 2.0]))
        Bits(data=38, index=4)
    """

    first: Any
    second: Any

    def __post_init__(self) -> None:
        if isinstance(self.first, type) or not hasattr(self.first, "stored"):
            raise SettingError("Then", "first", got=self.first, rule="a projection that prunes: TopK, Structured or Tiles")
        if isinstance(self.second, type) or not hasattr(self.second, "width"):
            raise SettingError("Then", "second", got=self.second, rule="a projection that rounds: Levels, PowersOfTwo or LevelTable")

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return what the second makes of what the first leaves."""
        rounded: Tensor = self.second(self.first(tensor))
        return rounded

    def stored_bits(self, tensor: Tensor) -> Bits:
        """Return the stored bits of a member: a code for each value that is kept, the scales, and the positions."""
        values, index = self.first.stored(tensor)
        return Bits(values * self.second.width + self.second.scale_bits(tensor), index)
