"""What is collected from the tensors of a group before it is coded."""

from dataclasses import dataclass, field

import numpy as np

from spectrim.storage.coded.bits import Writer


@dataclass
class Part:
    """Numbers that are coded one after the other.

    Attributes:
        numbers: magnitudes, or bytes; none yet where they are being decoded.
        contexts: of each.
        whole: magnitudes, which may need plain bits beside their symbol.
        signed: whether signs belong to it.
        zeros: whether a zero among the numbers is a zero of the tensor.
        signs: of those that have one, encoding: 1 for negative.
        negative: of each, decoding.
    """

    numbers: np.ndarray
    contexts: np.ndarray
    whole: bool = True
    signed: bool = False
    zeros: bool = False
    signs: np.ndarray | None = None
    negative: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))


@dataclass
class Group:
    """What is collected from several tensors."""

    side: Writer = field(default_factory=Writer)
    small: list[np.ndarray] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    plain: list[bytes] = field(default_factory=list)
