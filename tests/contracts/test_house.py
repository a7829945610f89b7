"""The laws of the source tree: imports, sizes, public names, and who may ask a layer for its class or touch its factors.

Bounds with a number are ratchets: lower one when the code allows it, never raise it.
"""

import ast
import re
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import spectrim

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "spectrim"
FILES = {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}

IMPORT_LAYERS = 14
MEDIAN_LINES = 120
PUBLIC_NAMES = 54
LONG = 300
"""Lines above which a file needs a reason."""

LONG_FILES = {
    "budget/latency_table.py": (391, "the table, its file format and the docstring with its example"),
    "cli.py": (332, "one function and its options for each command"),
    "layers/base.py": (308, "the contract of a factorized layer, mostly documentation"),
    "pipeline/compress.py": (428, "to be split: the choice of a cut is to become a value"),
    "pipeline/recipe.py": (367, "one dataclass for each section of a recipe"),
    "pipeline/run.py": (301, "to be split: stages and baselines"),
    "runtimes/formats.py": (347, "one writer and one reader for each format"),
    "runtimes/int8.py": (532, "to be split: the quantizer, the sensitivity and the evaluation of exported files"),
    "storage/save.py": (408, "to be split: saving, loading and checking"),
    "surgery/calibrate.py": (351, "to be split: the moments and their collection"),
    "surgery/correct.py": (331, "to be split: the passes and the regression"),
    "training/fit.py": (408, "to be split: the loop and its validation"),
    "zoo/resnet.py": (305, "ResNets of three papers with the reader of their published weights"),
}
"""Files of more than `LONG` lines: the most lines they may have, and why they are long."""

CLASS_QUESTIONS = {
    "budget/costs.py": 5,
    "budget/distortion/normalized.py": 8,
    "budget/latency_table.py": 3,
    "budget/timing.py": 2,
    "integrations/pretrained.py": 1,
    "storage/save.py": 1,
    "surgery/calibrate.py": 6,
    "surgery/correct.py": 1,
    "surgery/coverage.py": 1,
    "surgery/merge.py": 3,
    "surgery/select.py": 3,
    "training/execution.py": 1,
}
"""Most ``isinstance(..., Factorized...)`` by file outside ``layers/``; none elsewhere."""

FACTOR_READS = {
    "budget/costs.py": 3,
    "budget/distortion/energy.py": 3,
    "budget/distortion/loss.py": 7,
    "budget/distortion/measured.py": 3,
    "budget/distortion/normalized.py": 3,
    "budget/latency_table.py": 1,
    "budget/timing.py": 6,
    "integrations/steps.py": 4,
    "integrations/tracking.py": 1,
    "surgery/balance.py": 6,
    "surgery/calibrate.py": 5,
    "surgery/correct.py": 6,
    "surgery/merge.py": 1,
    "surgery/optimizer_state.py": 5,
    "surgery/prune.py": 9,
    "training/checkpoint.py": 4,
    "training/history.py": 2,
    "training/squeeze.py": 2,
}
"""Most ``.U``, ``.S`` and ``.Vh`` by file outside ``forms/``, ``layers/`` and ``penalties/``; none elsewhere."""


