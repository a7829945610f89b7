"""The tables of the method card are those of the result files."""

import json
from pathlib import Path

import pytest
from scripts import error_of

ROOT = Path(__file__).resolve().parents[2]
MICRO = ROOT / "benchmarks" / "micro"


def test_the_card_is_up_to_date() -> None:
    assert error_of("micro/interpolative_card.py", "--check") == ""


def test_every_result_is_within_its_budget_and_written_networks_lose_nothing() -> None:
    quality = json.loads((MICRO / "results" / "interpolative-quality.json").read_text())
    dense = quality["settings"]["dense_params"]
    for row in quality["rows"]:
        assert max(row["pair"]["params"], row["interpolative"]["params"]) <= row["kept"] * dense
        assert row["written"]["params"] == row["interpolative"]["params"]
        assert row["written"]["nats"] == pytest.approx(row["interpolative"]["nats"], abs=1e-5)
    for point in json.loads((MICRO / "results" / "interpolative.json").read_text())["points"]:
        assert all(params <= point["kept"] for name, params in point["params"].items() if name != "dense")
