"""The page in a real browser: what it computes is what the library computes."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_report import big, run_folder
from torch import nn

import spectrim as sp
from spectrim.budget.allocate import allocate
from spectrim.budget.budget import Budget
from spectrim.budget.distortion.energy import SpectralEnergy
from spectrim.budget.distortion.normalized import NormalizedEnergy
from spectrim.budget.plan import plan
from spectrim.errors import SettingError
from spectrim.files import read_json, write_json
from spectrim.layers import named_factors
from spectrim.metrics.measurement import measure
from spectrim.pipeline.recipe import parse_recipe
from spectrim.report import PLAN, write_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the path, such as Debian's package chromium")

SETTLED = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
"""The page solves in the next frame after an input."""

PAIR = 1 + 2.5e-4
"""Library and page each stop at 1e-4 above the least distortion; the page's distortions are 32-bit floats."""


def network() -> nn.Module:
    layers = (nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5)).eval()


@pytest.fixture(scope="module")
def low() -> nn.Module:
    torch.default_generator.manual_seed(0)
    return sp.factorize(network(), "spatial")


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def file(low: nn.Module, x: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_folder(tmp_path_factory.mktemp("page") / "net")
    plan(low, x, budgets=[0.5]).save(folder / PLAN)
    return write_report(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """A function that opens a page; afterwards nothing may have been complained about or requested but the file."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    complaints: list[str] = []
    requests: list[str] = []

    def visit(path: Path, **size: int) -> Any:
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        if size:
            page.set_viewport_size(size)
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield visit
    context.close()
    assert complaints == []
    assert all(url.startswith("file://") for url in requests)


def settle(page: Any) -> None:
    page.evaluate(SETTLED)


def move(page: Any, percent: float) -> None:
    page.evaluate(
        "(value) => { const s = document.getElementById('budget'); s.value = value; s.dispatchEvent(new Event('input')); }", percent
    )
    settle(page)


def choose(page: Any, name: str, value: str) -> None:
    page.select_option(f"#{name}", value)
    settle(page)


def ranks(page: Any) -> dict[str, int]:
    rows = page.eval_on_selector_all(".ranks tbody tr", "(rows) => rows.map((row) => [row.dataset.name, Number(row.dataset.rank)])")
    return dict(rows)


def shown(page: Any) -> dict[str, float]:
    entries = page.eval_on_selector_all("#totals [data-total]", "(all) => all.map((one) => [one.dataset.total, Number(one.dataset.value)])")
    return dict(entries)


@pytest.mark.parametrize("importance", ["SpectralEnergy", "NormalizedEnergy"])
@pytest.mark.parametrize("kind", ["macs", "params", "bytes"])
def test_slider_and_library_agree(opened: Any, file: Path, low: nn.Module, x: torch.Tensor, kind: str, importance: str) -> None:
    page = opened(file)
    method = SpectralEnergy() if importance == "SpectralEnergy" else NormalizedEnergy(x)
    distortions = method(low)
    choose(page, "kind", kind)
    choose(page, "importance", importance)
    for percent in (80.0, 61.3, 45.0):
        move(page, percent)
        got, totals = ranks(page), shown(page)
        budget = Budget(**{"size" if kind == "bytes" else kind: percent / 100})
        best = allocate(low, budget, x, importance=method)
        assert list(got) == list(best)
        lost, least = (sum(float(distortions[name][rank]) for name, rank in chosen.items()) for chosen in (got, best))
        assert least / PAIR <= lost <= least * PAIR
        real = measure(sp.merge(sp.prune(low, got)), x, latency=False)
        assert totals == {"macs": real.macs, "params": real.params, "bytes": real.size_bytes}, "what is shown is the network"
        whole = measure(sp.merge(low), x, latency=False)
        field = {"macs": "macs", "params": "params", "bytes": "size_bytes"}[kind]
        assert getattr(real, field) <= percent / 100 * getattr(whole, field)


def test_the_slider_ends_at_the_smallest_and_at_the_whole_network(opened: Any, file: Path, low: nn.Module, x: torch.Tensor) -> None:
    page = opened(file)
    move(page, 0)
    least = float(page.input_value("#budget")) / 100
    assert ranks(page) == allocate(low, Budget(macs=least), x)
    with pytest.raises(SettingError, match="at least"):
        allocate(low, Budget(macs=least - 0.001), x)
    move(page, 100)
    assert ranks(page) == {name: factors.rank for name, factors in sp.layers.named_factors(low)}


def test_pins_hold_and_the_rest_gives_way(opened: Any, file: Path, low: nn.Module, x: torch.Tensor) -> None:
    page = opened(file)
    move(page, 70)
    before, limit = ranks(page), 0.7 * measure(sp.merge(low), x, latency=False).macs  # type: ignore[operator]
    full = {name: factors.rank for name, factors in sp.layers.named_factors(low)}
    dense = next(name for name in before if 2 < before[name] < full[name])
    typed = next(name for name in before if before[name] > 2 and name != dense)
    page.click(f'tr[data-name="{dense}"] button[aria-label*="dense"]')
    settle(page)
    after = ranks(page)
    assert after[dense] == full[dense]
    assert sum(after.values()) - after[dense] < sum(before.values()) - before[dense], "others pay"
    assert shown(page)["macs"] <= limit
    page.fill(f'tr[data-name="{typed}"] input[type=number]', "2")
    page.press(f'tr[data-name="{typed}"] input[type=number]', "Enter")
    settle(page)
    move(page, 80)
    assert (ranks(page)[dense], ranks(page)[typed]) == (full[dense], 2)
    page.click("#unpin")
    settle(page)
    move(page, 70)
    assert ranks(page) == before


def test_pins_that_need_too_much_are_said(opened: Any, file: Path) -> None:
    page = opened(file)
    for button in page.query_selector_all('.ranks button[aria-label*="dense"]'):
        button.click()
        settle(page)
    move(page, 30)
    assert "pinned layers alone need more" in page.inner_text("#totals")
    assert "100.0 %" in page.inner_text("#totals [data-total=macs]")


def test_yaml_goes_through_prune_and_recipes(opened: Any, file: Path, low: nn.Module) -> None:
    page = opened(file)
    move(page, 40)
    text = page.input_value("#yaml")
    section = yaml.safe_load(text)
    mapping = section["prune"]["ranks"]
    assert mapping == ranks(page), "names stay text, even 0"
    cut = sp.prune(low, mapping)
    assert {name: factors.rank for name, factors in sp.layers.named_factors(cut)} == mapping
    recipe = {"model": "spectrim.zoo.lenet5", "data": "spectrim.zoo.digits", "loss": "torch.nn.CrossEntropyLoss"} | section
    assert parse_recipe(recipe).prune.ranks == mapping
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#copy")
    page.locator("[role=status]", has_text="copied").wait_for()  # not wait_for_function, which the page's policy keeps from polling
    assert page.evaluate("navigator.clipboard.readText()") == text


def test_keyboard_alone(opened: Any, file: Path) -> None:
    page = opened(file)
    page.focus("#budget")
    before = page.input_value("#budget")
    page.keyboard.press("ArrowRight")
    settle(page)
    assert float(page.input_value("#budget")) == pytest.approx(float(before) + 0.1)
    assert page.inner_text("#kept") == f"{float(before) + 0.1:.1f} %"
    name = next(iter(ranks(page)))
    page.focus(f'tr[data-name="{name}"] button.name')
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "layer", "the layer's name leads to its charts"
    assert f"Spectrum of {name}" in page.inner_text("#layer-charts")
    unnamed = page.eval_on_selector_all(
        "input, select, button, textarea",
        "(all) => all.filter((one) => !(one.getAttribute('aria-label') || one.textContent.trim() || one.closest('label'))).length",
    )
    assert unnamed == 0, "every control has a name"


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone_and_both_color_schemes(opened: Any, file: Path, width: int, scheme: str) -> None:
    page = opened(file, width=width, height=800)
    page.emulate_media(color_scheme=scheme)
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    assert page.get_attribute("html", "data-theme") == scheme
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") != scheme


def test_every_section_shows_the_run(opened: Any, file: Path) -> None:
    page = opened(file)
    text = page.inner_text("main")
    for words in (
        "What fell short",
        "truncated SVD",
        "± 0.250",
        "Spectrum of",
        "4-finetune",
        "right after the cut",
        "Baseline b1-truncated",
    ):
        assert words in text
    charts = page.eval_on_selector_all("#training figcaption", "(all) => all.map((one) => one.textContent)")
    assert charts[:3] == ["Loss", "Accuracy on the validation split", "Penalties, as added to the loss"]
    assert page.locator("#training .mark").count() > 0, "cuts and stages are marked"
    assert page.locator("#layers .scroll tbody tr").count() == len(json.loads((file.parent / PLAN).read_text())["skipped"])


def test_the_page_opens_with_the_verdict(opened: Any, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "net")
    result = read_json(folder / "result.json")
    told = {"size": "2.00x smaller (4 to 2 B)", "speed": "1.50x slower here (1 to 1.5 ms)", "quality": "Accuracy level (90 to 90 %)"}
    result["verdict"] = {**told, "next": "a <budget> by the clock", "warnings": ["slower than the dense network here"]}
    for name in ("dense", "final"):
        result[name] |= {"accuracy": 0.9, "targets": 100}
    write_json(folder / "result.json", result)
    page = opened(write_report(folder), width=390, height=800)
    cards = page.eval_on_selector_all(".card", "(all) => all.map((one) => [one.className, one.firstChild.textContent])")
    assert cards == [["card good", "2.00x smaller"], ["card bad", "1.50x slower here"], ["card level", "Accuracy level"]]
    text = page.inner_text("#overview")
    assert "Warning: slower than the dense network here." in text
    assert "Next: a <budget> by the clock." in text
    assert "points of accuracy below the dense network" not in text
    table = page.locator("#overview .scroll").first
    assert table.evaluate("(one) => one.scrollWidth <= one.clientWidth"), "the table fits a phone"
    assert page.locator("#overview figure .error").count() == 2, "standard errors"


def test_the_address_keeps_the_slider_and_ranks_are_copied_as_python(opened: Any, file: Path, low: nn.Module) -> None:
    page = opened(file)
    page.evaluate(
        "() => { const s = document.getElementById('budget'); s.value = 60;"
        " s.dispatchEvent(new Event('input')); s.dispatchEvent(new Event('change')); }"
    )
    settle(page)
    assert "#keep=0.600&of=macs&by=" in page.url
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.input_value("#budget") == "60"
    settle(page)
    wanted = ranks(page)
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(); }")
    page.click("#copy-python")
    settle(page)
    given = page.input_value("#yaml")
    names: dict[str, Any] = {"sp": sp, "model": network()}
    exec(given, names)
    pairs = {name: factors.rank for name, factors in named_factors(sp.prune(low, wanted))}
    assert {name: rank for name, rank in pairs.items() if name in wanted} == wanted
    assert f'"0": {wanted["0"]},' in given
    page.click(".glossary summary")
    assert "number of singular values that a layer holds" in page.inner_text(".glossary")


def test_a_chart_reads_its_lines_at_one_place_and_changes_its_axis(opened: Any, file: Path) -> None:
    page = opened(file)
    figure = page.locator("#layer-charts figure").first
    figure.locator(".u-over").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert re.fullmatch(r"index:?\s*2\s*singular value:?\s*[\d.]+", figure.locator(".u-legend").inner_text())
    over = page.locator("#training figure .u-over").first
    box = over.bounding_box()
    over.hover(position={"x": box["width"] - 4, "y": 60})
    legend = page.locator("#training .u-legend").first
    assert re.match(r"epoch:?\s*\d+\s*loss:?\s*[\d.]+", legend.inner_text())
    page.mouse.move(0, 0)
    assert not re.search(r"\d", legend.inner_text())
    seen = "() => { const { y } = document.querySelector('#layer-charts figure').chart.scales; return [y.distr, y.min, y.max]; }"
    before = page.evaluate(seen)
    assert figure.locator(".scale").get_attribute("aria-pressed") == "true"
    figure.locator(".scale").click()
    assert figure.locator(".scale").get_attribute("aria-pressed") == "false"
    settle(page)
    after = page.evaluate(seen)
    assert (before[0], after[0]) == (3, 1)
    assert after[1:] != before[1:], "other room around the values"
    page.select_option("#layer", index=1)
    assert page.locator("#layer-charts figure").first.locator(".scale").get_attribute("aria-pressed") == "false", "the choice stays"


def test_the_course_of_a_layer_and_the_steps_of_cuts(opened: Any, file: Path, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "net")
    stage = read_json(folder / "2-train" / "stage.json")
    lines = [{"ranks": {"0": 9 - epoch, "1": 2}, "defects": {"0": 0.1, "1": 0.2}} for epoch in range(3)]
    cut = {"step": 7, "epoch": 1.75, "ranks": {"0": 8, "1": 2}}
    stage["numbers"] |= {"layers": [lines, lines], "cuts": [[], [cut, cut | {"step": 8, "epoch": 2.0}]]}
    (folder / "2-train" / "stage.json").write_text(json.dumps(stage))
    page = opened(write_report(folder))
    titles = "#layer-charts figcaption"
    assert page.locator(titles).all_inner_texts() == ["Spectrum of 0", "Rank over training", "Orthogonality defect over training"]
    places, held = page.evaluate("() => document.querySelector('#layer-charts figure:nth-child(2)').chart.data")
    assert [pair for pair in zip(places, held, strict=True) if pair[1] is not None] == list(zip(range(1, 7), [9, 8, 7] * 2, strict=True))
    assert [place for place, value in zip(places, held, strict=True) if value is None] == pytest.approx([4]), "a new stage, a new line"
    marks = page.locator("#training figure:first-child .mark.step")
    assert [mark.get_attribute("title") for mark in marks.all()] == ["cut after step 7", "cut after step 8"]
    assert [float(mark.get_attribute("data-x")) for mark in marks.all()] == [3 + 1.75, 3 + 2.0]
    width = page.locator("#training figure .u-over").first.evaluate("(one) => one.clientWidth")
    shown = [float(str(mark.get_attribute("style")).split("left: ")[1].split("px")[0]) for mark in marks.all()]
    assert shown == pytest.approx([width * (3 + epoch) / 9 for epoch in (1.75, 2.0)]), "of nine epochs"
    page.select_option("#layer", label="1")
    assert page.locator(titles).all_inner_texts() == ["Rank over training", "Orthogonality defect over training"], "it has no spectrum"
    before = opened(file)
    assert not any("over training" in title for title in before.locator(titles).all_inner_texts()), "nothing of it is known"


def test_five_hundred_layers_stay_responsive(opened: Any, tmp_path: Path) -> None:
    path = write_report(big(500, 128), tmp_path / "deep.html")
    assert path.stat().st_size < 6e6
    page = opened(path)
    ready = page.evaluate("performance.now()")
    start = time.perf_counter()
    for percent in (30.0, 40.0, 50.0, 60.0):
        move(page, percent)
        assert shown(page)["macs"] <= percent / 100 * (500 * 128**2 + 1000)
        assert float(page.get_attribute("#totals [data-gap]", "data-gap")) <= 1e-4
    each = (time.perf_counter() - start) / 4
    assert ready < 8000, "a second on a free core; tests share theirs"
    assert each < 2.0, "a tenth of a second on a free core; tests share theirs"
