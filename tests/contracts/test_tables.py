"""The laws of a table of methods, over the tables of all contracts."""

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from spectrim import projections
from spectrim.budget import distortion, rules
from spectrim.errors import SettingError
from spectrim.penalties import LAWS, METHODS
from spectrim.tables import Row
from spectrim.training import methods as schedules

CARDS = Path(__file__).resolve().parents[2] / "docs" / "methods"
TABLES: dict[str, tuple[Row[Any], ...]] = {
    "penalties": METHODS,
    "rules": rules.METHODS,
    "distortion": distortion.METHODS,
    "schedules": schedules.METHODS,
    "projections": projections.METHODS,
}
KNOWN_LAWS = {
    "penalties": LAWS,
    "rules": rules.LAWS,
    "distortion": distortion.LAWS,
    "schedules": schedules.LAWS,
    "projections": projections.LAWS,
}
every_row = pytest.mark.parametrize("row", [row for table in TABLES.values() for row in table], ids=lambda row: row.label)


def documented(card: str) -> list[object]:
    """Return what the reference of a card shows: the objects that its ``::: path`` lines name."""
    found = []
    for path in re.findall(r"^::: ([\w.]+)$", (CARDS / f"{card}.md").read_text(encoding="utf-8"), flags=re.MULTILINE):
        module, _, name = path.rpartition(".")
        found.append(getattr(importlib.import_module(module), name))
    return found


@pytest.mark.parametrize("table", TABLES)
def test_labels_differ_and_laws_are_known(table: str) -> None:
    rows = TABLES[table]
    assert len({row.label for row in rows}) == len(rows)
    assert set().union(*(row.laws for row in rows)) == set(KNOWN_LAWS[table])


@every_row
def test_a_method_is_a_frozen_dataclass_that_is_called(row: Row[Any]) -> None:
    assert dataclasses.is_dataclass(row.method)
    assert row.method.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert callable(row.method.__call__)
    assert isinstance(row.example, row.method) or callable(row.example)


@every_row
def test_a_method_has_a_card_that_documents_it(row: Row[Any]) -> None:
    assert row.method in documented(row.card)


@every_row
def test_a_method_says_in_one_sentence_what_it_is(row: Row[Any]) -> None:
    summary = (row.method.__doc__ or "").split("\n\n")[0]
    assert summary.endswith(".")
    assert "Args:" not in summary


def test_a_row_without_a_card_is_refused() -> None:
    with pytest.raises(SettingError, match="Row of Energy: card must be the name of a page in docs/methods, got ''; write the card first"):
        Row(rules.Energy, example=rules.Energy(0.9), card="")


def test_a_card_that_does_not_document_its_method_is_found() -> None:
    assert rules.Energy not in documented("dense-regularizers")
    with pytest.raises(FileNotFoundError):
        documented("no-such-card")
