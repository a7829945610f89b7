"""Folders: every command takes what `run` and `compress` wrote, runs no code where it need not, and names files that are damaged."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

import spectrim as sp
from spectrim import cli
from spectrim.cli.arguments import EXAMPLES, SHORT, parser
from spectrim.errors import FormatError
from spectrim.files import read_json, temporary_beside, write_json
from spectrim.locks import locked
from spectrim.metrics.verdict import Verdict
from spectrim.pipeline.folders import MANIFEST, contents
from spectrim.pipeline.run import Run

MODULE = """
import torch
from torch import nn
from spectrim.zoo import Batches, Splits


def net():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def data():
    x = torch.randn(96, 8, generator=torch.Generator().manual_seed(1))
    return Splits(*(Batches(part, part[:, :3].argmax(1), 16) for part in x.split(32)))
"""


def call(*args: str) -> int:
    try:
        cli.main(list(args))
    except SystemExit as left:
        return int(left.code or 0)
    return 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A recipe, and the folders of `run`, of `compress` and of a sweep."""
    folder = tmp_path_factory.mktemp("folders")
    (folder / "foldernet.py").write_text(MODULE)
    recipe = {"model": "foldernet.net", "data": "foldernet.data", "loss": "torch.nn.CrossEntropyLoss", "dense": {"epochs": 2}}
    (folder / "net.yaml").write_text(yaml.safe_dump(recipe | {"prune": {"budget": {"macs": 0.6}}, "finetune": {"epochs": 1}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        patch.setattr(sys.modules["spectrim.metrics.measurement"], "compare_latency", partial(sp.compare_latency, repeats=1, min_time=1e-3))
        assert call("run", "net.yaml", "--quiet", "--out", "run") == 0
        assert call("compress", "net.yaml", "--macs", "0.6", "--epochs", "1", "--quiet") == 0
        assert call("compress", "net.yaml", "--macs", "0.7,0.5", "--quiet", "--out", "sweep") == 0
        yield folder
    sys.modules.pop("foldernet", None)


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy, which is the working directory."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr(
        sys.modules["spectrim.metrics.measurement"], "compare_latency", partial(sp.compare_latency, repeats=1, min_time=1e-3)
    )
    yield tmp_path / "copy"
    sys.modules.pop("foldernet", None)


FOLDERS = ("run", "runs/net-compress-macs0.6", "sweep/macs0.7", "sweep/macs0.5")


@pytest.mark.parametrize("target", FOLDERS)
def test_every_command_takes_every_folder(folder: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = read_json(folder / target / "result.json")
    for arguments in (
        ("measure", target, "--json"),
        ("measure", target, "--json", "--split", "test"),
        ("coverage", target, "--json"),
        ("plan", target, "--json", "--quiet", "--budgets", "0.6"),
        ("export", target, "--json", "--out", "a.pt2"),
    ):
        assert call(*arguments) == 0, arguments
        found = json.loads(capsys.readouterr().out)
        if arguments[0] == "measure":
            assert {key: found[key] for key in ("macs", "accuracy", "loss")} == {
                key: result["final"][key] for key in ("macs", "accuracy", "loss")
            }
        if arguments[0] == "coverage":
            assert {row["name"]: row["rank"] for row in found if row["factorized"]} == result["final"]["ranks"]
    assert call("report", target, "--text") == 0
    assert "Accuracy and loss on the test split." in capsys.readouterr().out
    assert call("report", target) == 0
    page = (folder / target / "report.html").read_text()
    assert '"split":"test split"' in page


def test_a_sweep_is_one_table_and_its_folders_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("report", "sweep", "--text") == 0
    text = capsys.readouterr().out
    assert [line.partition(":")[0] for line in text.splitlines() if "smaller (" in line] == ["macs0.7", "macs0.5"], (
        "a verdict for each budget"
    )
    assert call("report", "sweep", "--text") == 0
    text = capsys.readouterr().out
    assert all(name in text.splitlines()[0] for name in ("dense", "macs0.7", "macs0.5"))
    assert call("export", "sweep", "--format", "pt2") == 1
    assert "pass one of the folders in it: macs0.5, macs0.7" in capsys.readouterr().err
    dense = [(folder / place / "1-dense" / "model.safetensors").read_bytes() for place in ("sweep", "sweep/macs0.7", "sweep/macs0.5")]
    assert dense[0] == dense[1] == dense[2], "trained once"


def test_another_budget_has_another_folder_and_a_second_call_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for macs in ("0.5", "0.6"):
        assert call("compress", "net.yaml", "--macs", macs, "--epochs", "1", "--quiet", "--json") == 0
        assert list(json.loads(capsys.readouterr().out)) == ["dense", "final", "verdict"]
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["net-compress-macs0.5", "net-compress-macs0.6"]


@pytest.mark.parametrize("target", [*FOLDERS, "sweep"])
def test_reading_a_finished_folder_runs_no_code(folder: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As when somebody sent it: what the recipe names would leave a mark."""
    mark = folder / "mark"
    recipe = folder / target / "recipe.yaml"
    (folder / target / "foldernet.py").write_text(f"open({str(mark)!r}, 'w')\nraise RuntimeError\n")
    recipe.write_text(recipe.read_text().replace("spectrim.zoo", "foldernet"))
    (folder / "foldernet.py").unlink()
    sys.modules.pop("foldernet", None)
    (folder / target / "plan.json").unlink(missing_ok=True)
    for arguments in (
        ("report", target),
        ("report", target, "--text"),
        *([] if target == "sweep" else [("measure", target), ("coverage", target)]),
    ):
        assert call(*arguments) == 0, arguments
        assert "calling the code" not in capsys.readouterr().err
    assert not mark.exists()
    assert "foldernet" not in sys.modules


def test_what_calls_code_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("measure", "run", "--split", "val"), ("export", "run", "--format", "pt2"), ("plan", "run", "--quiet")):
        assert call(*arguments) == 0
        assert "calling the code that run/recipe.yaml names" in capsys.readouterr().err


TARGETS = ("run", "runs/net-compress-macs0.6")
QUICK = (("measure",), ("coverage",), ("report",), ("report", "--text"))
DAMAGE = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "a list": lambda content: b"[1, 2]",
    "another mapping": lambda content: b'{"finished": true, "dense": 3, "numbers": {"val": 3}, "format": 1, "weights": 3}',
    "not text": lambda content: b"\xff\xfe" + content[:100],
    "deep": lambda content: b"[" * 50_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["another mapping"])
def test_damaged_files_are_named_in_one_clear_error(folder: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    count = 0
    for path in [path for place in TARGETS for path in (folder / place).rglob("*") if path.suffix in (".json", ".yaml")]:
        content, target = path.read_bytes(), next(place for place in TARGETS if folder / place in path.parents)
        path.write_bytes(DAMAGE[how](content))
        slow = (("plan", "--quiet", "--budgets", "0.6"), ("export", "--quiet", "--format", "pt2"), ("measure", "--split", "val"))
        needed = path.name == "spectrim.json" or path.parent == folder / target
        for command, *options in (*QUICK, *(slow if needed else ())):
            code, err = call(command, target, *options), capsys.readouterr().err
            told = [line for line in err.splitlines() if "calling the code" not in line]
            assert not told if code == 0 else len(told) == 1 and path.name in told[0], (command, path.relative_to(folder), err)
            count += 1
        path.write_bytes(content)
    assert count > 100


@pytest.mark.parametrize("how", ["half", "another mapping", "deep"])
def test_runs_over_damaged_files_end_well_or_name_them(folder: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("manifest.json", "result.json", "recipe.yaml", "measure/stage.json", "4-finetune/stage.json", "5-merge/spectrim.json"):
        path = folder / "run" / name
        content = path.read_bytes()
        path.write_bytes(DAMAGE[how](content))
        code, err = call("run", "net.yaml", "--out", "run", "--quiet"), capsys.readouterr().err
        assert code == 0 or path.name in err, name
        if code:
            path.write_bytes(content)
        else:
            assert contents(folder / "run").finished
    path = folder / "runs/net-compress-macs0.6/compress/settings.json"
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    assert call("compress", "net.yaml", "--macs", "0.6", "--epochs", "1", "--quiet") == 1
    err = capsys.readouterr().err
    assert "settings.json" in err or "holds a call with another" in err


def test_a_manifest_that_leads_outside_is_refused(folder: Path) -> None:
    path = folder / "run" / MANIFEST
    for place in ("../runs", "/etc"):
        write_json(path, read_json(path) | {"networks": {"final": place}})
        with pytest.raises(FormatError, match="names a folder outside"):
            contents(folder / "run")


# Before any work


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--macs", "1.5"),
        ("--macs", "0"),
        ("--macs", "0.5,2"),
        ("--macs", "half"),
        ("--macs", "0.5,0.5"),
        ("--macs", "0.7,0.5", "--params", "0.7,0.6,0.5"),
        ("--size-bytes", "0"),
        ("--macs", "0.5", "--squeeze", "1"),
        ("--macs", "0.5", "--epochs", "-1"),
        ("--macs", "0.5", "--set", "foo=1"),
        ("--macs", "0.001"),
        ("--max-drop", "-1"),
        ("--macs", "0.001", "--max-drop", "1"),
        ("--macs", "0.5", "--device", "tpu"),
    ],
)
def test_wrong_usage_ends_before_any_work(folder: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("compress", "net.yaml", *options, "--out", "new") == 2
    assert capsys.readouterr().out == ""
    assert not (folder / "new" / "1-dense").exists()


def test_the_smallest_network_at_most_so_much_worse(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("compress", "net.yaml", "--max-loss-rise", "0.02", "--macs", "0.9", "--cut", "whitened", "--quiet") == 0
    text = capsys.readouterr().out
    target = "runs/net-compress-macs0.9-max_loss_rise0.02"
    result = read_json(folder / target / "result.json")
    assert result["scores"][list(result["scores"])[-1]]["loss"] <= 1.02 * result["scores"]["dense"]["loss"]
    assert text.count(": allowed") + text.count(": not allowed") == len(result["tried"])
    for arguments in (("measure", target), ("coverage", target), ("report", target, "--text"), ("export", target, "--out", "a.pt2")):
        assert call(*arguments) == 0, arguments


def test_the_last_line_is_the_verdict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in FOLDERS:
        assert call("measure", target) == 0
        verdict = str(Verdict.from_dict(read_json(folder / target / "result.json")["verdict"]))
        assert capsys.readouterr().out.splitlines()[-1] == verdict
        assert "on the test split" in verdict
        assert call("report", target, "--text") == 0
        assert verdict in capsys.readouterr().out
    assert call("measure", "run", "--seed", "3", "--verbose") == 0
    assert "Next:" not in capsys.readouterr().out, "another network is measured then"


def test_help_and_version_import_no_torch() -> None:
    code = """
import sys, contextlib
from spectrim.cli import main
for argument in ("--version", "--help"):
    with contextlib.suppress(SystemExit):
        main([argument])
with contextlib.suppress(SystemExit):
    main(["compress", "--help"])
assert not {"torch", "numpy", "scipy", "rich.console"} & set(sys.modules), set(sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "run a recipe stage by stage" in found
    assert "--max-drop" in found
    assert "spectrim compress net.yaml --macs 0.7,0.5,0.35 " in found


@pytest.mark.parametrize("command", SHORT)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("--quiet", "--verbose", "examples:", f"spectrim {command} "))
    assert not re.search(r"--\w+_", text), "options have hyphens"
    assert (command in ("report", "pack", "unpack")) is ("--set" not in text)
    for line in EXAMPLES[command].splitlines():
        arguments = re.split(r"\s{2,}", line.strip())[0].split()[1:]
        assert parser().parse_args(arguments)["command"] == command


# Stopping, and two at a time


def test_signals_end_with_their_codes(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell inherits that it is ignored
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        monkeypatch.setattr(Run, "run", lambda self, number=number: os.kill(os.getpid(), number))
        before = signal.getsignal(signal.SIGTERM)
        assert call("run", "net.yaml", "--out", "run", "--quiet") == code
        assert "the same command resumes from the last checkpoint" in capsys.readouterr().err
        assert signal.getsignal(signal.SIGTERM) is before
    signal.signal(signal.SIGINT, ignored)


def test_a_second_run_in_one_folder_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held, end = threading.Event(), threading.Event()

    def other() -> None:
        with locked(folder / "run"), temporary_beside(folder / "run" / "result.json"):
            held.set()
            end.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert held.wait(60)
        assert call("run", "net.yaml", "--out", "run", "--quiet") == 1
        assert f"run: is being written by process {os.getpid()} on " in capsys.readouterr().err
        assert len(list((folder / "run").glob("*.tmp"))) == 1, "the other one's"
    finally:
        end.set()
        thread.join()
    assert call("run", "net.yaml", "--out", "run", "--quiet") == 0
    assert not list((folder / "run").rglob("*.tmp"))


# Changed numbers


@pytest.mark.parametrize("name", ["result.json", "4-finetune/stage.json", "manifest.json", "recipe.yaml"])
def test_a_changed_number_in_a_finished_folder_is_noticed(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "run" / name
    text = path.read_text()
    digit = next(place for place in range(len(text) // 2, len(text)) if text[place] in "12345678")
    path.write_text(text[:digit] + str(int(text[digit]) + 1) + text[digit + 1 :])
    assert call("report", "run", "--text") == 1
    err = capsys.readouterr().err
    assert path.name in err
    assert "does not match its digest" in err


def test_a_changed_recipe_can_be_used_elsewhere(folder: Path) -> None:
    path = folder / "run" / "recipe.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    shutil.copy(path, folder / "other.yaml")
    assert call("run", "other.yaml", "--quiet", "--out", "other") == 0
    assert contents(folder / "other").finished


def test_runs_compare_what_must_compute_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that asks its layers for their class computes something else once they are exchanged."""
    text = (folder / "foldernet.py").read_text()
    odd = """
class Odd(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x) * (1 if type(layer) in (nn.Linear, nn.ReLU) else 2)
        return x


def odd():
    return Odd(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
"""
    (folder / "oddnet.py").write_text(text + odd)
    monkeypatch.syspath_prepend(str(folder))
    recipe = yaml.safe_load((folder / "net.yaml").read_text()) | {"model": "oddnet.odd", "data": "oddnet.data", "dense": {"epochs": 0}}
    (folder / "odd.yaml").write_text(yaml.safe_dump(recipe))
    assert call("run", "odd.yaml", "--quiet", "--out", "odd") == 1
    err = capsys.readouterr().err
    assert "in the factorized network differs from that in the dense" in err
    assert not (folder / "odd" / "result.json").exists()
    sys.modules.pop("oddnet", None)
