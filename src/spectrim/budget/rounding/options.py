"""`Option`: one way to hold a weight that is rounded, and the way that costs least at a price of a bit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from spectrim.budget.rounding.curves import Curve


@dataclass(frozen=True)
class Option:
    """One way to hold a weight: as it is, or as two small ones of a rank.

    Attributes:
        rank: None for the weight as it is.
        curves: steps of the one weight or of the two.
        lost: distortion of the cut itself.
        factors: the two, ``(rank, in)`` and ``(out, rank)``.
        keep: share of the entries that may be other than zero.
        numbers: that are held.
    """

    rank: int | None
    curves: Sequence[Curve]
    lost: float = 0.0
    factors: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)
    keep: float = 1.0
    numbers: int = 0

    def bits(self, price: float) -> float:
        """Return the bits at the steps that are best at a price of a bit."""
        return sum(curve.bits[curve.best(price)] for curve in self.curves)

    def distortion(self, price: float) -> float:
        """Return the distortion at the steps that are best at a price of a bit."""
        return self.lost + sum(curve.distortions[curve.best(price)] for curve in self.curves)

    def cost(self, price: float) -> float:
        """Return distortion and price of all bits."""
        return self.distortion(price) + price * self.bits(price)


def best_at(options: Mapping[str, Sequence[Option]], price: float) -> dict[str, Option]:
    """Return the option of each weight that costs least at a price of a bit, which is one for all ranks and steps."""
    return {name: min(held, key=lambda option: option.cost(price)) for name, held in options.items()}
