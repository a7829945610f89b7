"""Latency tables that are made on another device: the file that asks, what runs there, and what is read back."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.budget import latency_table as latency_module
from spectrim.budget.device import latency_kit
from spectrim.budget.latency_table import latency_table
from spectrim.budget.table_file import read_table, save_table
from spectrim.budget.timing import Timing
from spectrim.cli import main
from spectrim.errors import FormatError, LayerError, SettingError
from spectrim.files import write_json

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()


def answered(kit: Path, table: Path) -> None:
    """Run the file as a device does: no environment, no spectrim."""
    call = [sys.executable, "-I", str(kit), str(table), "--seconds", "0.01"]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=kit.parent)
    assert not done.returncode, done.stderr


def test_a_kit_is_answered_without_this_library_and_decides_ranks(tmp_path: Path) -> None:
    low, x = sp.factorize(network()), torch.randn(2, 64)
    kit, path = latency_kit(low, x, tmp_path / "net.pyz"), tmp_path / "table.json"
    with zipfile.ZipFile(kit) as archive:
        assert not any("import spectrim" in line for line in archive.read("__main__.py").decode().splitlines())
        assert max(info.file_size for info in archive.infolist() if "-" in info.filename) < 2000  # of layers, sizes alone
    answered(kit, path)
    table, here = read_table(path), latency_table(low, x, backend="onnx", time_box=0.01)
    assert table.weights == here.weights
    assert {key: timing.ranks for key, timing in table.timings.items()} == {key: timing.ranks for key, timing in here.timings.items()}
    assert table.dense_s is not None
    assert table.machine["cpu"]
    table.limits(low)
    assert str(table).startswith("onnx, 1 thread(s), system")

    first = next(iter(table.timings))  # a second run goes on: what is timed stays, what is missing is timed
    held = json.loads(path.read_text())
    held["timings"] = {first: {"dense_s": 7.0, "ranks": [8], "pair_s": [1.0]}}
    path.write_text(json.dumps(held))
    answered(kit, path)
    again = read_table(path)
    assert again.timings[first] == Timing(7.0, (8,), (1.0,))
    assert again.timings.keys() == table.timings.keys()

    with pytest.raises(LayerError, match="was timed as Linear"):
        table.limits(sp.factorize(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))))
    with pytest.raises(SettingError, match="ends in"):
        latency_kit(low, x, tmp_path / "net.zip")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"threads": 0}, "number of threads"),
        ({"backend": "tvm"}, "backend"),
        ({"machine": {}}, "no name of the device"),
        ({"dense_s": 1e9}, "seconds outside"),
        ({"timings": {}}, "holds no timing of"),
        ({"weights": {"0": {"layer": "a", "calls": [], "multiple": 0, "most": 1}}}, "impossible ranks of '0'"),
        ({"weights": [1]}, "is not what"),
    ],
)
def test_a_table_outside_its_bounds_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    fields = {
        "backend": "onnx", "threads": 1, "machine": {"cpu": "a"}, "dense_s": 1.0, "margin": 0.05, "dense_untimed": "",
        "timings": {"k": {"dense_s": 1.0, "ranks": [8, 16], "pair_s": [0.5, 0.6]}},
        "weights": {"0": {"layer": "a", "calls": ["k"], "multiple": 8, "most": 31}},
    }  # fmt: skip
    path = tmp_path / "table.json"
    write_json(path, fields)
    assert read_table(path).break_even("0") == 24
    write_json(path, fields | change)
    with pytest.raises(FormatError, match=says):
        read_table(path)


def test_a_table_changed_on_its_way_is_refused_and_shown_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    low, path = sp.factorize(network()), tmp_path / "table.json"
    save_table(latency_table(low, torch.randn(1, 64), time_box=0.01), path)
    main(["latency", str(path)])
    assert "a pair is faster up to rank" in capsys.readouterr().out
    path.write_text(path.read_text().replace('"threads": 1', '"threads": 2'))
    with pytest.raises(FormatError, match="does not match its digest"):
        read_table(path)


def test_compress_makes_its_own_table_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def clock(operation: Any, backend: str, threads: int, time_box: float) -> Timing:
        asked.append(backend)
        macs = operation.call.macs
        return Timing(1e-6 * macs(None), operation.ranks, tuple(1e-6 * macs(rank) for rank in operation.ranks))

    monkeypatch.setattr(latency_module, "time_layer", clock)
    monkeypatch.setattr(latency_module, "time_network", lambda *_: (1e-2, ""))
    data = [(torch.randn(32, 64), torch.randint(4, (32,)))]
    how: dict[str, Any] = {"cut": "plain", "progress": False}

    def call(**more: Any) -> sp.pipeline.compressed.Compressed:
        return sp.compress(network(), data, nn.CrossEntropyLoss(), sp.Budget(latency=0.5), **how, **more)

    made = call(backend="onnx", folder=tmp_path)
    table = made.latency
    assert isinstance(table, sp.budget.LatencyTable)
    assert asked == ["onnx"]  # both hidden layers are alike
    assert table.backend == "onnx"
    assert sum(table.seconds(name, rank) or 0.0 for name, rank in made.ranks.items()) <= 0.5e-2
    assert call(backend="onnx", folder=tmp_path).latency == table
    assert asked == ["onnx"]
    assert call().latency.backend == "eager"  # type: ignore[union-attr]
    with pytest.raises(SettingError, match="left out where latency="):
        call(latency=table, backend="onnx")
