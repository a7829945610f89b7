"""Latency tables as files."""

from pathlib import Path

from spectrim.budget.timed import LatencyTable
from spectrim.files import read_json, write_json


def read_table(path: str | Path) -> LatencyTable:
    """Return a latency table from the file that a device, or `save_table`, wrote.

    Raises:
        FormatError: it is missing, damaged, changed, of another kind or outside its bounds.
    """
    return LatencyTable.from_dict(read_json(Path(path), "time the network again"), owner=str(path))


def save_table(table: LatencyTable, path: str | Path) -> None:
    """Write a latency table as JSON, with a digest.

    Raises:
        WriteError: it cannot be written.
    """
    write_json(Path(path), table.to_dict())
