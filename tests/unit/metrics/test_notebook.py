"""What notebooks show: tables as HTML, and figures."""

import builtins
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.errors import SpectrimError
from spectrim.metrics.figures import figure
from spectrim.metrics.table import html_of, markdown_table


def test_tables_become_tables_and_lines_paragraphs() -> None:
    text = markdown_table([["a<b", "1"], ["c", "2"]], ["", "x"]) + "\nat most 5 & level"
    assert html_of(text) == (
        "<table><tr><th></th><th>x</th></tr><tr><th>a&lt;b</th><td>1</td></tr><tr><th>c</th><td>2</td></tr></table>"
        "<p>at most 5 &amp; level</p>"
    )
    assert html_of("") == ""


@pytest.fixture(scope="module")
def made() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    data = [(torch.randn(32, 16), torch.randint(4, (32,)))]
    return sp.compress(model, data, nn.CrossEntropyLoss(), 0.7, eval_data=data, cut="plain", progress=False)


def test_results_and_coverage_show_themselves(made: Any) -> None:
    shown = made._repr_html_()
    assert shown.count("<table>") == 1
    assert "<th>low-rank</th>" in shown
    assert "smaller (" in shown.rpartition("</table>")[2], "the verdict is below the table"
    assert made.coverage._repr_html_().count("<tr>") == len(made.coverage) + 1
    assert "<th>parameters</th>" in made.measured["final"]._repr_html_()
    assert str(made) == made.summary()
    assert "Sequential" not in repr(made)
    assert made.history._repr_html_() == "<p>no epochs</p>"


def test_coverage_names_every_layer_in_full_and_counts_those_of_vectors() -> None:
    name = "a_name_that_is_" + "very_" * 8 + "long"
    model = nn.ModuleDict({name: nn.Linear(8, 8), "a": nn.LayerNorm(8), "b": nn.LayerNorm(8), "c": nn.BatchNorm1d(8)})
    lines = sp.coverage(sp.factorize(model, where="*"))
    assert len(lines) == 4
    assert str(lines).endswith("vectors only, not listed: 2 LayerNorm, 1 BatchNorm1d")
    assert name in lines._repr_html_()
    assert "…" not in str(lines)
    assert lines[0].reason == "merges to one dense layer (at full rank; more than one cost less up to rank 3)"


def test_figures(made: Any) -> None:
    pytest.importorskip("matplotlib")
    left, right = made.plot().axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["bytes", "parameters", "MACs", "latency"]
    assert left.patches[0].get_width() == pytest.approx(made.measured["final"].size_bytes / made.measured["dense"].size_bytes)
    assert list(right.lines[0].get_ydata()) == [found["accuracy"] for found in made.scores.values()]
    made.tried = [{"budget": {"macs": 0.5}, "accuracy": 0.4, "loss": 1.0, "kept": True, "words": ""}]
    assert len(made.plot().axes) == 3


def test_a_plan_shows_itself() -> None:
    found = sp.plan(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(4, 16), budgets=[0.9, 0.7])
    assert found._repr_html_().count("<table>") == 2
    pytest.importorskip("matplotlib")
    (error,) = found.plot().axes
    assert list(error.lines[0].get_ydata())[:2] == sorted([row.totals.output_error for row in found.budgets if row.totals], reverse=True)


def test_data_frames(made: Any) -> None:
    pytest.importorskip("pandas")
    networks = made.to_pandas()
    assert networks.loc["final", "macs"] == made.measured["final"].macs < networks.loc["dense", "macs"]
    lines = made.coverage.to_pandas()
    assert list(lines.index) == [line.name for line in made.coverage]
    assert lines["rank"].dropna().tolist() == list(made.ranks.values())
    assert made.history.to_pandas().empty
    found = sp.plan(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(4, 16), budgets=[0.9, 0.01])
    assert found.to_pandas()["macs"].tolist()[0] == found.budgets[0].totals.macs
    assert found.to_pandas()["problem"].astype(bool).tolist() == [False, True]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SpectrimError, match="pip install matplotlib"):
        figure(1)
