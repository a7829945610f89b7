"""Files of tensors and plain data: atomic writes, checksums verified before use, no arbitrary pickles."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from spectrim.errors import FormatError
from spectrim.files import whole_file


def write_state(path: Path, state: Any) -> None:
    """Write nested tensors and plain data atomically.

    Args:
        path: in a folder that exists.
        state: what `torch.load` with ``weights_only`` can read.
    """
    with whole_file(path) as temporary, _with_checksums():
        torch.save(state, temporary)


def read_state(path: Path, hint: str) -> Any:
    """Read what `write_state` wrote, onto the CPU.

    `torch.save` writes a zip archive with a checksum of each entry; `torch.load` ignores them, so that damaged tensors load without an
    error. Here all of them are verified first, with names and sizes.

    Args:
        path: of the file.
        hint: of the error.

    Raises:
        FormatError: for a file that is damaged, is no such archive, or holds anything but tensors and plain data.
    """
    if path.exists() and not path.is_file():  # a FIFO would be waited for
        raise FormatError(path, "is no regular file", hint=hint)
    try:
        with open(path, "rb") as file:
            _verify(file)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FormatError(path, f"is not a readable checkpoint ({type(error).__name__}: {str(error)[:100]})", hint=hint) from error


def _verify(file: Any) -> None:
    """Raise BadZipFile for a damaged archive, entry by entry."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) != len(entries):
            raise zipfile.BadZipFile("two entries have one name")
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
            raise zipfile.BadZipFile("an entry is compressed")
        damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of '{damaged}' does not match")


@contextmanager
def _with_checksums() -> Iterator[None]:
    """Let `torch.save` compute checksums, whatever its option says."""
    before = get_crc32_options()
    set_crc32_options(True)
    try:
        yield
    finally:
        set_crc32_options(before)
