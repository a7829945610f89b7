"""How one tensor is coded: its description, its symbols and plain bytes; written and read."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from spectrim.storage.coded.bits import Reader
from spectrim.storage.coded.collected import Group, Part
from spectrim.storage.coded.integers import PLANES, SYMBOLS, Integers, counted, read_integers, write_integers
from spectrim.storage.coded.levels import VALUES, found, restored

RAW, SPARSE, STEPS, TABLE, CONSTANT = range(5)

KEPT = 0.98
"""A plane of bytes is coded where that takes less than this share."""


def describe(tensor: Tensor, group: Group) -> None:
    """Collect one tensor."""
    side, shape = group.side, tuple(tensor.shape)
    raw = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)
    flat = raw.reshape(-1, tensor.element_size())
    if len(flat) > 1 and (flat == flat[0]).all():
        side.fixed(CONSTANT, 3)
        side.raw(flat[0].tobytes())
        return
    levels = found(tensor)
    if levels is not None and levels.steps is not None:
        side.fixed(STEPS, 3)
        side.fixed(int(len(levels.steps) > 1), 1)
        side.raw(levels.steps.astype(levels.steps.dtype.newbyteorder("<")).tobytes())
        write_integers(levels.numbers, shape, group, signed=True)
    elif levels is not None and levels.table is not None:
        side.fixed(TABLE, 3)
        side.golomb(len(levels.table), 4)
        side.golomb(levels.zero, 4)
        side.raw(levels.table.view(torch.uint8).numpy().tobytes())
        write_integers(levels.numbers, shape, group, signed=True)
    else:
        some = np.asarray(flat.any(1))
        sparse = len(flat) >= 64 and 8 * int(some.sum()) <= 7 * len(flat)
        side.fixed(SPARSE if sparse else RAW, 3)
        if sparse:
            side.golomb(int(some.sum()), 8)
            write_integers(some.astype(np.int64), shape, group, signed=False)
        _planes(flat[some] if sparse else flat, group)


def _planes(flat: np.ndarray, group: Group) -> None:
    """Collect numbers byte by byte, the most significant first; those that are worth it are coded."""
    width = flat.shape[1]
    for place in range(width):
        plane = flat[:, width - 1 - place]
        counts = np.bincount(plane, minlength=SYMBOLS)
        coded = len(plane) >= 64 and counted(counts) < 8 * KEPT * len(plane) - 4 * int((counts > 0).sum())
        group.side.fixed(int(coded), 1)
        if coded:
            group.parts.append(Part(plane.astype(np.int64), np.full(len(plane), PLANES + place, np.uint8), whole=False))
        else:
            group.plain.append(plane.tobytes())


@dataclass
class Description:
    """How one tensor was coded, as its description says."""

    kind: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    count: int
    steps: np.ndarray | None = None
    table: Tensor | None = None
    zero: int = 0
    integers: Integers | None = None
    planes: list[bool] = field(default_factory=list)
    value: bytes = b""

    @classmethod
    def read(cls, source: Reader, dtype: torch.dtype, shape: tuple[int, ...]) -> "Description":
        """Read the description of a tensor."""
        item = cls(source.fixed(3), dtype, shape, int(np.prod(shape, dtype=np.int64)))
        if item.kind == CONSTANT:
            item.value = source.raw(dtype.itemsize)
        elif item.kind == STEPS:
            kind = np.dtype("<f8" if dtype is torch.float64 else "<f4")
            rows = shape[0] if source.fixed(1) and shape else 1
            item.steps = np.frombuffer(source.raw(kind.itemsize * rows), kind)
            item.integers = read_integers(source, shape, signed=True)
        elif item.kind == TABLE:
            length, item.zero = source.golomb(4), source.golomb(4)
            if not item.zero < length <= VALUES:
                raise ValueError("a table of values is too long")
            item.table = torch.frombuffer(bytearray(source.raw(length * dtype.itemsize)), dtype=dtype)
            item.integers = read_integers(source, shape, signed=True)
        elif item.kind in (RAW, SPARSE):
            if item.kind == SPARSE:
                item.count, entries = source.golomb(8), item.count
                if item.count > entries:
                    raise ValueError("more numbers are announced than the tensor has")
                item.integers = read_integers(source, shape, signed=False)
            item.planes = [bool(source.fixed(1)) for _ in range(dtype.itemsize)]
        else:
            raise ValueError("a tensor is coded in an unknown way")
        if item.integers is not None and not dtype.is_floating_point and item.kind != SPARSE:
            raise ValueError("a tensor of integers is said to lie on levels")
        return item

    @property
    def small(self) -> int:
        """How many scales belong to it."""
        return 0 if self.integers is None else self.integers.small

    @property
    def symbols(self) -> int:
        """How many symbols belong to it."""
        return (0 if self.integers is None else self.integers.symbols) + sum(self.planes) * self.count

    @property
    def plain(self) -> int:
        """How many plain bytes belong to it."""
        return (len(self.planes) - sum(self.planes)) * self.count

    def parts(self, offsets: np.ndarray) -> list[Part]:
        """Return its symbols, to be filled."""
        made = [] if self.integers is None else self.integers.parts(offsets)
        blank = np.zeros(0, np.int64)
        return made + [
            Part(blank, np.full(self.count, PLANES + place, np.uint8), whole=False) for place, on in enumerate(self.planes) if on
        ]

    def tensor(self, parts: list[Part], plain: bytes) -> Tensor:
        """Return the tensor."""
        if self.kind == CONSTANT:
            return torch.frombuffer(bytearray(self.value), dtype=self.dtype).expand(self.shape).contiguous()
        numbers = None if self.integers is None else self.integers.numbers(parts)
        if self.steps is not None and numbers is not None:
            return restored(numbers, self.steps.astype(self.steps.dtype.newbyteorder("=")), self.shape, self.dtype)
        if self.table is not None and numbers is not None:
            places = numbers + self.zero
            if ((places < 0) | (places >= len(self.table))).any():
                raise ValueError("a number is not in the table of values")
            return self.table[torch.from_numpy(places)].reshape(self.shape)
        return self._from_planes(parts[len(parts) - sum(self.planes) :], plain, numbers)

    def _from_planes(self, parts: list[Part], plain: bytes, mask: np.ndarray | None) -> Tensor:
        width, coded, place = self.dtype.itemsize, iter(parts), 0
        flat = np.empty((self.count, width), np.uint8)
        for number, on in enumerate(self.planes):
            flat[:, width - 1 - number] = next(coded).numbers if on else np.frombuffer(plain[place : place + self.count], np.uint8)
            place += 0 if on else self.count
        if mask is not None:
            whole = np.zeros((len(mask), width), np.uint8)
            if int(mask.sum()) != self.count or int(mask.max(initial=0)) > 1:
                raise ValueError("the positions do not fit the numbers")
            whole[mask.astype(bool)] = flat
            flat = whole
        return torch.from_numpy(flat.reshape(-1)).view(self.dtype).reshape(self.shape)
