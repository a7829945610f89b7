"""Long vectors of one length that are kept in memory, or in a file that grows by one vector at a time."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from spectrim.errors import FormatError, WriteError
from spectrim.files import make_folder, read_json, sweep, sync, write_json
from spectrim.locks import locked, writing_to

HEADER, NUMBERS = "trajectory.json", "samples.bin"
AGAIN = "delete the folder to begin again"


class Samples(Protocol):
    """The first vector whole, and the difference of each further one to it.

    Attributes:
        notes: plain data about each vector.
    """

    notes: list[dict[str, Any]]

    def __len__(self) -> int:
        """Number of vectors."""

    def append(self, vector: Tensor, note: dict[str, Any]) -> None:
        """Keep a vector and a note: the first vector as it is, another one as a difference."""

    def keep(self, count: int) -> None:
        """Forget all vectors behind the first `count`."""

    def first(self) -> Tensor:
        """Return the first vector."""

    def differences(self, index: int, start: int, end: int) -> Tensor:
        """Return entries of a vector's difference to the first one, in the dtype in which they are kept."""


class InMemory:
    """Samples in memory.

    Args:
        dtype: of differences.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._first: Tensor | None = None
        self._differences: list[Tensor] = []
        self.notes: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return 0 if self._first is None else 1 + len(self._differences)

    def append(self, vector: Tensor, note: dict[str, Any]) -> None:
        """Keep a vector and a note."""
        self.notes.append(note)
        if self._first is None:
            self._first = vector.clone()
        else:
            self._differences.append((vector - self._first).to(self.dtype))

    def keep(self, count: int) -> None:
        """Forget all vectors behind the first `count`."""
        self._first = self._first if count else None
        del self._differences[max(0, count - 1) :], self.notes[count:]

    def first(self) -> Tensor:
        """Return the first vector."""
        assert self._first is not None
        return self._first

    def differences(self, index: int, start: int, end: int) -> Tensor:
        """Return entries of a vector's difference to the first one."""
        if index == 0:
            return torch.zeros(end - start, dtype=self.dtype)
        return self._differences[index - 1][start:end]


class OnDisk:
    """Samples in a folder: ``samples.bin``, one vector after the other, and ``trajectory.json`` with the digest of each.

    The header is replaced as a whole once a vector is on the disk. What a killed process has left behind the last whole vector is
    overwritten. Reading maps the file into memory.

    Args:
        folder: is made if missing.
        dtype: of differences.
        layout: what the vectors are of, plain data.
        width: entries of a vector.
        whole: dtype of the first vector.

    Raises:
        FormatError: for a folder of another layout or dtype, or a damaged one.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, layout: Sequence[Any], width: int, whole: torch.dtype) -> None:
        self.folder, self.dtype, self.width, self.whole = folder, dtype, width, whole
        self.about = {"dtypes": [str(whole), str(dtype)], "layout": json.loads(json.dumps(layout))}
        self.digests: list[str] = []
        self.notes: list[dict[str, Any]] = []
        make_folder(folder)
        sweep(folder)
        if (folder / HEADER).exists():
            self._open()

    def _open(self) -> None:
        """Take over the samples of an earlier process; each is compared with its digest."""
        header = read_json(self.folder / HEADER, AGAIN)
        if {key: header.get(key) for key in self.about} != self.about:
            raise FormatError(self.folder, "holds the trajectory of another network, or in another dtype", hint=AGAIN)
        self.digests, self.notes = list(header["digests"]), list(header["notes"])
        with open(self.folder / NUMBERS, "rb") as file:
            for index, digest in enumerate(self.digests):
                if hashlib.sha256(file.read(self._size(index))).hexdigest() != digest:
                    raise FormatError(self.folder / NUMBERS, f"is damaged: sample {index} does not match its digest", hint=AGAIN)

    def _size(self, index: int) -> int:
        """Return the bytes of a vector."""
        return self.width * (self.whole if index == 0 else self.dtype).itemsize

    def _place(self, index: int) -> int:
        """Return where a vector begins."""
        return 0 if index == 0 else self._size(0) + (index - 1) * self._size(1)

    def __len__(self) -> int:
        return len(self.digests)

    def append(self, vector: Tensor, note: dict[str, Any]) -> None:
        """Keep a vector and a note: written, synchronized, then announced in the header.

        Raises:
            WriteError: the disk is full, or another process writes there.
        """
        index = len(self)
        kept = vector.contiguous() if index == 0 else (vector - self.first()).to(self.dtype)
        data = kept.view(torch.uint8).numpy().tobytes()
        path = self.folder / NUMBERS
        with locked(self.folder), writing_to(path):
            self._refuse_others()
            path.touch()
            with open(path, "r+b") as file:
                file.truncate(self._place(index))
                file.seek(self._place(index))
                file.write(data)
            sync(path)
            self._announce([*self.digests, hashlib.sha256(data).hexdigest()], [*self.notes, note])

    def keep(self, count: int) -> None:
        """Forget all vectors behind the first `count`."""
        if count < len(self):
            with locked(self.folder):
                self._refuse_others()
                self._announce(self.digests[:count], self.notes[:count])

    def _refuse_others(self) -> None:
        """Raise a WriteError where the header is not the one that was read or written here."""
        path = self.folder / HEADER
        written = read_json(path, AGAIN)["digests"] if path.exists() else []
        if written != self.digests:
            raise WriteError(self.folder, "another trajectory has written there since", hint="give each run its own folder")

    def _announce(self, digests: list[str], notes: list[dict[str, Any]]) -> None:
        write_json(self.folder / HEADER, {**self.about, "digests": digests, "notes": notes})
        self.digests, self.notes = digests, notes

    def first(self) -> Tensor:
        """Return a copy of the first vector."""
        return self._mapped(self.whole, 0, 0, self.width).clone()

    def differences(self, index: int, start: int, end: int) -> Tensor:
        """Return entries of a vector's difference to the first one, mapped from the file."""
        if index == 0:
            return torch.zeros(end - start, dtype=self.dtype)
        return self._mapped(self.dtype, self._place(index), start, end)

    def _mapped(self, dtype: torch.dtype, place: int, start: int, end: int) -> Tensor:
        """Return entries of the file; `torch.from_file` maps from its beginning, so that all bytes before are mapped, not read."""
        last = place + end * dtype.itemsize
        data = torch.from_file(str(self.folder / NUMBERS), shared=False, size=last, dtype=torch.uint8)
        return data[place + start * dtype.itemsize : last].view(dtype)
