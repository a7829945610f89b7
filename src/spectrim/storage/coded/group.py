"""Several tensors as one string of bytes: descriptions, tables, coded symbols, plain bits, plain bytes."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spectrim.storage.coded import frequencies as tables
from spectrim.storage.coded import tokens
from spectrim.storage.coded.bits import Reader, Writer, pack_fixed, unpack_fixed
from spectrim.storage.coded.collected import Group, Part
from spectrim.storage.coded.description import Description, describe
from spectrim.storage.coded.integers import CONTEXTS, PLANES, SYMBOLS, is_index
from spectrim.storage.coded.integers import VALUES as BEHIND_GAPS
from spectrim.storage.coded.rans import TOTAL, Rans

FRAME = struct.Struct("<IIII")
"""Lengths of the four sections before the plain bytes: descriptions, scales, symbols, plain bits."""

NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Sizes:
    """Bytes of one tensor: for the values of symbols, for the positions of zeros."""

    data: float
    index: float


def encoded(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, Sizes]]:
    """Return tensors as bytes, and the bytes that each takes: the code lengths of its symbols, without descriptions and tables.

    Args:
        tensors: on the CPU, contiguous, without negative zeros.
    """
    group, owners, plain = Group(), [], dict.fromkeys(tensors, 0.0)
    for name, tensor in tensors.items():
        before, held = len(group.parts), len(group.plain)
        describe(tensor, group)
        owners += [name] * (len(group.parts) - before)
        plain[name] = float(sum(map(len, group.plain[held:])))
    small = np.concatenate([NONE, *group.small])
    first = _tables(small, np.zeros(len(small), np.int64), 1, group.side)
    split = [tokens.split(part.numbers) if part.whole else (part.numbers.astype(np.uint8), NONE) for part in group.parts]
    symbols = np.concatenate([NONE.astype(np.uint8), *(symbol for symbol, _ in split)])
    contexts = np.concatenate([NONE.astype(np.uint8), *(part.contexts for part in group.parts)])
    second = _tables(symbols, contexts, CONTEXTS, group.side)
    extra = np.concatenate([NONE, *(rest for _, rest in split)])
    widths = _widths(symbols, contexts)
    signs = np.concatenate([np.zeros(0, np.int64), *(part.signs for part in group.parts if part.signs is not None)])
    present = np.unique(widths).tolist()
    sections = [
        group.side.result(),
        Rans().encode(*map(torch.from_numpy, (small, np.zeros(len(small), np.int64), first))),
        Rans().encode(*map(torch.from_numpy, (symbols, *_compact(contexts, second)))),
        pack_fixed([signs, *(extra[widths == width] for width in present)], [1, *present]),
    ]
    sizes = _sizes(group.parts, [symbol for symbol, _ in split], second, owners, plain)
    return b"".join([FRAME.pack(*map(len, sections)), *sections, *group.plain]), sizes


def decoded(data: bytes, wanted: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Return the tensors; the inverse of `encoded`.

    Args:
        data: what it returned.
        wanted: name, dtype and shape of each tensor.

    Raises:
        ValueError: `data` was damaged, or is of other tensors.
    """
    if len(data) < FRAME.size:
        raise ValueError("a group ends early")
    lengths = FRAME.unpack_from(data)
    places = np.cumsum([FRAME.size, *lengths]).tolist()
    if places[-1] > len(data):
        raise ValueError("a group ends early")
    side, small, main, bits, plain = (data[a:b] for a, b in zip(places, [*places[1:], len(data)], strict=True))
    source, described = Reader(side), []
    for _, dtype, shape in wanted:
        described.append(Description.read(source, dtype, shape))
    count = sum(item.small for item in described)
    _affordable(count, small)
    offsets = Rans().decode(small, torch.zeros(count, dtype=torch.int64), torch.from_numpy(_read_tables(1, source))).numpy()
    _affordable(sum(item.symbols for item in described), main)
    parts, place = [], 0
    for item in described:
        parts.append(item.parts(offsets[place : place + item.small]))
        place += item.small
    every = [part for listed in parts for part in listed]
    contexts = np.concatenate([NONE.astype(np.uint8), *(part.contexts for part in every)])
    symbols = Rans().decode(main, *map(torch.from_numpy, _compact(contexts, _read_tables(CONTEXTS, source)))).numpy()
    _fill(every, symbols, contexts, bits)
    if sum(item.plain for item in described) != len(plain):
        raise ValueError("the plain bytes have another length")
    made, place = {}, 0
    for (name, _, _), item, listed in zip(wanted, described, parts, strict=True):
        made[name] = item.tensor(listed, plain[place : place + item.plain])
        place += item.plain
    return made


