"""Atomic writes: whole files and folders, temporary names beside them, room on the disk."""

import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spectrim.errors import WriteError
from spectrim.locks import is_at, keep, locked, release, try_lock, writing_to

_TEMPORARY = re.compile(r"\.(\d+)-[0-9a-f]{8}\.tmp$")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` to write to; the file is renamed at the end, once it is on disk, or removed on an error.

    Args:
        path: in a folder that exists. A symbolic link is followed.

    Raises:
        WriteError: the file cannot be written; the one that was there before is left as it was.
    """
    path = target_of(path)
    with writing_to(path):
        sweep(path.parent)
        with temporary_beside(path) as temporary:
            yield temporary
            put(temporary, path)
        _sync_folder(path.parent)


@contextmanager
def new_files(path: Path, wait: float = 60.0) -> Iterator[Path]:
    """Give an empty folder to write a file of the name of `path` to, and files beside it; at the end they are moved beside `path`.

    Where there are several, the old file of that name is removed first and the new one comes last: an old graph never stands beside new
    weights. Other writers of the same file wait.

    Args:
        path: its folder is made if missing.
        wait: for another writer, in seconds.

    Raises:
        WriteError: the files cannot be written, or another process still writes them.
    """
    make_folder(path.parent)
    path = target_of(path)
    with locked(path, wait):
        sweep(path.parent)
        with temporary_beside(path, folder=True) as folder:
            yield folder
            with writing_to(path):
                _place(folder, path)


def _place(folder: Path, path: Path) -> None:
    """Move the files of a folder beside `path`, and the one of its name last."""
    written = sorted((part for part in folder.iterdir() if part.is_file()), key=lambda part: part.name == path.name)
    for part in written:
        sync(part)
    if len(written) > 1:
        path.unlink(missing_ok=True)
    for part in written:
        os.replace(part, target_of(path.parent / part.name))
    _sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents where they are missing.

    Raises:
        WriteError: it cannot be made.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)


def check_room(folder: Path, size: int) -> None:
    """Reserve `size` bytes in a folder for a moment, so that a full disk is noticed before a long write.

    Raises:
        WriteError: there is no room.
    """
    if not hasattr(os, "posix_fallocate") or size <= 0:
        return
    with writing_to(folder), temporary_beside(folder / "room") as file:
        handle = os.open(file, os.O_RDWR)
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
        finally:
            os.close(handle)


def sweep(folder: Path) -> None:
    """Remove the temporary files in a folder whose writer has ended; those of running processes stay.

    Args:
        folder: one that may be missing.
    """
    try:
        names = [name for name in os.listdir(folder) if _TEMPORARY.search(name)]
    except OSError:
        return
    for name in names:
        with suppress(OSError):
            _remove_if_dead(folder / name)


def _remove_if_dead(path: Path) -> None:
    handle = -1 if sys.platform == "win32" else os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if handle < 0 or (try_lock(handle) and is_at(handle, path)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        if handle >= 0:
            os.close(handle)


@contextmanager
def temporary_beside(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Make an empty file or folder beside `path` and hold a lock on it, which says that its writer lives; it is gone afterwards.

    A signal may come at any moment: also where the file is there and nothing is known of it yet.
    """
    made, handle = path, -1
    try:
        while True:
            made = path.with_name(f"{path.name[:160]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
            with writing_to(path):
                handle = _made(made, folder)
            if handle < 0 or (try_lock(handle) and is_at(handle, made)):
                break
            os.close(handle)  # another writer took it for one of a dead process in between
            handle = -1
        keep(handle)
        yield made
    finally:
        if made != path:
            with suppress(OSError):  # where it could not be made, its error counts
                shutil.rmtree(made, ignore_errors=True) if folder else made.unlink(missing_ok=True)
        release(handle)


def _made(path: Path, folder: bool) -> int:
    """Make a file or folder and return a descriptor of it; -1 where an open one could not be renamed."""
    if folder:
        path.mkdir()
        return -1 if sys.platform == "win32" else os.open(path, os.O_RDONLY)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    if sys.platform == "win32":
        os.close(handle)
        return -1
    return handle


def target_of(path: Path) -> Path:
    """Return the file that a path leads to, which is a regular one or missing."""
    with writing_to(path):
        path = path.resolve() if path.is_symlink() else path
        if path.is_dir():
            raise WriteError(path, "is a folder, not a file", hint="give the path of a file")
        if path.exists() and not path.is_file():
            raise WriteError(path, "is a pipe or a device, not a file", hint="give the path of a file")
    return path


def put(temporary: Path, path: Path) -> None:
    """Rename a written file to its final name, once its content is on disk."""
    sync(temporary)
    os.replace(temporary, path)


def sync(path: Path) -> None:
    """Put the content of a file on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Put the renames of a folder on the disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
