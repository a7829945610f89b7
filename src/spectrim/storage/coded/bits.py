"""Bits to bytes and back: numbers of fixed widths as arrays, and small numbers one by one."""

from collections.abc import Sequence

import numpy as np


def pack_fixed(values: Sequence[np.ndarray], widths: Sequence[int]) -> bytes:
    """Return arrays of numbers, each array in its number of bits, one after the other, lowest bit first."""
    bits = [((array.astype(np.uint64)[:, None] >> np.arange(w, dtype=np.uint64)) & np.uint64(1)).astype(np.uint8).ravel()
            for array, w in zip(values, widths, strict=True)]  # fmt: skip
    return np.packbits(np.concatenate([np.zeros(0, np.uint8), *bits]), bitorder="little").tobytes()


def unpack_fixed(data: bytes, counts: Sequence[int], widths: Sequence[int]) -> list[np.ndarray]:
    """Return the arrays that `pack_fixed` packed.

    Args:
        data: what it returned.
        counts: of numbers in each array.
        widths: their bits.

    Raises:
        ValueError: `data` has another length.
    """
    total = sum(count * width for count, width in zip(counts, widths, strict=True))
    if len(data) != -(-total // 8):
        raise ValueError("the plain bits have another length")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=total, bitorder="little")
    arrays, place = [], 0
    for count, width in zip(counts, widths, strict=True):
        part = bits[place : place + count * width].reshape(count, width).astype(np.int64)
        arrays.append((part << np.arange(width)).sum(1))
        place += count * width
    return arrays


class Writer:
    """Collects small numbers as bits, and bytes."""

    def __init__(self) -> None:
        self.bits: list[int] = []

    def fixed(self, value: int, width: int) -> None:
        """Add a number of `width` bits."""
        self.bits += [(value >> place) & 1 for place in range(width)]

    def golomb(self, value: int, order: int = 0) -> None:
        """Add a number >= 0 in an exponential Golomb code: short for small ones."""
        value += 1 << order
        length = value.bit_length()
        self.bits += [0] * (length - order - 1) + [1]
        self.fixed(value & ((1 << (length - 1)) - 1), length - 1)

    def signed(self, value: int, order: int = 0) -> None:
        """Add a number of any sign."""
        self.golomb(2 * value if value >= 0 else -2 * value - 1, order)

    def raw(self, data: bytes) -> None:
        """Add bytes."""
        self.bits += np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").tolist()

    def result(self) -> bytes:
        """Return everything as bytes."""
        return np.packbits(np.array(self.bits, np.uint8), bitorder="little").tobytes()


class Reader:
    """Gives back what a `Writer` collected.

    Raises:
        ValueError: from each method, where the bytes end early.
    """

    def __init__(self, data: bytes) -> None:
        self.bits, self.place = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little"), 0

    def fixed(self, width: int) -> int:
        """Return a number of `width` bits."""
        part = self.bits[self.place : self.place + width]
        if len(part) < width:
            raise ValueError("the description ends early")
        self.place += width
        return sum(int(bit) << place for place, bit in enumerate(part))

    def golomb(self, order: int = 0) -> int:
        """Return a number that `Writer.golomb` added."""
        zeros = 0
        while self.fixed(1) == 0:
            zeros += 1
            if zeros > 62:
                raise ValueError("the description holds a number that is too large")
        length = zeros + order
        return ((1 << length) | self.fixed(length)) - (1 << order)

    def signed(self, order: int = 0) -> int:
        """Return a number that `Writer.signed` added."""
        value = self.golomb(order)
        return value // 2 if value % 2 == 0 else -(value + 1) // 2

    def raw(self, count: int) -> bytes:
        """Return that many bytes."""
        part = self.bits[self.place : self.place + 8 * count]
        if len(part) < 8 * count:
            raise ValueError("the description ends early")
        self.place += 8 * count
        return np.packbits(part, bitorder="little").tobytes()
