"""Locks on what is written, which end with their process, and errors of writing that name the path and the cause."""

import errno
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spectrim.errors import WriteError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".spectrim.lock"
"""Name of the lock file in a folder while it is written."""

NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""A lock file is written to: a link in its place must not lead to another file."""

_WRITING = re.compile(r"write fail|failed (to )?writ|os error|no space|i/o error|file too large|unexpected pos", re.IGNORECASE)
_OPEN: set[int] = set()
"""Descriptors that hold locks."""
_HELD: set[tuple[int, Path]] = set()
"""Locks held: the thread and the lock file."""


@contextmanager
def locked(path: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold a file or folder that is written: other processes and threads that want to, wait or are refused.

    The lock is the operating system's and ends with its process, however that ends. This thread may take a lock again that it holds.

    Args:
        path: a folder that exists, or a file in one.
        wait: for another writer, in seconds.

    Raises:
        WriteError: another process writes there; it is named.
    """
    file = path.resolve() / LOCK if path.is_dir() else path.resolve().with_name(f".{path.name[:160]}.lock")
    held = (threading.get_ident(), file)
    if held in _HELD:
        yield
        return
    with writing_to(path):
        handle = _acquired(file, path, wait)
    _HELD.add(held)
    try:
        yield
    finally:
        _HELD.discard(held)
        if sys.platform == "win32":  # which removes no open file
            release(handle)
        with suppress(OSError):
            file.unlink()
        if sys.platform != "win32":
            release(handle)


def _acquired(file: Path, path: Path, wait: float) -> int:
    """Return a descriptor of a lock file that holds its lock."""
    end = time.monotonic() + wait
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | NO_LINK, 0o644)
        if try_lock(handle):
            if is_at(handle, file):
                keep(handle)
                with suppress(OSError):  # a full disk: the lock holds all the same
                    os.ftruncate(handle, 0)
                    os.write(handle, _holder().encode())
                return handle
            os.close(handle)  # its holder removed it in between
            continue
        holder = ""
        with suppress(OSError):
            holder = os.read(handle, 200).decode(errors="replace")
        os.close(handle)
        if time.monotonic() >= end:
            hint = "wait until it has ended, or choose another path"
            raise WriteError(path, f"is being written by {holder or 'another process'}", hint=hint)
        time.sleep(0.05)


def _holder() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"


def try_lock(handle: int) -> bool:
    """Take a lock if it is free; file systems without locks have none."""
    try:
        if sys.platform == "win32":
            os.lseek(handle, 1 << 20, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


def is_at(handle: int, path: Path) -> bool:
    """Return whether a path still leads to an open file."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), there)


def keep(handle: int) -> None:
    """Remember a descriptor that holds a lock, which a forked process must not keep."""
    if handle >= 0:
        _OPEN.add(handle)


def release(handle: int) -> None:
    """Close a descriptor that was kept."""
    if handle in _OPEN:
        _OPEN.discard(handle)
        os.close(handle)


def _forget() -> None:
    """Give up, in a process that was forked, the locks of its parent."""
    for handle in list(_OPEN):
        with suppress(OSError):
            release(handle)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# Errors of writing


_HINTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or choose another disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that this process may write to"),
    errno.ELOOP: "remove the symbolic link that stands in the place of its lock file",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file has the name of this folder: choose another path"),
}


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn an error of writing a file into one with its path and the cause."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        cause = error.strerror or str(error) or type(error).__name__
        problem = f"cannot be written: {cause}"
        raise WriteError(path, problem, hint=_HINTS.get(error.errno or 0, ""), errno=error.errno) from error
    except Exception as error:  # torch and safetensors raise their own errors for a failed write
        if not (isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError") or not _WRITING.search(str(error)):
            raise
        problem = f"cannot be written: {str(error).splitlines()[0]}"
        raise WriteError(path, problem, hint="is the disk full?") from error
