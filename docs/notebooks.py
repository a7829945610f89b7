"""Run the notebooks in ``docs/notebooks`` and keep what they show: ``python docs/notebooks.py [NAME ...]``. Jupyter is not needed.

The files are ordinary notebooks. Cells run in one process, in a temporary folder; the last expression of a cell is shown as Jupyter shows
it: as HTML where it has a ``_repr_html_``, as an image where it is a matplotlib figure. `docs/hooks.py` makes pages of the files.
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "notebooks"


def read(path: Path) -> dict[str, Any]:
    """Return a notebook as plain data."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def shown(value: Any) -> dict[str, str]:
    """Return what Jupyter shows of a value, by MIME type."""
    if hasattr(value, "savefig"):
        image = io.BytesIO()
        value.savefig(image, format="png", dpi=80)
        return {"image/png": base64.b64encode(image.getvalue()).decode()}
    plain = {"text/plain": str(value)}
    return {"text/html": value._repr_html_()} | plain if hasattr(value, "_repr_html_") else plain


def run_cell(source: str, namespace: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Run a cell and return its outputs: what it printed, and the value of its last expression."""
    tree, value, text = ast.parse(source, name), None, io.StringIO()
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(text):
        exec(compile(tree, name, "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if text.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.getvalue()})
    if value is not None:
        outputs.append({"output_type": "display_data", "data": shown(value), "metadata": {}})
    return outputs


def run(notebook: dict[str, Any], name: str) -> list[list[dict[str, Any]]]:
    """Run all code cells in order, in the working directory, and return the outputs of each."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [run_cell("".join(cell["source"]), namespace, f"{name}, cell {number}") for number, cell in enumerate(cells, 1)]


def markdown(notebook: dict[str, Any], name: str) -> str:
    """Return a notebook as a page: text, code, and what it showed when it was run last."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```py\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                parts.append(f'<img alt="figure" src="data:image/png;base64,{data["image/png"]}">')
            elif "text/html" in data:
                parts.append(f'<div class="output">{data["text/html"]}</div>')
            else:
                parts.append(f"```text\n{data['text/plain'].rstrip()}\n```")
    return "\n\n".join(
        [*parts, f"[Download this notebook]({name}.ipynb). Run it from a clone: `pip install -c constraints.txt '.[demo,hf,plot]'`."]
    )


def main(names: list[str]) -> None:
    """Run notebooks and write their outputs into them."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        notebook, before = read(path), Path.cwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                outputs = run(notebook, path.name)
            finally:
                os.chdir(before)
        code = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
        for number, (cell, made) in enumerate(zip(code, outputs, strict=True), 1):
            cell |= {"outputs": made, "execution_count": number}
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
