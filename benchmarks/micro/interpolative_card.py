"""Render the tables of ``docs/methods/interpolative.md`` from the result files: nobody types a number. ``--check`` only compares."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from report import table

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "methods" / "interpolative.md"
VARIANTS = ("pair", "rows, end", "rows, middle", "rows, gather", "columns, end", "columns, middle", "columns, gather")


def machine(result: dict[str, Any]) -> str:
    own = result["environment"]
    software = f"torch {own['versions']['torch']}, ONNX Runtime {own['versions']['onnxruntime']}"
    load = f", load average {result['load'][0]:.1f} at the end" if "load" in result else ""
    return f"\n*{own['machine']}, {own['device']}, {own['threads']} thread(s), {software}{load}.*\n"


def speed(result: dict[str, Any]) -> str:
    rows = []
    for point in result["points"]:
        cells = [
            f"{point['onnx'][key]['median']:.2f} / {point['eager'][key]['median']:.2f}" if key in point["onnx"] else "" for key in VARIANTS
        ]
        rows.append([f"{point['layer']}, {point['kept']}", *cells])
    return table(["layer, cost kept", *VARIANTS], rows) + machine(result)


def quality(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        writings = ", ".join(f"{count} {name}" for name, count in sorted(row["written"]["writings"].items()))
        values = [f"{row['pair']['nats']:.3f}", f"{row['interpolative']['nats']:.3f}", f"{row['written']['nats']:.3f}"]
        rows.append([f"{row['kept']:.2f}", *values, writings, f"{row['written']['largest_coefficient']:.1f}"])
    head = ["parameters kept", "pair", "interpolative", "the same, written", "writings", "largest coefficient"]
    settings = result["settings"]
    told = f"{settings['layers']} layers, {settings['examples']} calibration windows; dense: {result['dense_nats']:.3f} nats per token."
    return table(head, rows) + f"\n*{settings['network']}, {told}*\n"


def finetuning(result: dict[str, Any]) -> str:
    rows = [
        [f"{row['peak']:g}", *(f"{row[form][place]:.3f}" for form in ("factors", "written") for place in (0, 1))] for row in result["rows"]
    ]
    settings = result["settings"]
    told = f"{settings['steps']} steps of {settings['batch']} windows, {settings['kept']} of the linear layers kept, one seed."
    return table(["peak learning rate", "factors before", "factors after", "written before", "written after"], rows) + f"\n*{told}*\n"


SECTIONS = {"speed": ("interpolative", speed), "quality": ("interpolative-quality", quality)}
SECTIONS |= {"fine-tuning": ("interpolative-finetuning", finetuning)}


def render(page: str) -> str:
    for name, (file, section) in SECTIONS.items():
        path = HERE / "results" / f"{file}.json"
        if path.exists():
            body = section(json.loads(path.read_text(encoding="utf-8")))
            mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            assert mark.search(page), f"the page has no place for {name}"
            page = mark.sub(lambda found, body=body: f"{found[1]}\n{body}\n{found[2]}", page)
    return page


if __name__ == "__main__":
    now = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(0 if now == render(now) else f"{PAGE} is out of date: run python benchmarks/micro/interpolative_card.py")
    PAGE.write_text(render(now), encoding="utf-8")
