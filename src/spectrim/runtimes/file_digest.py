"""A digest inside a file whose format has no checksum: ExecuTorch's ``.pte``, and OpenVINO's ``.xml`` together with its ``.bin``."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from spectrim.errors import FormatError

MARK = b"spectrim-sha256:"
EMPTY = (MARK + b"0" * 64).decode()
"""What a writer puts into a file, as text, for `seal_file` to fill in."""


def seal_file(path: Path, beside: Sequence[Path] = ()) -> None:
    """Fill the digest of a file, with the place of the digest empty, and of the files beside it, into the file.

    Args:
        path: a file that holds `EMPTY` once; one that does not is left as it is.
        beside: files that belong to it, such as weights.
    """
    content = path.read_bytes()
    if content.count(EMPTY.encode()) == 1:
        path.write_bytes(content.replace(EMPTY.encode(), MARK + _digest(content, beside)))


def verify_file(path: Path, beside: Sequence[Path] = ()) -> None:
    """Compare a file, and those beside it, with the digest in it; one without, which something else wrote, is taken as it is.

    Raises:
        FormatError: a file is another one than was written, as when the writing of two files was interrupted between them.
    """
    content = path.read_bytes()
    found = re.search(MARK + rb"([0-9a-f]{64})", content)
    if found is None:
        return
    blank = content[: found.start()] + EMPTY.encode() + content[found.end() :]
    missing = [part.name for part in beside if not part.is_file()]
    if missing or _digest(blank, beside) != found[1]:
        parts = " or ".join([path.name, *(part.name for part in beside)])
        what = (
            f"is without {missing[0]}" if missing else f"is damaged, or {parts} is of another export: the content does not match its digest"
        )
        raise FormatError(path, what, hint="export again")


def _digest(content: bytes, beside: Sequence[Path]) -> bytes:
    made = hashlib.sha256(content)
    for part in beside:
        with open(part, "rb") as file:
            while chunk := file.read(1 << 20):
                made.update(chunk)
    return made.hexdigest().encode()
