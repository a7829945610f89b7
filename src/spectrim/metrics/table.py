"""Markdown tables, and the same as HTML for notebooks."""

import html
import io
import re
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


class Summarized:
    """A result that prints, and shows itself in notebooks, as its `summary`."""

    def summary(self) -> str:
        """Return the result as text: Markdown tables and lines."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        return html_of(self.summary())


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


def html_of(text: str) -> str:
    """Return text with Markdown tables as HTML, for notebooks: tables become tables, other lines paragraphs.

    Args:
        text: as `markdown_table` writes it, with lines between tables.

    Examples:
        >>> html_of("| a | 1 |") + html_of("level & smaller")
        '<table><tr><th>a</th><td>1</td></tr></table><p>level &amp; smaller</p>'
    """
    parts: list[str] = []
    rows: list[str] = []
    lines = text.splitlines()
    for index, line in enumerate([*lines, ""]):
        if line.startswith("|"):
            if not re.fullmatch(r"[|:\- ]+", line):
                head = index + 1 < len(lines) and re.fullmatch(r"\|[|:\- ]*-[|:\- ]*", lines[index + 1]) is not None
                rows.append(_html_row([cell.strip() for cell in line.strip("|").split("|")], head))
            continue
        if rows:
            parts.append(f"<table>{''.join(rows)}</table>")
            rows = []
        if line.strip():
            parts.append(f"<p>{html.escape(line.strip())}</p>")
    return "".join(parts)


def _html_row(cells: Sequence[str], head: bool) -> str:
    first, *rest = map(html.escape, cells)
    tag = "th" if head else "td"
    return f"<tr><th>{first}</th>{''.join(f'<{tag}>{cell}</{tag}>' for cell in rest)}</tr>"
