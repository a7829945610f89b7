"""`Int8`: how a network becomes int8."""

from dataclasses import dataclass
from typing import Literal

from spectrim.checks.words import check_words
from spectrim.errors import SettingError

Method = Literal["auto", "static", "dynamic"]


Ranges = Literal["minmax", "percentile", "entropy"]


@dataclass(frozen=True)
class Int8:
    """How a network becomes int8.

    Attributes:
        method: ``static`` fixes the range of each activation on calibration data; ``dynamic`` computes it in each call, for linear
            layers, LSTMs and embeddings only. ``auto`` is static for convolutional networks, and dynamic where nothing convolves or where
            recurrence or attention is in the graph.
        ranges: of activations, for ``static``: ``minmax`` covers all observed values, ``percentile`` all but the rarest, ``entropy``
            minimizes the loss of information. The last two keep the observed values in memory.
        percentile: share of the values that is kept, in percent, in (50, 100).
        weight_bits: 7 or 8. x86 processors without VNNI add two products of an 8-bit weight in 16 bits, which can overflow: there 7 bits
            are more accurate than 8. Weights take a byte each in both.
        equalize: give all channels between the two layers of a low-rank pair the same range, see `equalize_pairs`.
        examples: number of calibration examples, >= 1.

    Raises:
        SettingError: a setting is outside its range.

    Examples:
        >>> Int8(ranges="percentile", weight_bits=8).percentile
        99.999
    """

    method: Method = "auto"
    ranges: Ranges = "minmax"
    percentile: float = 99.999
    weight_bits: Literal[7, 8] = 7
    equalize: bool = True
    examples: int = 256

    def __post_init__(self) -> None:
        check_words(self)
        if not 50 < self.percentile < 100:
            raise SettingError("Int8", "percentile", got=self.percentile, rule="in (50, 100)", hint="for all values write ranges='minmax'")
        if self.examples < 1:
            raise SettingError("Int8", "examples", got=self.examples, rule=">= 1")
