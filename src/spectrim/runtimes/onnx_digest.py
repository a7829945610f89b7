"""A digest in an ONNX file, which has no checksum of its own: a flipped bit in a weight is noticed when the file is opened here."""

import hashlib
from importlib import import_module
from pathlib import Path
from typing import Any

from spectrim.errors import FormatError

KEY = "spectrim.sha256"
"""Of the entry in the model's ``metadata_props``."""


def seal(path: Path) -> None:
    """Write into an ONNX file the digest of all else in it, and of the files of weights beside it."""
    proto = _read(path)
    unseal(proto)
    entry = proto.metadata_props.add()
    entry.key, entry.value = KEY, ""
    entry.value = _digest(proto, path.parent)
    path.write_bytes(proto.SerializeToString())


def unseal(proto: Any) -> str | None:
    """Remove the digest from a graph that will be changed, and return it; None where there is none."""
    found = None
    for index in reversed(range(len(proto.metadata_props))):
        if proto.metadata_props[index].key == KEY:
            found = str(proto.metadata_props[index].value)
            del proto.metadata_props[index]
    return found


def verify(path: Path) -> None:
    """Compare an ONNX file with the digest in it; one without, which something else wrote, is taken as it is.

    Raises:
        FormatError: its content is another one than was written.
    """
    proto = _read(path)
    entry = next((entry for entry in proto.metadata_props if entry.key == KEY), None)
    if entry is None:
        return
    written, entry.value = entry.value, ""
    if written != _digest(proto, path.parent):
        hint = f"export again; a graph that was changed on purpose is read without its metadata '{KEY}'"
        raise FormatError(path, "is damaged, or was changed after it was written: its content does not match its digest", hint=hint)


def _read(path: Path) -> Any:
    try:
        return import_module("onnx").load(str(path), load_external_data=False)
    except Exception as error:  # of protobuf
        raise FormatError(path, "is not an ONNX file: it cannot be parsed", hint="export again") from error


def _digest(proto: Any, folder: Path) -> str:
    made = hashlib.sha256(proto.SerializeToString(deterministic=True))
    external = {entry.value for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"}
    for name in sorted(external):
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                for chunk in iter(lambda file=file: file.read(1 << 20), b""):  # type: ignore[misc]
                    made.update(chunk)
    return made.hexdigest()
