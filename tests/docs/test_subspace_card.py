"""The tables of the subspace card are those of its files, and every file is of the settings that it names."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_card_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import subspace
    import subspace_report

    text = subspace_report.CARD.read_text(encoding="utf-8")
    assert text == subspace_report.render(text), "run python benchmarks/subspace_report.py"
    rows = [row for folder in ("", "balance", "tried") for row in subspace_report.read(subspace_report.RESULTS / folder)]
    assert rows
    assert all(row["digest"] == subspace.digest(row["settings"]) for row in rows)
    for row in subspace_report.read(subspace_report.RESULTS):
        settings = row["settings"]
        assert settings["knobs"] == subspace.plain(subspace.METHODS[settings["method"]]), "the settings have changed since"
        assert row["epochs"] == round(settings["epochs"] * settings["sampled"]) + round(settings["epochs"] * settings["knobs"]["share"])
        if "defect" in row:
            assert row["defect"] < 1e-6
