"""Generated pages are what their generators write today."""

import re
import runpy
import warnings
from pathlib import Path

import pytest
from scripts import error_of

ROOT = Path(__file__).resolve().parents[2]


def test_supported_layers_page_is_up_to_date() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that lazy layers may change
        render = runpy.run_path(str(ROOT / "docs" / "supported_layers.py"))["render"]
        assert (ROOT / "docs" / "supported-layers.md").read_text() == render(), "run python docs/supported_layers.py"


def test_a_page_that_is_not_up_to_date_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *args, **kwargs: read(path, *args, **kwargs).replace("the", "The"))
    for script in ("coded.py", "report.py", "micro/report.py"):
        assert script in error_of(script, "--check")


def test_coded_page_is_up_to_date() -> None:
    assert error_of("coded.py", "--check") == ""


def test_every_coded_file_is_within_its_budget_and_no_smaller_than_its_values_and_positions() -> None:
    import json

    paths = list((ROOT / "benchmarks" / "results" / "coded").glob("*.json"))
    assert paths
    for path in paths:
        for name, row in json.loads(path.read_text(encoding="utf-8"))["rows"].items():
            kind, *rest = name.split(" seed ")[0].rsplit(" ", 1)
            if kind in ("levels", "joint"):
                assert row["bytes"] <= int(rest[0]), (path, name)
                assert row["data_bytes"] + row["index_bytes"] <= row["bytes"], (path, name)


def test_forms_page_is_up_to_date() -> None:
    assert error_of("forms.py", "--check") == ""


def test_page_of_the_trade_off_is_up_to_date_and_calls_nothing_best_that_another_row_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import trade_off

    assert trade_off.PAGE.read_text(encoding="utf-8") == trade_off.render(), "run python benchmarks/trade_off.py --render"
    points = {"a": (80.0, 1.0, 9.0), "b": (80.0, 2.0, 3.0), "c": (70.0, 1.5, 3.0), "d": None}
    assert [[trade_off.leads(name, points, place) for name in "abc"] for place in (1, 2)] == [[True, False, False], [False, True, False]]


def test_pages_of_formats_and_measures_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import rank_measures
    import tensor_formats

    assert tensor_formats.PAGE.read_text(encoding="utf-8") == tensor_formats.page(), "run python benchmarks/tensor_formats.py --table"
    text = rank_measures.CARD.read_text(encoding="utf-8")
    assert text == rank_measures.render(text), "run python benchmarks/rank_measures.py --render"


def test_pages_from_the_tables_of_methods_are_up_to_date() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
    written = {
        path: path.read_text(encoding="utf-8")
        for path in [*(ROOT / "docs" / "reference").glob("*.md"), ROOT / "docs" / "methods" / "index.md"]
    }
    assert written == {path: render() for path, render in pages.items()}, "run python docs/generate.py"


def reference() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "reference").glob("*.md")))


def test_every_public_name_is_in_the_reference_and_every_verb_has_a_page() -> None:
    import spectrim

    text = reference()
    assert [name for name in spectrim.__all__ if f"::: spectrim.{name}\n" not in text and f"[spectrim.{name}]" not in text] == []
    assert (ROOT / "docs" / "reference" / "compress.md").read_text(encoding="utf-8") == "# compress\n\n::: spectrim.compress\n"


def test_every_name_in_the_reference_exists() -> None:
    import importlib

    for path in re.findall(r"^::: ([\w.]+)$", reference(), flags=re.MULTILINE):
        module, _, name = path.rpartition(".")
        if not module.startswith("spectrim.integrations."):  # these may need packages that are not installed
            assert hasattr(importlib.import_module(module), name), path


def test_every_page_is_in_the_navigation_once() -> None:
    yaml = pytest.importorskip("yaml")
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_multi_constructor("!ENV", lambda loader, suffix, node: None)
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    config = hooks["on_config"](yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), loader))
    assert [next(iter(tab)) for tab in config["nav"]] == ["Learn", "How-to", "Explain", "Measured", "Reference"]
    found = re.findall(r"'([\w/-]+\.md)'", str(config["nav"]))
    docs = ROOT / "docs"
    made = {*hooks["ROOT_PAGES"].values(), *(f"notebooks/{path.stem}.md" for path in (docs / "notebooks").glob("*.ipynb"))}
    assert sorted(found) == sorted({path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} | made)


