"""Files that somebody made to harm, or that lie where others are expected: one clear error, in little time and memory."""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import spectrim as sp
from spectrim.errors import FormatError, RecipeError, WriteError
from spectrim.files import read_json, text
from spectrim.locks import locked
from spectrim.pipeline.reading import parsed_yaml


@pytest.mark.parametrize("plan", ["[" * 100_000 + "]" * 100_000, "[]", '{"format": 1}', "{", "3", '{"format": 1, "tensors": 3}'])
def test_plans_with_a_right_digest_and_a_wrong_content(plan: str, tmp_path: Path) -> None:
    sp.save(nn.Linear(2, 2), tmp_path)
    header = {"format": "pt", "spectrim": plan, "digest": hashlib.sha256(plan.encode()).hexdigest()}
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors", metadata=header)
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        sp.load(tmp_path, nn.Linear(2, 2))


@pytest.mark.parametrize("number", ["1:" * 200_000 + "1", "1:" * 400 + "1.5", "9" * 5000])
def test_numbers_of_yaml_are_bounded(number: str) -> None:
    with pytest.raises(RecipeError, match="digits"):
        parsed_yaml(f"seed: {number}", "net.yaml")


def test_values_of_json_are_counted_before_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"a": [{}] * 20}))
    assert len(read_json(path)["a"]) == 20
    monkeypatch.setattr(text, "JSON_VALUES", 20)
    with pytest.raises(FormatError, match=r"plan\.json: is too large"):
        read_json(path)


def test_a_damaged_name_of_a_digest_is_damage(tmp_path: Path) -> None:
    text.write_json(tmp_path / "cut.json", {"how": "plain"})
    whole = (tmp_path / "cut.json").read_text()
    assert read_json(tmp_path / "cut.json") == {"how": "plain"}
    (tmp_path / "cut.json").write_text(whole.replace("sha256", "sha257").replace("plain", "other"))
    with pytest.raises(FormatError, match=r"cut\.json: is damaged"):
        read_json(tmp_path / "cut.json")


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need rights there")
def test_a_link_in_the_place_of_a_lock_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("important")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".spectrim.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(WriteError, match="symbolic link"):
        sp.save(nn.Linear(2, 2), tmp_path / "model")
    assert (tmp_path / "precious").read_text() == "important"


def fit(folder: Path) -> Any:
    model, data = nn.Linear(2, 2), [(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long))]
    return sp.fit(model, data, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters()), 1, checkpoint=folder, progress=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_second_training_with_one_checkpoint_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                fit(tmp_path)
            except WriteError as error:
                code = 0 if "is being written by process" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
    assert len(fit(tmp_path).epochs) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_what_lies_in_the_place_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match="a file has the name of this folder"):
        fit(tmp_path / "file")
    (tmp_path / "folder" / "checkpoint.pt").mkdir(parents=True)
    with pytest.raises(FormatError, match="is no regular file"):
        fit(tmp_path / "folder")
    if hasattr(os, "mkfifo"):
        (tmp_path / "pipe").mkdir()
        os.mkfifo(tmp_path / "pipe" / "checkpoint.pt")
        with pytest.raises(FormatError, match="is no regular file"):
            fit(tmp_path / "pipe")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_end_a_command_as_ctrl_c_does(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from spectrim import cli
    from spectrim.cli import commands

    number = getattr(signal, name)
    given = signal.signal(number, signal.SIG_DFL)  # a background job may inherit that it is ignored
    before = signal.getsignal(number)

    def stopped(args: Any) -> None:
        os.kill(os.getpid(), number)

    def failing(args: Any) -> None:
        try:
            stopped(args)
        finally:
            raise RuntimeError("a worker of a loader got the signal, too")

    for body in (stopped, failing):
        monkeypatch.setitem(commands.BODIES, "run", body)
        with pytest.raises(SystemExit) as ended:
            cli.main(["run", "net.yaml"])
        assert ended.value.code == 128 + number
        assert "the same command resumes" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    signal.signal(number, given)
