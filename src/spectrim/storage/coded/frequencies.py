"""Tables of frequencies: from counts, rounded to be short, written and read."""

import numpy as np

from spectrim.storage.coded.bits import Reader, Writer
from spectrim.storage.coded.rans import TOTAL

HIGHEST = 8 * 21
"""Largest rounded weight: 24 bits."""


def rounded(counts: np.ndarray) -> np.ndarray:
    """Return counts as weights with three bits after the leading one, by number: 0 for none, then ``1 + 8 * exponent + mantissa``.

    The rounding costs about 0.03 % of the coded bytes.

    Args:
        counts: ``(symbols,)``, integers >= 0.
    """
    scaled = counts * (min(1.0, (1 << 20) / max(1, int(counts.sum()))) * 8.0)
    exponent = np.maximum(0, np.frexp(np.maximum(scaled, 8.0))[1] - 4)
    numbers = np.rint(scaled / (1 << exponent)).astype(np.int64) - 8  # 8 is the next exponent's 0
    return np.where(counts > 0, 1 + np.maximum(0, 8 * exponent + numbers), 0)


def frequencies(weights: np.ndarray) -> np.ndarray:
    """Return the frequencies of rounded weights: integers that add up to ``2 ** PRECISION``, at least 1 where there is a weight.

    Args:
        weights: ``(symbols,)``, what `rounded` returned.
    """
    used = weights > 0
    exponent, mantissa = np.divmod(np.maximum(weights - 1, 0), 8)
    values = np.where(used, (8 + mantissa) << exponent, 0)
    if not used.any():
        return values
    found = np.where(used, 1 + values * (TOTAL - int(used.sum())) // int(values.sum()), 0)
    found[int(found.argmax())] += TOTAL - int(found.sum())
    return found


def write(weights: np.ndarray, out: Writer) -> None:
    """Write rounded weights: how many up to the last that is not 0, then their differences."""
    length = int(np.flatnonzero(weights)[-1]) + 1 if weights.any() else 0
    out.golomb(length, 1)
    before = 0
    for value in weights[:length].tolist():
        out.fixed(int(value > 0), 1)
        if value:
            out.signed(value - (before or 40), 3)
            before = value


def read(symbols: int, source: Reader) -> np.ndarray:
    """Return the rounded weights of `symbols` symbols that `write` wrote."""
    length, before = source.golomb(1), 0
    if length > symbols:
        raise ValueError("a table is longer than its alphabet")
    weights = np.zeros(symbols, np.int64)
    for place in range(length):
        if source.fixed(1):
            before = (before or 40) + source.signed(3)
            if not 0 < before <= HIGHEST:
                raise ValueError("a table holds a weight out of range")
            weights[place] = before
    return weights
