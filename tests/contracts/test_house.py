"""The laws of the source tree: imports, sizes, public names, and who may ask a layer for its class or touch its factors.

Bounds with a number are ratchets: lower one when the code allows it, never raise it.
"""

import ast
import importlib
import re
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import spectrim
from spectrim import budget, penalties, training
from spectrim.budget import distortion

ROOMS = (spectrim, budget, distortion, penalties, training)
ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "spectrim"
FILES = {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}

IMPORT_LAYERS = 14
MEDIAN_LINES = 120
PUBLIC_NAMES = 32
LONG = 300
"""Lines above which a file needs a reason."""

LONG_FILES = {
    "forms/svd.py": (380, "all that reads or writes U, S and Vh as such"),
    "forms/tucker.py": (330, "all that reads or writes the core and the bases of a Tucker form"),
}
"""Files of more than `LONG` lines: the most lines they may have, and why they are long."""


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


def test_no_file_outside_the_layers_asks_for_a_factorized_class() -> None:
    assert +counted(asks_for_a_factorized_class, FILES, ("layers/",)) == {}


def test_no_file_outside_forms_layers_and_penalties_touches_factors() -> None:
    assert +counted(touches_a_factor, FILES, ("forms/", "layers/", "penalties/")) == {}


def test_the_counts_see_what_they_are_for() -> None:
    text = "isinstance(a, (nn.Linear, b.FactorizedLinear)) or isinstance(b, FactorizedConv2d)\nc.U @ c.Vh * d.S + S\nisinstance(e, int)"
    assert counted(asks_for_a_factorized_class, {"a.py": text, "layers/b.py": text}, ("layers/",)) == {"a.py": 2}
    assert counted(touches_a_factor, {"a.py": text}) == {"a.py": 3}
    assert over(Counter({"a.py": 2, "b.py": 1, "c.py": 0}), {"a.py": 1, "c.py": 3}) == {"a.py": 2, "b.py": 1}


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


def test_names_are_imported_from_where_type_checkers_find_them() -> None:
    tree = ast.parse(FILES["__init__.py"])
    seen = {
        alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names if node.level == 0
    }
    public = {name: module for name, module in seen.items() if str(module).startswith("spectrim.")}
    assert {name: f"spectrim.{module}" for name, module in spectrim._MODULES.items()} == public
    assert sorted(public) == sorted(spectrim.__all__)
    assert spectrim.penalties.Hoyer is spectrim.Hoyer
    assert "compress" in dir(spectrim)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = spectrim.nothing


def test_rooms_export_what_exists_and_no_function_hides_a_module() -> None:
    """``spectrim.budget.plan`` is a module, so the room does not export the function of that name."""
    for init in sorted(SOURCE.glob("*/**/__init__.py")):
        room = importlib.import_module(".".join(("spectrim", *init.parent.relative_to(SOURCE).parts)))
        names = getattr(room, "__all__", [])
        assert all(hasattr(room, name) for name in names), room
        inside = {path.stem for path in init.parent.glob("*.py")} | {path.name for path in init.parent.iterdir() if path.is_dir()}
        assert not inside & set(names), room


def branches_on_a_class(text: str) -> list[str]:
    """Return conditions that compare with a public class: ``... if method is sp.L1 else ...``, ``if method in (sp.L1, ...)``."""
    conditions: list[ast.expr] = []
    for node in ast.walk(ast.parse(text)):
        conditions += [node.test] if isinstance(node, ast.If | ast.IfExp) else getattr(node, "ifs", [])
    compared = [node for condition in conditions for node in ast.walk(condition) if isinstance(node, ast.Compare)]
    names = {name for room in ROOMS for name in room.__all__ if name[0].isupper()}
    return [
        ast.unparse(node) for node in compared if any(getattr(part, "attr", getattr(part, "id", "")) in names for part in ast.walk(node))
    ]


def test_contract_tests_read_laws_and_do_not_branch_on_classes() -> None:
    text = "c if a is sp.L1 else d\nif b in (c, Hoyer): pass\n[a for a in b if a is not sp.Fixed]\nassert a is sp.L1\nc if a is None else d"
    assert sorted(branches_on_a_class(text)) == ["a is not sp.Fixed", "a is sp.L1", "b in (c, Hoyer)"]
    for path in sorted((ROOT / "tests" / "contracts").glob("*.py")):
        assert branches_on_a_class(path.read_text(encoding="utf-8")) == [], path.name
