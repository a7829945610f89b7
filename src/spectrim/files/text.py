"""Text and JSON with digests: written atomically, read within bounds."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectrim.errors import FormatError
from spectrim.files.whole import whole_file

JSON_LIMIT = 1 << 28
"""Largest JSON file that is read, in bytes."""

JSON_VALUES = 1 << 24
"""Most values in a JSON file that is read: each takes up to 72 bytes of memory, however short it is written."""

DIGEST = "sha256"
"""Key of the digest of all else in a JSON file that `write_json` wrote."""


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Args:
        path: in a folder that exists.
        text: written as UTF-8.

    Raises:
        WriteError: it cannot be written; the file that was there before is left as it was.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file as a whole, with a digest of what it holds, which `read_json` verifies.

    Args:
        path: in a folder that exists.
        values: plain data. The digest goes under the key `DIGEST`.

    Raises:
        WriteError: it cannot be written; the file that was there before is left as it was.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "numbers.json"
        >>> write_json(path, {"loss": 0.5})
        >>> read_json(path)
        {'loss': 0.5}
        >>> write_text(path, path.read_text().replace("0.5", "0.6"))
        >>> read_json(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        spectrim.errors.FormatError: ...numbers.json: is damaged: its content does not match its digest...
    """
    content = {name: value for name, value in values.items() if name != DIGEST}
    write_text(path, json.dumps(content | {DIGEST: _digest(json.loads(json.dumps(content)))}, indent=1) + "\n")


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_digest(path: Path, written: Any, hint: str = "") -> None:
    """Compare a file with the digest that another file holds of it.

    Args:
        path: of the file; nothing is checked where it is missing.
        written: its digest, see `digest_of`; None where there is none.
        hint: what to do about another content.

    Raises:
        FormatError: it is another content.
    """
    if written is not None and path.is_file() and digest_of(path) != written:
        raise FormatError(path, "is damaged, or was changed after the folder was finished: it does not match its digest", hint=hint)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """Return the mapping that a JSON file holds, without its digest, which is verified where there is one (see `write_json`).

    Args:
        path: of a regular file.
        hint: what to do about a damaged file.

    Raises:
        FormatError: it is missing, no regular file, larger than `JSON_LIMIT`, does not hold a mapping, or another one than was
            written.
    """
    try:
        if not path.is_file():
            raise FormatError(path, "is not a file" if path.exists() else "is missing", hint=hint)
        if (size := path.stat().st_size) > JSON_LIMIT:
            raise FormatError(path, f"is too large ({size:,} bytes, at most {JSON_LIMIT:,} are read)", hint=hint)
        text = path.read_text(encoding="utf-8")
        if (count := sum(map(text.count, "{[,"))) > JSON_VALUES:
            raise FormatError(path, f"is too large (up to {count:,} values, at most {JSON_VALUES:,} are read)", hint=hint)
        values = json.loads(text)
    except (OSError, RecursionError) as error:
        raise FormatError(path, f"cannot be read ({error})", hint=hint) from error
    except ValueError as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(path, f"is damaged ({error})", hint=hint) from error
    if not isinstance(values, dict):
        raise FormatError(path, f"is damaged: it holds a {type(values).__name__}, not a mapping", hint=hint)
    found = values.pop(DIGEST, None)
    if found is not None and found != _digest(values):
        raise FormatError(path, "is damaged: its content does not match its digest", hint=hint)
    return values
