"""Files of formats without checksums hold a digest of themselves and of what belongs to them."""

from pathlib import Path

import pytest

from spectrim.errors import FormatError
from spectrim.runtimes.file_digest import EMPTY, seal_file, verify_file


def pair(folder: Path, name: str, weights: bytes) -> tuple[Path, Path]:
    graph, values = folder / f"{name}.xml", folder / f"{name}.bin"
    graph.write_text(f"<net><sha256 value='{EMPTY}'/></net>", encoding="utf-8")
    values.write_bytes(weights)
    seal_file(graph, [values])
    return graph, values


def test_a_whole_pair_is_taken_and_a_changed_or_mixed_one_refused(tmp_path: Path) -> None:
    graph, values = pair(tmp_path, "a", bytes(range(99)))
    assert EMPTY not in graph.read_text(encoding="utf-8")
    verify_file(graph, [values])
    _, other = pair(tmp_path, "b", bytes(99))
    for place in (0, 50, 98):
        changed = bytearray(values.read_bytes())
        changed[place] ^= 1
        other.write_bytes(changed)
        with pytest.raises(FormatError, match=r"or a.xml or b.bin is of another export"):
            verify_file(graph, [other])
    graph.write_bytes(graph.read_bytes().replace(b"net", b"ten"))
    with pytest.raises(FormatError, match="does not match its digest"):
        verify_file(graph, [values])
    values.unlink()
    with pytest.raises(FormatError, match=r"is without a\.bin"):
        verify_file(graph, [values])


def test_files_of_other_writers_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "net.pte"
    path.write_bytes(b"something else")
    seal_file(path)
    verify_file(path)
    assert path.read_bytes() == b"something else"
