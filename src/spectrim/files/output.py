"""Redirection of foreign output to standard error."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile


@contextmanager
def printing_to_stderr(unless: bytes) -> Iterator[None]:
    """Redirect what compiled code prints inside to standard error; standard output is reserved for results.

    HiGHS in scipy prints lines now and then, whatever its options are. Nothing is redirected where the C library's buffers cannot be
    flushed (Windows), or where there is no standard output.

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