def asks_for_a_factorized_class(node: ast.AST) -> bool:
    """Tell whether a node is ``isinstance(..., Factorized...)``, alone or in a tuple or union of classes."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"):
        return False
    names = [getattr(part, "id", getattr(part, "attr", "")) for part in ast.walk(node.args[1])]
    return any(name.startswith("Factorized") for name in names)


def touches_a_factor(node: ast.AST) -> bool:
    """Tell whether a node is ``something.U``, ``.S`` or ``.Vh``."""
    return isinstance(node, ast.Attribute) and node.attr in ("U", "S", "Vh")


def counted(question: Callable[[ast.AST], bool], files: dict[str, str], but: tuple[str, ...] = ()) -> Counter[str]:
    """Count the nodes of each file that answer yes, in the files that are in none of the folders `but`."""
    return Counter(
        {name: sum(question(node) for node in ast.walk(ast.parse(text))) for name, text in files.items() if not name.startswith(but)}
    )


def over(found: Counter[str], bounds: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in found.items() if count > bounds.get(name, 0)}


def test_no_file_outside_the_layers_asks_for_a_factorized_class_more_than_today() -> None:
    assert over(counted(asks_for_a_factorized_class, FILES, ("layers/",)), CLASS_QUESTIONS) == {}


def test_no_file_outside_forms_layers_and_penalties_touches_factors_more_than_today() -> None:
    assert over(counted(touches_a_factor, FILES, ("forms/", "layers/", "penalties/")), FACTOR_READS) == {}


def test_the_counts_see_what_they_are_for() -> None:
    text = "isinstance(a, (nn.Linear, b.FactorizedLinear)) or isinstance(b, FactorizedConv2d)\nc.U @ c.Vh * d.S + S\nisinstance(e, int)"
    assert counted(asks_for_a_factorized_class, {"a.py": text, "layers/b.py": text}, ("layers/",)) == {"a.py": 2}
    assert counted(touches_a_factor, {"a.py": text}) == {"a.py": 3}
    assert over(Counter({"a.py": 2, "b.py": 1, "c.py": 0}), {"a.py": 1, "c.py": 3}) == {"a.py": 2, "b.py": 1}


@pytest.mark.parametrize("bounds", [CLASS_QUESTIONS, FACTOR_READS], ids=["classes", "factors"])
def test_bounds_are_for_files_that_exist(bounds: dict[str, int]) -> None:
    assert set(bounds) <= set(FILES)
    assert all(bounds.values())


def test_long_files_are_few_and_have_a_reason() -> None:
    long = {name: len(text.splitlines()) for name, text in FILES.items() if len(text.splitlines()) > LONG}
    assert set(long) == set(LONG_FILES)
    assert over(Counter(long), {name: most for name, (most, _) in LONG_FILES.items()}) == {}
    assert all(reason for _, reason in LONG_FILES.values())


def test_the_median_file_is_short() -> None:
    assert statistics.median(len(text.splitlines()) for text in FILES.values()) <= MEDIAN_LINES


def test_there_is_one_import_contract_of_few_layers_that_covers_every_room() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    assert contract["type"] == "layers"
    assert not contract.get("ignore_imports")
    assert 10 <= len(contract["layers"]) <= IMPORT_LAYERS
    rooms = {name.split("/")[0].removesuffix(".py") for name in FILES} - {"__init__", "__main__"}
    assert {f"spectrim.{room}" for room in rooms} == set(re.findall(r"[\w.]+", " ".join(contract["layers"])))


def test_public_names_at_the_top_exist_and_are_no_more_than_today() -> None:
    assert len(spectrim.__all__) <= PUBLIC_NAMES
    assert len(set(spectrim.__all__)) == len(spectrim.__all__)
    assert all(hasattr(spectrim, name) for name in spectrim.__all__)


def branches_on_a_class(text: str) -> list[str]:
    """Return conditions that compare with a public class: ``... if method is sp.L1 else ...``, ``if method in (sp.L1, ...)``."""
    conditions: list[ast.expr] = []
    for node in ast.walk(ast.parse(text)):
        conditions += [node.test] if isinstance(node, ast.If | ast.IfExp) else getattr(node, "ifs", [])
    compared = [node for condition in conditions for node in ast.walk(condition) if isinstance(node, ast.Compare)]
    names = {name for name in spectrim.__all__ if name[0].isupper()}
    return [
        ast.unparse(node) for node in compared if any(getattr(part, "attr", getattr(part, "id", "")) in names for part in ast.walk(node))
    ]


def test_contract_tests_read_laws_and_do_not_branch_on_classes() -> None:
    text = "c if a is sp.L1 else d\nif b in (c, Hoyer): pass\n[a for a in b if a is not sp.Fixed]\nassert a is sp.L1\nc if a is None else d"
    assert sorted(branches_on_a_class(text)) == ["a is not sp.Fixed", "a is sp.L1", "b in (c, Hoyer)"]
    for path in sorted((ROOT / "tests" / "contracts").glob("*.py")):
        assert branches_on_a_class(path.read_text(encoding="utf-8")) == [], path.name
