"""Rank rules: from one layer's spectrum to its rank. `METHODS` is the table that contract tests and docs read."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from spectrim.errors import SettingError
from spectrim.linalg.spectral import rank_at_energy
from spectrim.protocols import RankRule
from spectrim.tables import Row


@dataclass(frozen=True)
class Energy:
    """The smallest rank that keeps the fraction `keep` of the sum of squared singular values.

    Args:
        keep: in (0, 1]; 1 cuts only singular values that are exactly zero. The paper's threshold ``e`` is ``1 - keep``.

    Raises:
        SettingError: for a fraction outside (0, 1].

    Examples:
        >>> import torch
        >>> Energy(keep=0.9)(torch.tensor([3.0, 1.0, 0.1]))
        2

    Source: Yang et al., arXiv 2004.09031, section 3.3.
    """

    keep: float

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise SettingError("Energy", "keep", got=self.keep, rule="a fraction in (0, 1]", hint="for 90 % write keep=0.9")

    def __call__(self, singular_values: Float[Tensor, " full"]) -> int:
        """Return the rank, in ``[1, full]``."""
        return rank_at_energy(singular_values, self.keep)


@dataclass(frozen=True)
class Fixed:
    """One rank for all layers, or a layer's full rank where that is smaller.

    Args:
        rank: an integer >= 1.

    Raises:
        SettingError: for anything else.

    Examples:
        >>> import torch
        >>> Fixed(2)(torch.tensor([3.0, 1.0, 0.1]))
        2
    """

    rank: int

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise SettingError("Fixed", "rank", got=self.rank, rule="an integer >= 1", hint="for a fraction use Fraction(of_full=...)")

    def __call__(self, singular_values: Float[Tensor, " full"]) -> int:
        """Return the rank, in ``[1, full]``."""
        return min(self.rank, len(singular_values))


@dataclass(frozen=True)
class Fraction:
    """The same fraction of the full rank for every layer, rounded up.

    Args:
        of_full: in (0, 1].

    Raises:
        SettingError: for a fraction outside (0, 1].

    Examples:
        >>> import torch
        >>> Fraction(0.5)(torch.tensor([3.0, 1.0, 0.1]))
        2
    """

    of_full: float

    def __post_init__(self) -> None:
        if not 0 < self.of_full <= 1:
            raise SettingError("Fraction", "of_full", got=self.of_full, rule="a fraction in (0, 1]", hint="for a count use Fixed(rank=...)")

    def __call__(self, singular_values: Float[Tensor, " full"]) -> int:
        """Return the rank, in ``[1, full]``."""
        return max(1, math.ceil(self.of_full * len(singular_values) - 1e-9))


LAWS = {
    "fraction": "its only field is a fraction in (0, 1]; 1 cuts only singular values of zero",
    "count": "its only field is an integer >= 1",
}
"""The laws that some rules obey, beyond those of every rule."""

METHODS: tuple[Row[RankRule], ...] = (
    Row(Energy, example=Energy(0.9), card="svd-training", laws={"fraction"}),
    Row(Fixed, example=Fixed(2), card="svd-training", laws={"count"}),
    Row(Fraction, example=Fraction(0.5), card="svd-training", laws={"fraction"}),
)
