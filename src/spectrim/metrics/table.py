"""Markdown tables."""

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def markdown_table(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None) -> str:
    """Return rows as a Markdown table, numbers to the right."""
    table = Table(box=box.MARKDOWN, show_header=header is not None)
    for index, name in enumerate(header or rows[0]):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=10_000, color_system=None, markup=False, emoji=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())
