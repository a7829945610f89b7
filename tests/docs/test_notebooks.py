"""The notebooks run, and show what they showed when they were written."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOOLS = runpy.run_path(str(ROOT / "docs" / "notebooks.py"))
NEEDED = {"own-cnn": ["sklearn", "matplotlib", "onnxscript", "onnxruntime"], "hugging-face-vit": ["sklearn", "matplotlib", "transformers"]}
"""Optional packages that each notebook imports."""


def kinds(outputs: list[dict[str, Any]]) -> list[list[str]]:
    """Return the kinds of the outputs of a cell."""
    return [sorted(output.get("data", {"stream": ""})) for output in outputs]


@pytest.mark.filterwarnings("ignore")  # of transformers and its optional packages
@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run_and_show_tables_and_figures(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDED[path.stem]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    notebook = TOOLS["read"](path)
    found = TOOLS["run"](notebook, path.name)
    written = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [kinds(cell) for cell in found] == [kinds(cell) for cell in written], "run python docs/notebooks.py"
    shown = [output.get("data", {}) for cell in found for output in cell]
    assert any("smaller (" in data.get("text/html", "") for data in shown), "a result shows its verdict"
    assert any("<th>break-even</th>" in data.get("text/html", "") for data in shown)
    assert any("image/png" in data for data in shown)


def test_a_cell_shows_what_it_printed_and_its_last_value() -> None:
    name, namespace = "cell", {}
    assert TOOLS["run_cell"]("a = 1\nprint(a)\na + 1", namespace, name) == [
        {"output_type": "stream", "name": "stdout", "text": "1\n"},
        {"output_type": "display_data", "data": {"text/plain": "2"}, "metadata": {}},
    ]
    assert TOOLS["run_cell"]("b = a", namespace, name) == []
    with pytest.raises(AssertionError):
        TOOLS["run_cell"]("assert b == 2", namespace, name)
