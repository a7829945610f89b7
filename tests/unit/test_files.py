"""Atomic writes, locks, reading of JSON, and what compiled code prints."""

import ctypes
import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.errors import FormatError, WriteError
from spectrim.files import (
    check_room,
    new_files,
    printing_to_stderr,
    read_json,
    sweep,
    temporary_beside,
    whole,
    whole_file,
    write_json,
    write_text,
)
from spectrim.locks import locked
from spectrim.runtimes.export import export


@pytest.mark.skipif(sys.platform == "win32", reason="there the C library cannot be told to write out what it holds")
def test_what_compiled_code_prints_goes_to_stderr_and_later_output_does_not(capfd):
    printf = ctypes.CDLL(None).printf
    print("before", flush=True)
    with printing_to_stderr(unless=b"noise"):
        printf(b"noise of a solver\nsolver at work\nnoise\n")
    os.write(1, b"after\n")
    printf(b"at the end\n")
    ctypes.CDLL(None).fflush(None)
    out, err = capfd.readouterr()
    assert out.split("\n") == ["before", "after", "at the end", ""]
    assert err == "solver at work\n"


def test_an_error_inside_gives_stdout_back(capfd):
    with pytest.raises(KeyError), printing_to_stderr(unless=b"noise"):
        raise KeyError
    os.write(1, b"back\n")
    assert capfd.readouterr() == ("back\n", "")


# Whole files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def half() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_what_the_system_refuses_is_named_with_path_and_cause(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(WriteError) as caught:
        write_text(tmp_path / "file", "text")
    assert str(caught.value).startswith(f"{tmp_path / 'file'}: cannot be written: {os.strerror(code)}")
    assert (caught.value.errno, isinstance(caught.value, OSError)) == (code, True)
    assert names(tmp_path) == []


def test_a_folder_a_pipe_or_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("mine")
    model = nn.Linear(2, 2)
    for name, words in (("folder", "is a folder"), ("pipe", "is a pipe or a device")):
        with pytest.raises(WriteError, match=words):
            write_text(tmp_path / name, "text")
    os.mkfifo(tmp_path / "pipe.pt2")
    with pytest.raises(WriteError, match="is a pipe or a device"):
        export(model, torch.zeros(2, 2), tmp_path / "pipe.pt2")
    for action in (lambda: sp.save(model, tmp_path / "file"), lambda: export(model, torch.zeros(2, 2), tmp_path / "file" / "a.pt2")):
        with pytest.raises(WriteError, match="a file has the name of this folder"):
            action()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "text"


def limited(code: str, folder: Path, size: int) -> "subprocess.CompletedProcess[str]":
    """Run Python code that may write files of a few bytes only, as on a full disk."""
    begin = "import sys, torch, spectrim as sp\nfrom pathlib import Path\nfrom torch import nn\nfolder = Path(sys.argv[1])\n"
    begin += "from spectrim.runtimes.export import export\ntorch.manual_seed(0)\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"}
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
    command = [sys.executable, "-c", begin + code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=limit, check=False)


@pytest.mark.parametrize(
    "code",
    [
        "sp.save(nn.Linear(300, 300), folder)",
        "export(nn.Linear(300, 300), torch.zeros(2, 300), folder / 'a.pt2')",
        "export(nn.Linear(300, 300), torch.zeros(2, 300), folder / 'a.onnx')",
        "sp.files.check_room = None\nsp.runtimes.export.check_room = lambda *a: None\n"
        "export(nn.Linear(300, 300), torch.zeros(2, 300), folder / 'a.pt2')",
        "import spectrim.storage.folder as f\nf.check_room = lambda *a: None\nsp.save(nn.Linear(300, 300), folder)",
        "from spectrim.files import whole_file\nwith whole_file(folder / 'a.pt') as file:\n    torch.save(torch.zeros(300, 300), file)",
    ],
)
def test_a_full_disk_is_one_clear_error(tmp_path: Path, code: str) -> None:
    if ".onnx" in code:
        pytest.importorskip("onnxruntime")
    ended = limited(code, tmp_path, 40_000)
    assert ended.returncode == 1, ended.stderr
    assert "spectrim.errors.WriteError" in ended.stderr.splitlines()[-1]
    assert str(tmp_path) in ended.stderr.splitlines()[-1]
    assert names(tmp_path) == []


