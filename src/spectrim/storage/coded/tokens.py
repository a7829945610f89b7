"""Magnitudes as tokens of a small alphabet and plain bits."""

import numpy as np

DIRECT = 16
"""Magnitudes below this are tokens themselves; above, two tokens for each power of two, and the bits below the two highest as they are."""

TOKENS = 80

EXTRA = np.array([0] * DIRECT + [3 + (token - DIRECT) // 2 for token in range(DIRECT, TOKENS)], np.uint8)
"""Plain bits that follow each token."""


def split(magnitudes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of magnitudes >= 0 as uint8, and the plain bits of each as a number; no numbers where there are no such bits.

    Args:
        magnitudes: ``(n,)``, int64, below ``2 ** 35``.
    """
    if len(magnitudes) == 0 or int(magnitudes.max()) < DIRECT:
        return magnitudes.astype(np.uint8), np.zeros(0, np.int64)
    large = np.maximum(magnitudes, DIRECT)
    power = np.frexp(large.astype(np.float64))[1] - 1  # exact for numbers below 2^53
    second = (large >> (power - 1)) & 1
    tokens = np.where(magnitudes < DIRECT, magnitudes, DIRECT + 2 * (power - 4) + second)
    return tokens.astype(np.uint8), (large & ((np.int64(1) << (power - 1)) - 1))[magnitudes >= DIRECT]


def joined(tokens: np.ndarray, extra: np.ndarray) -> np.ndarray:
    """Return the magnitudes; the inverse of `split`."""
    found = tokens.astype(np.int64)
    if len(extra):
        at = tokens >= DIRECT
        large = found[at] - DIRECT
        found[at] = ((np.int64(2) | (large & 1)) << (large // 2 + 3)) | extra
    return found
