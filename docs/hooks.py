"""MkDocs hook: the Methods part of the navigation is the list of method cards, in the order of the generated index."""

import re
from pathlib import Path
from typing import Any

CARDS = Path(__file__).parent / "methods"


def title(page: Path) -> str:
    """Return the first heading of a page."""
    return page.read_text(encoding="utf-8").partition("# ")[2].partition("\n")[0]


def cards() -> list[str]:
    """Return the names of all cards: those of the index in its order, then the others by name."""
    linked = re.findall(r"\]\(([\w-]+\.md)\)", (CARDS / "index.md").read_text(encoding="utf-8"))
    others = sorted(page.name for page in CARDS.glob("*.md") if page.name != "index.md")
    return list(dict.fromkeys([*linked, *others]))


def on_config(config: Any) -> Any:
    """Fill in the Methods entry of the navigation."""
    pages: list[Any] = [{"All methods": "methods/index.md"}, *({title(CARDS / name): f"methods/{name}"} for name in cards())]
    config["nav"] = [{"Methods": pages} if isinstance(item, dict) and "Methods" in item else item for item in config["nav"]]
    return config