def test_room_is_checked_and_given_back(tmp_path: Path) -> None:
    check_room(tmp_path, 1 << 20)
    with pytest.raises(WriteError, match="cannot be written"):
        check_room(tmp_path, 1 << 60)
    assert names(tmp_path) == []


# Temporary files and writers


def hold(path: Path, ready: "multiprocessing.synchronize.Event") -> None:
    with locked(path), temporary_beside(path / "file"), temporary_beside(path / "other", folder=True):
        ready.set()
        time.sleep(60)


def test_the_temporary_files_of_the_living_stay_and_those_of_the_dead_go(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    writer = spawn.Process(target=hold, args=(tmp_path, ready))
    writer.start()
    try:
        assert ready.wait(60)
        before = names(tmp_path)
        sweep(tmp_path)
        assert names(tmp_path) == before
        assert len(before) == 3
        with pytest.raises(WriteError, match=f"is being written by process {writer.pid} on .* since "), locked(tmp_path):
            pass
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        (tmp_path / "mine.123.tmp").write_text("not ours")
        with locked(tmp_path):
            sweep(tmp_path)
        assert names(tmp_path) == ["mine.123.tmp"]
    finally:
        writer.kill()


def test_a_second_writer_waits(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with locked(tmp_path, wait=30.0):
            order.append("second")

    with locked(tmp_path):
        with locked(tmp_path):
            order.append("the same thread")
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["the same thread", "first", "second"]
    assert names(tmp_path) == []


def test_many_writers_of_one_model(tmp_path: Path) -> None:
    models = [nn.Linear(20, 20) for _ in range(6)]
    threads = [threading.Thread(target=sp.save, args=(model, tmp_path)) for model in models for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        sp.load(tmp_path, models[0]) if (tmp_path / "spectrim.json").exists() else None
        thread.join()
    found = sp.load(tmp_path, nn.Linear(20, 20))
    assert any(torch.equal(found.weight, model.weight) for model in models)
    assert names(tmp_path) == ["model.safetensors", "spectrim.json"]


@pytest.mark.parametrize("moment", [1, 2])
def test_an_old_graph_never_stands_beside_new_weights(tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls, replace = tmp_path / "net.xml", 0, os.replace

    def put_both(text: str) -> None:
        with new_files(path) as folder:
            (folder / "net.xml").write_text(text)
            (folder / "net.bin").write_text(text)

    def stopped(*args: str) -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            raise KeyboardInterrupt
        replace(*args)

    put_both("old")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            put_both("new")
    assert not path.exists(), "no graph rather than a wrong one"
    put_both("new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"net.xml": "new", "net.bin": "new"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"a": 1'])
def test_damaged_json_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        read_json(path, "try this")
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("; try this")
    assert len(str(caught.value)) < 500


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("pipe", "is not a file"), ("missing", "is missing")):
        with pytest.raises(FormatError, match=words):
            read_json(tmp_path / name)


# Digests


@pytest.mark.parametrize("values", [{"loss": 0.5, "n": [1, 2]}, {"nan": float("nan"), "é": {"1": None}}, {}])
def test_json_is_read_back_and_every_changed_byte_of_its_content_is_noticed(tmp_path: Path, values: dict[str, Any]) -> None:
    path = tmp_path / "numbers.json"
    write_json(path, values)
    assert repr(read_json(path)) == repr(values)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            found = read_json(path)
        except FormatError:
            continue
        assert repr({name: found.get(name) for name in values}) == repr(values), "another key than the digest's was damaged"


def test_json_that_somebody_else_wrote_is_read_without_a_digest(tmp_path: Path) -> None:
    (tmp_path / "plain.json").write_text('{"loss": 0.5}')
    assert read_json(tmp_path / "plain.json") == {"loss": 0.5}


def test_keys_that_are_numbers_and_tuples_do_not_break_the_digest(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ranks": {1: (2, 3)}})
    assert read_json(tmp_path / "a.json") == {"ranks": {"1": [2, 3]}}


@pytest.mark.parametrize("folder", [False, True])
def test_a_signal_right_behind_the_making_of_a_temporary_file_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    made = whole._made

    def interrupted(path: Path, folder: bool) -> int:
        os.close(made(path, folder))
        assert path.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(whole, "_made", interrupted)
    with pytest.raises(KeyboardInterrupt), whole.temporary_beside(tmp_path / "a.pt", folder=folder):
        pass
    assert not list(tmp_path.iterdir())
