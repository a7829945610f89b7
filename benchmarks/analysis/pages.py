"""Fill the tables of the analysis pages from the result files: no number is typed. ``--check`` only compares."""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import read, spread

DOCS = Path(__file__).resolve().parents[2] / "docs"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> str:
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + (f"\n\n*{note}*" if note else "")


def percent(values: Sequence[float]) -> str:
    return spread([100 * value for value in values])


def exactness(result: dict[str, Any]) -> str:
    rows = [
        [
            ", ".join(f"{key} {value}" for key, value in row["settings"].items()),
            row["mode"],
            f"{row['error']:.0e}",
            f"{row['least_bound']:.3f}",
            f"{row['largest_bound']:.3f}",
        ]
        for row in result["exactness"]
    ]
    note = "40 random kernels 6 x 4 x 3 x 3 (seeds 0 to 39), images of 6, 8 and 12 pixels; error against torch's layer written out."
    return table(["convolution", "padding mode", "largest error of a value", "bound / norm, least", "largest"], rows, note)


def approximation(result: dict[str, Any]) -> str:
    rows = [[str(row["size"]), spread(row["circular"]), spread(row["symbol"])] for row in result["approximation"]]
    note = "Relative l2 error of the whole spectrum under zero padding; random kernels 4 x 3 x 3 x 3, seeds 0 to 2."
    return table(["size", "circular", "symbol"], rows, note)


def spectrum(result: dict[str, Any]) -> str:
    own = result["resnet20_spectrum"]
    low, high = own["operator_over_folded"]
    counts = f"All {own['values']:,} singular values of the {own['layers']} convolutions of ResNet-20 on 32 x 32 images take "
    times = (
        f"{own['circular_s']:.2f} s by `circular` and {own['symbol_s']:.1f} s by `symbol`, the bounds of all norms {own['bounds_s']:.1f} s "
    )
    ratio = f"(processor time of one thread). The operator's norm is {low:.2f} to {high:.2f} times that of the folded kernel."
    return counts + times + ratio


def resnet20(result: dict[str, Any]) -> str:
    own = result["resnet20"]
    rows = [
        [
            f"{row['macs']:g}",
            f"{100 * row['accuracy']:.1f}",
            f"{row['bound']:.2e}",
            f"{row['lower']:.1f}",
            f"{max(row['layers'].values()):.1f}",
            f"{row['bound_s']:.1f}",
        ]
        for row in own["rows"]
    ]
    note = f"ResNet-20, CIFAR-10, cut by spectral energy, nothing trained; {own['examples']} test images, slopes at {own['near']}; n=1."
    head = ["MACs kept", "accuracy, %", "bound", "largest slope found", "largest norm of a layer", "seconds"]
    return table(head, rows, note)


def digits(result: dict[str, Any]) -> str:
    rows = []
    for limit in (None, 1.0):
        for macs in (1.0, 0.5):
            chosen = [row for row in result["digits"] if row["limit"] == limit and row["macs"] == macs]
            values = [[row["certified"][radius] for row in chosen] for radius in chosen[0]["certified"]]
            name = f"{'no limits' if limit is None else 'limits of 1'}, {macs:g}"
            cells = [
                percent([row["accuracy"] for row in chosen]),
                spread([row["bound"] for row in chosen]),
                spread([row["lower"] for row in chosen]),
            ]
            rows.append([name, *cells, *(percent(value) for value in values)])
    radii = [f"certified at {radius}, %" for radius in result["digits"][0]["certified"]]
    note = "Digits, test split, seeds 0 to 2, mean and sample standard deviation; 15 epochs; cut by spectral energy, nothing trained then."
    return table(["network, MACs kept", "accuracy, %", "bound", "largest slope found", *radii], rows, note)


Section = Callable[[dict[str, Any]], str]
SECTIONS: dict[str, dict[str, tuple[str, Section]]] = {
    "methods/convolution-spectra.md": {
        "exactness": ("spectra", exactness),
        "approximation": ("spectra", approximation),
        "spectrum": ("spectra", spectrum),
    },
    "howto/certify-a-network.md": {"resnet20": ("spectra", resnet20), "digits": ("spectra", digits)},
}
"""By page: the marks in it, the result file of each and what renders it."""


def render(page: str, text: str) -> str:
    for name, (file, section) in SECTIONS[page].items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert mark.search(text), f"{page} has no place for {name}"
        body = section(read(file))
        text = mark.sub(lambda found, body=body: f"{found[1]}\n{body}\n\n{found[2]}", text)
    return text


def outdated() -> list[str]:
    """Return the pages that are not what the result files say."""
    return [
        page for page in SECTIONS if (DOCS / page).read_text(encoding="utf-8") != render(page, (DOCS / page).read_text(encoding="utf-8"))
    ]


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(f"out of date, run python benchmarks/analysis/pages.py: {', '.join(outdated())}" if outdated() else 0)
    for page in SECTIONS:
        path = DOCS / page
        path.write_text(render(page, path.read_text(encoding="utf-8")), encoding="utf-8")