def _affordable(count: int, data: bytes) -> None:
    """Raise a ValueError where so many symbols cannot be in so few bytes: even the likeliest symbol takes a part of a bit."""
    if count > 8 * (len(data) + 8) * TOTAL:
        raise ValueError("more symbols are announced than the bytes can hold")


def _tables(symbols: np.ndarray, contexts: np.ndarray, count: int, out: Writer) -> np.ndarray:
    """Write the tables of symbols in contexts; return their frequencies, ``(count, SYMBOLS)``."""
    counts = np.bincount(contexts.astype(np.int32) * SYMBOLS + symbols, minlength=count * SYMBOLS).reshape(count, SYMBOLS)
    made = np.zeros((count, SYMBOLS), np.int64)
    for context in range(count):
        out.fixed(int(counts[context].any()), 1)
        if counts[context].any():
            weights = tables.rounded(counts[context])
            tables.write(weights, out)
            made[context] = tables.frequencies(weights)
    return made


def _read_tables(count: int, source: Reader) -> np.ndarray:
    made = np.zeros((count, SYMBOLS), np.int64)
    for context in range(count):
        if source.fixed(1):
            made[context] = tables.frequencies(tables.read(SYMBOLS, source))
    return made


def _compact(contexts: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the contexts that have a table anew; a ValueError for symbols in another."""
    used = np.asarray(table.any(1))
    if not used[np.unique(contexts)].all():
        raise ValueError("a table is missing")
    return (np.cumsum(used) - 1)[contexts], table[used]


def _widths(symbols: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    """Return how many plain bits follow each of those symbols that have some."""
    at = np.flatnonzero(symbols >= tokens.DIRECT)
    return np.asarray(tokens.EXTRA[symbols[at][contexts[at] < PLANES]])


def _fill(parts: list[Part], symbols: np.ndarray, contexts: np.ndarray, bits: bytes) -> None:
    """Give each part its numbers and signs."""
    whole = contexts < PLANES
    if len(symbols) and int(np.where(whole, symbols, 0).max()) >= tokens.TOKENS:
        raise ValueError("an unknown symbol")
    signed = np.concatenate([np.zeros(0, bool), *(np.full(len(part.contexts), part.signed) for part in parts)])
    flips = signed & ((symbols > 0) | (contexts >= BEHIND_GAPS))
    widths = _widths(symbols, contexts)
    present = np.unique(widths).tolist()
    counts = np.bincount(widths, minlength=1)
    signs, *rest = unpack_fixed(bits, [int(flips.sum()), *(int(counts[width]) for width in present)], [1, *present])
    extra = np.zeros(len(widths), np.int64)
    for width, values in zip(present, rest, strict=True):
        extra[widths == width] = values
    negative = np.zeros(len(symbols), bool)
    negative[flips] = signs.astype(bool)
    place = used = 0
    for part in parts:
        end = place + len(part.contexts)
        coded = symbols[place:end]
        more = int((coded >= tokens.DIRECT).sum()) if part.whole else 0
        part.numbers = tokens.joined(coded, extra[used : used + more]) if part.whole else coded
        part.negative = negative[place:end]
        place, used = end, used + more


def _sizes(
    parts: list[Part], symbols: list[np.ndarray], table: np.ndarray, owners: list[str], plain: Mapping[str, float]
) -> dict[str, Sizes]:
    """Return the bytes of each tensor by what its symbols cost in their contexts."""
    total = {name: [count, 0.0] for name, count in plain.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.where(table > 0, -np.log2(table / TOTAL), 0.0)
        zero = bits[:, 0]
        some = np.where(table[:, 0] > 0, -np.log2(np.maximum(TOTAL - table[:, 0], 1) / TOTAL), 0.0)
    for part, coded, name in zip(parts, symbols, owners, strict=True):
        seen = np.bincount(part.contexts.astype(np.int32) * SYMBOLS + coded, minlength=table.size).reshape(table.shape)
        all_bits = float((seen * bits).sum()) + (0 if part.signs is None else len(part.signs))
        if part.whole:
            all_bits += float((seen[:, : tokens.TOKENS] * tokens.EXTRA).sum())
        flags = float((seen[:, 0] * zero + seen[:, 1:].sum(1) * some).sum())
        index = all_bits if is_index(part) else flags if part.zeros else 0.0
        total[name][0] += (all_bits - index) / 8
        total[name][1] += index / 8
    return {name: Sizes(data, index) for name, (data, index) in total.items()}
