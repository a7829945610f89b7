"""The ``.spz`` file: magic, length of the header, digest, header (deflated JSON), groups of coded tensors."""

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from spectrim.errors import FormatError, SettingError
from spectrim.storage.coded.group import Sizes, decoded, encoded

MAGIC = b"SPZ1"

FRAME = struct.Struct("<4sI16s")
"""Magic, length of the header, and the first half of the SHA-256 of all that follows."""

HEADER_LIMIT = 1 << 26
"""Largest header, in bytes of JSON."""

GROUP = 1 << 20
"""Entries from which a group of tensors is closed."""

EXPANSION, ROOM = 4096, 1 << 28
"""A file may hold that many bytes of tensors for each of its bytes, or `ROOM` bytes where that is more."""

HINT = "copy it again, or pack the model again"

DTYPES = {
    "F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Dtypes by the names that safetensors has for them."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        header: plain data: ``tensors`` (names and shapes), ``groups``, and what was given to `coded_file`.
        tensors: by name.
        size: of the file, in bytes.
        totals: bytes of values and of positions.
    """

    header: dict[str, Any]
    tensors: dict[str, Tensor]
    size: int
    totals: tuple[int, int]


def coded_file(tensors: Mapping[str, Tensor], more: Mapping[str, Any]) -> tuple[bytes, dict[str, Sizes]]:
    """Return the bytes of a file, and those of each tensor in it.

    Args:
        tensors: on the CPU, contiguous. Negative zeros are stored as zeros.
        more: plain data for the header.

    Raises:
        SettingError: for a dtype that no file holds, or tensors that are too large for what is in them.
    """
    tensors = {name: _stored(name, tensor) for name, tensor in tensors.items()}
    sizes: dict[str, Sizes] = {}
    listed, bodies, groups = [], [], []
    for name, tensor in tensors.items():
        listed.append([name, list(tensor.shape), *([] if tensor.dtype is torch.float32 else [NAMES[tensor.dtype]])])
    for part in _grouped(tensors):
        body, found = encoded(part)
        sizes |= found
        bodies.append(body)
        groups.append([len(part), len(body)])
    totals = [math.ceil(sum(size.data for size in sizes.values())), math.ceil(sum(size.index for size in sizes.values()))]
    header = {"tensors": listed, "groups": groups, "digest": digest(tensors), "bytes": totals, **more}
    text = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    rest = b"".join([text, *bodies])
    made = FRAME.pack(MAGIC, len(text), hashlib.sha256(rest).digest()[:16]) + rest
    if (held := sum(tensor.nbytes for tensor in tensors.values())) > _room(len(made)):
        raise SettingError("pack", "model", got=f"{held:,} bytes in {len(made):,}", rule=f"at most {EXPANSION} times as large as its file")
    return made, sizes


def read_file(path: Path) -> Content:
    """Read and verify a file; the digest is checked before anything is parsed, and sizes before anything is allocated.

    Raises:
        FormatError: it is missing, truncated, altered or foreign, or holds something that `coded_file` never writes.
    """
    try:
        with open(path, "rb") as file:
            return _read(file, path)
    except FormatError:
        raise
    except (OSError, IsADirectoryError) as error:
        raise FormatError(path, f"cannot be read ({error})", hint="it is what pack(model, path) writes") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, RecursionError, OverflowError, zlib.error) as error:
        raise FormatError(path, f"is not a coded file of spectrim ({error})", hint="do not use this file") from error


def _read(file: BinaryIO, path: Path) -> Content:
    size = path.stat().st_size
    start = file.read(FRAME.size)
    if len(start) < FRAME.size or start[:4] != MAGIC:
        raise FormatError(path, "is not a coded file of spectrim", hint="it is what pack(model, path) writes")
    _, length, written = FRAME.unpack(start)
    total = hashlib.sha256()
    while block := file.read(1 << 20):
        total.update(block)
    if total.digest()[:16] != written or FRAME.size + length > size:
        raise FormatError(path, "is truncated or was altered: its digest does not match", hint=HINT)
    file.seek(FRAME.size)
    header = _header(file.read(length))
    wanted = [_wanted(entry) for entry in header["tensors"]]
    if len({name for name, _, _ in wanted}) < len(wanted):
        raise ValueError("a tensor is listed twice")
    if sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in wanted) > _room(size):
        raise ValueError(f"it says that it holds more than {EXPANSION} times its size")
    groups = [(int(count), int(part)) for count, part in header["groups"]]
    if sum(count for count, _ in groups) != len(wanted) or sum(part for _, part in groups) != size - FRAME.size - length:
        raise ValueError("its groups have another size")
    tensors: dict[str, Tensor] = {}
    for count, part in groups:
        if count < 1 or part < 0:
            raise ValueError("a group is empty")
        tensors |= decoded(file.read(part), wanted[len(tensors) : len(tensors) + count])
    if digest(tensors) != header["digest"]:
        raise FormatError(path, "its tensors do not match their digest", hint=HINT)
    data, index = map(int, header["bytes"])
    return Content(header, tensors, size, (data, index))


def _header(data: bytes) -> dict[str, Any]:
    inflating = zlib.decompressobj()
    text = inflating.decompress(data, HEADER_LIMIT)
    if not inflating.eof or inflating.unconsumed_tail or inflating.unused_data:
        raise ValueError("its header is too long or ends early")
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("its header is no mapping")
    return header


def _wanted(entry: Any) -> tuple[str, torch.dtype, tuple[int, ...]]:
    name, shape, *dtype = entry
    if not (isinstance(name, str) and all(type(side) is int and 0 <= side < 1 << 40 for side in shape) and len(shape) < 16):
        raise ValueError("a tensor is described wrongly")
    return name, DTYPES[dtype[0] if dtype else "F32"], tuple(shape)


def _room(size: int) -> int:
    return max(ROOM, EXPANSION * size)


def _stored(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in NAMES:
        raise SettingError("pack", name, got=tensor.dtype, rule=f"of a dtype among {', '.join(NAMES[dtype] for dtype in NAMES)}")
    tensor = tensor.detach().cpu().contiguous()
    return tensor + 0 if tensor.is_floating_point() else tensor  # a negative zero and zero are zero


def _grouped(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors in order, many small ones or one large one at a time."""
    part: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if part and sum(held.numel() for held in part.values()) + tensor.numel() > GROUP:
            yield part
            part = {}
        part[name] = tensor
    if part:
        yield part


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the first half of the SHA-256 of all bytes of the tensors, in their order, in hexadecimal digits."""
    total = hashlib.sha256()
    for tensor in _contiguous(tensors.values()):
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return total.hexdigest()[:32]


def _contiguous(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    return (tensor.contiguous() for tensor in tensors)
