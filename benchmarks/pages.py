"""Write the report pages of three networks to runs/pages, and the screenshots of them in docs/plots. Needs playwright and a Chromium.

.venv/bin/python benchmarks/pages.py
"""

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from playwright.sync_api import Page, sync_playwright
from torch import nn

import spectrim as sp
from spectrim import cli
from spectrim.budget.plan import plan
from spectrim.report import write_report

ROOT = Path(__file__).resolve().parents[1]
OUT, PLOTS = ROOT / "runs" / "pages", ROOT / "docs" / "plots"


def digits() -> Path:
    """The demo: a whole run."""
    folder = OUT / "digits"
    cli.main(["run", str(ROOT / "recipes" / "digits.yaml"), "--out", str(folder), "--quiet"])
    cli.main(["report", str(folder)])
    return folder / "report.html"


def resnet20() -> Path:
    """The plan of a trained ResNet-20, with the loss on CIFAR-10."""
    file = OUT / "resnet20.json"
    if not file.exists():
        cli.main(["plan", str(ROOT / "recipes" / "cifar10_resnet20.yaml"), "--out", str(file), "--quiet"])
    return write_report(file)


def transformer() -> Path:
    """The plan of a 12-layer transformer by its weights alone; they are random ones, so no budget is kind to it."""
    file = OUT / "transformer.json"
    if not file.exists():
        torch.manual_seed(0)
        layers = [nn.TransformerEncoderLayer(192, 3, 768, batch_first=True, activation="gelu") for _ in range(12)]
        plan(nn.Sequential(*layers).eval(), torch.randn(1, 64, 192), budgets=[0.8, 0.5, 0.33], where=sp.match("*")).save(file)
    return write_report(file)


def at(section: str) -> Callable[[Page], None]:
    return lambda page: page.evaluate(f"document.getElementById('{section}').scrollIntoView({{behavior: 'instant'}})")


SHOTS: list[tuple[str, Callable[[], Path], str, tuple[int, int], str]] = [
    ("report-overview", digits, "overview", (1100, 760), "light"),
    ("report-explorer", resnet20, "explorer", (1100, 760), "light"),
    ("report-layers", resnet20, "layers", (1100, 560), "dark"),
    ("report-training", digits, "training", (1100, 760), "light"),
    ("report-phone", transformer, "explorer", (390, 760), "dark"),
]


def main() -> None:
    pages = {make: make() for make in (digits, resnet20, transformer)}
    chromium = shutil.which("chromium") or sys.exit("install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for path in pages.values():
            page = browser.new_page()
            start = time.perf_counter()
            page.goto(path.as_uri())
            page.wait_for_selector("html[data-ready]", state="attached")
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.2f} MB, interactive after {time.perf_counter() - start:.2f} s")
        for name, make, section, (width, height), scheme in SHOTS:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(pages[make].as_uri())
            page.wait_for_selector("html[data-ready]", state="attached")
            at(section)(page)
            page.wait_for_timeout(200)
            page.screenshot(path=PLOTS / f"{name}.png")
            print(f"docs/plots/{name}.png: {(PLOTS / f'{name}.png').stat().st_size / 1e3:.0f} kB")
        browser.close()


if __name__ == "__main__":
    main()
