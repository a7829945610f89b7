"""MkDocs hooks: navigation made of generated indexes, and pages made of notebooks and of files at the root.

The Methods part of the navigation is the list of method cards, in the order of the generated index, the Reference part that of its own.
"""

import re
import runpy
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def title(page: Path) -> str:
    """Return the first heading of a page."""
    return page.read_text(encoding="utf-8").partition("# ")[2].partition("\n")[0]


def listed(folder: Path) -> list[str]:
    """Return the names of all pages of a folder: those of the index in its order, then the others by name."""
    linked = re.findall(r"\]\(([\w-]+\.md)\)", (folder / "index.md").read_text(encoding="utf-8"))
    others = sorted(page.name for page in folder.glob("*.md") if page.name != "index.md")
    return list(dict.fromkeys([*linked, *others]))


def pages(folder: str) -> list[Any]:
    """Return the navigation of a folder: its index, then its pages by title."""
    names = listed(DOCS / folder)
    return [f"{folder}/index.md", *({title(DOCS / folder / name): f"{folder}/{name}"} for name in names)]


def filled(item: Any) -> Any:
    """Return an entry of the navigation, with pages in the place of ``methods/index.md`` and ``reference/index.md``."""
    if not isinstance(item, dict):
        return item
    ((name, inner),) = item.items()
    if inner in ("methods/index.md", "reference/index.md"):
        return {name: pages(inner.partition("/")[0])}
    return {name: [filled(part) for part in inner]} if isinstance(inner, list) else item


def on_config(config: Any) -> Any:
    """Fill in the navigation, and say of which version the pages are."""
    config["nav"] = [filled(item) for item in config["nav"]]
    found = re.search(r'^version = "(.+)"$', (DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    site, version = config.get("site_url"), f"Version {found[1] if found else ''}"
    config["copyright"] = f'{version} · <a href="{site}changelog/">changelog</a>' if site else version
    if not config.get("repo_url"):
        config["edit_uri"] = ""  # links to edit need a place where the source is
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each notebook and for files at the root of the project."""
    from mkdocs.structure.files import File

    notebooks = runpy.run_path(str(DOCS / "notebooks.py"))
    made = {
        f"notebooks/{path.stem}.md": notebooks["markdown"](notebooks["read"](path), path.stem)
        for path in notebooks["FOLDER"].glob("*.ipynb")
    }
    for source, page in ROOT_PAGES.items():
        text = (DOCS.parent / source).read_text(encoding="utf-8")
        made[page] = re.sub(r"\]\(docs/", "](", text)
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files
