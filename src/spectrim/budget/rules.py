"""Rank rules: one layer's spectrum in, its rank out. `METHODS` is the table that contract tests and docs read."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from spectrim.errors import SettingError
from spectrim.linalg.spectral import rank_at_energy


@dataclass(frozen=True)
class Energy:
    """The smallest rank that keeps the fraction `keep` of the sum of squared singular values.

    Args:
        keep: in (0, 1]; 1 cuts only what is exactly zero. The paper's threshold ``e`` is ``1 - keep``.

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
    """The same rank for every layer, or the layer's full rank where that is smaller.

    Args:
        rank: an integer >= 1.

    Raises:
        SettingError: for anything else.
    """

    rank: int

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise SettingError("Fixed", "rank", got=self.rank, rule="an integer >= 1", hint="for a fraction take Fraction(of_full=...)")

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
    """

    of_full: float

    def __post_init__(self) -> None:
        if not 0 < self.of_full <= 1:
            raise SettingError(
                "Fraction", "of_full", got=self.of_full, rule="a fraction in (0, 1]", hint="for a count take Fixed(rank=...)"
            )

    def __call__(self, singular_values: Float[Tensor, " full"]) -> int:
        """Return the rank, in ``[1, full]``."""
        return max(1, math.ceil(self.of_full * len(singular_values) - 1e-9))


METHODS = (Energy, Fixed, Fraction)
