"""Files that are whole or not there, and standard output that is a program's own."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile


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


@contextmanager
def printing_to_stderr(unless: bytes) -> Iterator[None]:
    """Send to standard error what compiled code prints to standard output inside, which stays for results.

    HiGHS as scipy has it prints lines of its own now and then, whatever its options say. Nothing is sent anywhere else where the C library
    cannot be told to write out what it holds (Windows), or where there is no standard output.

    Args:
        unless: lines that begin so are dropped.
    """
    try:
        flush, kept = ctypes.CDLL(None).fflush, os.dup(1)
    except (OSError, TypeError, AttributeError):
        yield
        return
    with TemporaryFile() as printed:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
            flush(None)
            os.dup2(printed.fileno(), 1)
            yield
        finally:
            flush(None)
            os.dup2(kept, 1)
            os.close(kept)
            printed.seek(0)
            with suppress(OSError):  # no standard error
                os.write(2, b"".join(line for line in printed if not line.startswith(unless)))