def test_nothing_is_installed_by_a_bare_name_that_somebody_else_could_take() -> None:
    places = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]
    places += [*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").glob("*.md"), ROOT / "examples" / "demo.py"]
    bare = re.compile(r"(pip|uv pip|pipx|uv) (install|add)[^\n`]*?\bspectrim\b")
    assert bare.search("pip install 'spectrim[hf]'")
    assert [path for path in places if bare.search(path.read_text(encoding="utf-8"))] == []


def test_results_page_is_up_to_date() -> None:
    assert error_of("report.py", "--check") == ""


def test_every_committed_result_was_written_by_the_runner_for_its_recipe() -> None:
    yaml = pytest.importorskip("yaml")
    import json
    from dataclasses import replace

    from spectrim.pipeline.parsing import plain
    from spectrim.pipeline.recipe import read_recipe

    tasks = [path.name for path in (ROOT / "benchmarks" / "cases").iterdir()]
    results = sorted(path for path in (ROOT / "benchmarks" / "results").glob("*/*.json") if path.parent.name in tasks)
    assert results
    for path in results:
        result = json.loads(path.read_text())
        case = yaml.safe_load((ROOT / "benchmarks" / "cases" / path.parent.name / f"{path.stem}.yaml").read_text())
        assert result["case"] == case, path
        for seed, run in zip(case["seeds"], result["runs"], strict=True):
            today = plain(replace(read_recipe(ROOT / case["recipe"], [f"seed={seed}"]), code=None))
            assert given(run["recipe"]) == given(today), f"{path}: the recipe has changed since"


LATER = {"mix": 0.0, "compiled": False, "features": 0.0, "until": 1.0, "cut": "plain", "correct": False, "examples": 1024, "courses": []}
LATER |= {"every": 1}
"""Settings that came after the first results, and what they do not do by default."""


def given(settings: object) -> object:
    """Leave out what is null, and `LATER`: a setting that did not exist yet and one that is not used are the same."""
    if isinstance(settings, dict):
        return {key: given(value) for key, value in settings.items() if value is not None and (key, value) not in LATER.items()}
    return [given(value) for value in settings] if isinstance(settings, list) else settings


def test_speed_page_is_up_to_date() -> None:
    assert error_of("micro/report.py", "--check") == ""


def test_comparison_page_is_up_to_date() -> None:
    assert error_of("compare_report.py", "--check") == ""


def test_results_in_the_readme_are_those_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import readme

    text = readme.PAGE.read_text(encoding="utf-8")
    assert readme.table() in text
    assert text == readme.render(text), "run python benchmarks/readme.py"


def test_every_committed_comparison_is_of_todays_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import compare

    tasks = {path.stem: compare.read_task(path.stem) for path in sorted(compare.TASKS.glob("*.yaml"))}
    assert tasks
    for path in sorted(compare.RESULTS.glob("*/*.json")):
        result = json.loads(path.read_text())
        run = tuple(result[name] for name in ("method", "budget", "seed", "epochs"))
        assert path.stem == compare.label(*run), path
        assert result["digest"] == compare.digest(tasks[path.parent.name], *run), f"{path}: the settings have changed since"


def test_distributed_table_is_up_to_date() -> None:
    assert error_of("distributed.py", "--check") == ""


def test_int8_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import int8

    assert int8.PAGE.read_text(encoding="utf-8") == int8.render(), "run python benchmarks/int8.py --render"


def test_export_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    render = runpy.run_path(str(ROOT / "benchmarks" / "export.py"))["render"]
    assert (ROOT / "docs" / "export.md").read_text() == render(), "run python benchmarks/export.py --render"


def test_architectures_page_is_up_to_date() -> None:
    assert error_of("architectures.py", "--check") == ""


def test_recovery_table_is_that_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from recovery import BEGIN, END, PAGE, summary, table

    shown = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert shown.strip().splitlines() == [*table(), "", summary()]
    assert len(table()) > 2


def test_pruning_table_is_that_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import pruning

    text = pruning.CARD.read_text(encoding="utf-8")
    assert text == pruning.render(text), "run python benchmarks/pruning.py --render"
    assert list(pruning.RESULTS.glob("*.json"))
    for path in pruning.RESULTS.glob("*.json"):
        row = json.loads(path.read_text(encoding="utf-8"))
        assert row["digest"] == pruning.digest(row["settings"]), path
        if row["settings"]["method"] != "dense":
            assert row["settings"] == row["settings"] | pruning.METHODS[row["settings"]["method"]], (
                f"{path}: the settings have changed since"
            )
            assert row["plain"]["total_kept"] == sum(pruning.RATES[row["settings"]["rate"]].values())


def test_files_of_pruned_networks_have_the_bits_that_are_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import pruning
    import pruning_levels

    for path in pruning_levels.RESULTS.glob("*.json"):
        row = json.loads(path.read_text(encoding="utf-8"))
        assert row["digest"] == pruning.digest(row["settings"]), path
        known = pruning_levels.LEVELS.values()
        assert any(row["settings"] == row["settings"] | knobs for knobs in known), f"{path}: the settings have changed since"
        if "bytes" in row["settings"]:
            assert row["file"]["coded_bytes"] <= 1.02 * row["settings"]["bytes"], path
        else:
            bits = (("conv1", 8), ("conv2", 8), ("fc1", 4), ("fc2", 4))
            assert all(row["distinct"][f"{name}.weight"] <= most + 1 for name, most in bits)
        assert sum(row["file"][key] for key in ("data_bytes", "index_bytes")) <= row["file"]["coded_bytes"]


def test_a_pruned_network_is_the_same_function_without_what_no_output_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from spectrim import zoo

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import pruning

    torch.manual_seed(0)
    model = zoo.caffe_lenet5()
    with torch.no_grad():
        model.conv1.weight[3], model.conv2.weight[:10], model.fc1.weight[:, 400:] = 0, 0, 0  # constants, and features that nothing reads
        model.fc1.weight[5:50], model.fc2.weight[:, 100:] = 0, 0
    made, images = pruning.trimmed(model), torch.randn(8, 1, 28, 28)
    torch.testing.assert_close(made(images), model(images))
    assert int(made.conv2.weight.flatten(1).any(1).sum()) == 15  # of 50: ten were constants, 25 are not read
    assert int(made.fc1.weight.any(1).sum()) == int(made.fc2.weight.any(0).sum()) == 100 - 45
    assert int(made.fc1.bias.count_nonzero()) == 55
    assert int(made.conv2.weight[:, 3].count_nonzero()) == 0


def test_table_of_crossbars_is_that_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import crossbar
    import crossbar_structured

    card = crossbar.CARD.read_text(encoding="utf-8")
    assert list(crossbar.RESULTS.glob("lenet5-*.json"))
    assert crossbar.table() in card, "run python benchmarks/crossbar.py --render"
    assert crossbar_structured.table() in card, "run python benchmarks/crossbar_structured.py --render"
    for name, rows in crossbar_structured.rows().items():
        assert rows, name
        for row in rows:
            assert row["digest"] == crossbar_structured.digest(row["settings"])
            assert row["settings"] == row["settings"] | crossbar_structured.NETWORKS[name], f"{name}: the settings have changed since"


def test_table_of_orthonormal_factors_is_that_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import orthogonality

    assert list(orthogonality.RESULTS.glob("*.json"))
    for card, named in ((orthogonality.CARD, orthogonality.MEANS), (orthogonality.OF_DENSE, orthogonality.DENSE)):
        assert orthogonality.table(named) in card.read_text(encoding="utf-8"), "run python benchmarks/orthogonality.py --render"


def test_precision_table_is_that_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import precision

    text = precision.CARD.read_text(encoding="utf-8")
    assert text == precision.render(text), "run python benchmarks/precision.py --render"
    paths = list(precision.RESULTS.glob("*.json"))
    assert paths
    for path in paths:
        row = json.loads(path.read_text(encoding="utf-8"))
        given = row["settings"]
        today = precision.settings_of(given["network"], given["method"], given["seed"], given["full"])
        assert row["digest"] == precision.digest(given) == precision.digest(today), f"{path}: the settings have changed since"


def test_table_of_ways_is_that_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import ways

    assert len(list(ways.RESULTS.glob("*.json"))) == len(ways.NETWORKS) * len(ways.BUDGETS)
    assert ways.table() in ways.PAGE.read_text(encoding="utf-8"), "run python benchmarks/ways.py --render"
