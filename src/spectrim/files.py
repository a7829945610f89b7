"""Files that are whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; the file gets its own name at the end, on the disk by then, or goes on an error.

    Args:
        path: in a folder that exists.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole; what a killed process left behind goes.

    Args:
        path: in a folder that exists; one process at a time may write it.
        text: written as UTF-8.
    """
    for leftover in path.parent.glob(f"{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
