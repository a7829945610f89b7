"""What `export` refuses before it starts, how outputs are compared, and the command line."""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

import spectrim as sp
from spectrim import cli
from spectrim.errors import ExportError, FormatError, SettingError
from spectrim.pipeline.recipe import read_recipe
from spectrim.pipeline.stages import make_model
from spectrim.runtimes import run_exported
from spectrim.runtimes.export import export
from spectrim.runtimes.tensors import compare_outputs
from spectrim.tables import SUFFIXES

MODULE = """
import torch
from torch import nn
from spectrim.zoo import Batches, Splits


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def net(branching: bool = False):
    layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)] + ([Branching()] if branching else [])
    return nn.Sequential(*layers, nn.Linear(8, 3))


def data():
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    batches = Batches(x, x[:, :3].argmax(1), 4)
    return Splits(batches, batches, batches)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with a recipe and its module."""
    (tmp_path / "exportmodule.py").write_text(MODULE)
    for name, branching in (("base", False), ("branching", True)):
        model = {"class_path": "exportmodule.net", "init_args": {"branching": branching}}
        recipe = {"model": model, "data": "exportmodule.data", "loss": "torch.nn.CrossEntropyLoss", "prune": {"budget": {"macs": 0.5}}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("exportmodule", None)


def call(*args: str) -> int:
    try:
        cli.main(list(args))
    except SystemExit as left:
        return int(left.code or 0)
    return 0


# Refused before any work


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": "file.bin"}, r"path must be .*\.pt2, \.onnx, \.pte, \.xml, got 'file.bin'"),
        ({"path": "file"}, "give the file a suffix"),
        ({"path": "file.pt2", "format": "onnx"}, r"suffix \.onnx for format='onnx'"),
        ({"path": "file.pte", "max_batch": 1}, r"max_batch must be at least the batch of the inputs \(2\), got 1"),
        ({"path": "file.pt2", "tolerance": 0.0}, "tolerance must be above 0"),
        ({"path": "file.pt2", "tolerance": math.nan}, "tolerance must be above 0"),
        ({"path": "file.pt2", "threads": 0}, "threads must be an integer of at least 1"),
    ],
)
def test_settings(settings: dict[str, object], words: str, tmp_path: Path) -> None:
    path = tmp_path / str(settings.pop("path"))
    with pytest.raises(SettingError, match=words.replace("'file.bin'", ".*file.bin")):
        export(nn.Linear(4, 2), torch.randn(2, 4), path, **settings)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suffix", "extra"), [(".onnx", "onnx"), (".pte", "executorch"), (".xml", "openvino"), (".tflite", "litert")])
def test_a_missing_package_names_its_extra(suffix: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("spectrim.runtimes.formats"), "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"pip install [\w ]+, or install the extra '{extra}'"):
        export(nn.Linear(4, 2), torch.randn(2, 4), tmp_path / f"file{suffix}")
    (tmp_path / f"file{suffix}").write_bytes(b"")
    with pytest.raises(ImportError, match=rf"pip install [\w ]+, or install the extra '{extra}'"):
        run_exported(tmp_path / f"file{suffix}", torch.randn(2, 4))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_that_cannot_be_read(suffix: str, tmp_path: Path) -> None:
    for package in {
        ".onnx": ["onnxruntime"],
        ".pte": ["executorch"],
        ".xml": ["openvino"],
        ".tflite": ["ai_edge_litert", "litert_torch"],
    }.get(suffix, []):
        pytest.importorskip(package)
    path = tmp_path / f"file{suffix}"
    with pytest.raises(FormatError, match="no such file"):
        run_exported(path, torch.randn(2, 4))
    path.write_bytes(b"not a model at all")
    with pytest.raises(FormatError, match="cannot read it"):
        run_exported(path, torch.randn(2, 4))


@pytest.mark.parametrize(("suffix", "package"), [(".pt2", "torch"), (".pte", "executorch"), (".xml", "openvino")])
def test_one_flipped_bit_in_the_weights_of_a_file(suffix: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    model = nn.Linear(64, 64)
    path = export(model, torch.zeros(2, 64), tmp_path / f"file{suffix}").path
    held = path.with_suffix(".bin") if suffix == ".xml" else path
    content = held.read_bytes()
    place = content.index(model.weight.detach().numpy().tobytes()[:64]) + 7
    held.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
    with pytest.raises(FormatError, match="is damaged"):
        run_exported(path, torch.zeros(2, 64))


def test_outputs_that_are_no_tensors(tmp_path: Path) -> None:
    class Strange(nn.Module):
        def forward(self, x: Tensor) -> object:
            return object()

    with pytest.raises(ExportError, match="what the model returns holds a object"):
        export(Strange(), torch.randn(2, 4), tmp_path / "file.pt2")

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    with pytest.raises(ExportError, match="returns no tensor"):
        export(Nothing(), torch.randn(2, 4), tmp_path / "file.pt2")


# Comparing


def test_differences_are_relative_to_the_largest_magnitude_of_each_output() -> None:
    expected = [torch.tensor([1.0, -100.0]), torch.tensor([1e-3, 0.0])]
    found = [torch.tensor([2.0, -100.0]), torch.tensor([1e-3, 5e-4])]
    assert compare_outputs(found, expected) == pytest.approx(0.5, rel=1e-6)  # two float32 numbers are subtracted
    assert compare_outputs(expected, expected) == 0.0
    assert compare_outputs([10 * part for part in found], [10 * part for part in expected]) == pytest.approx(0.5, rel=1e-6)  # float32


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_must_be_the_same(odd: float) -> None:
    expected = torch.tensor([1.0, odd])
    assert compare_outputs([expected.clone()], [expected]) == 0.0
    assert compare_outputs([torch.tensor([1.0, 2.0])], [expected]) == math.inf
    assert compare_outputs([expected], [torch.tensor([1.0, 2.0])]) == math.inf
    assert compare_outputs([torch.tensor([1.0, 0.5])], [expected]) == math.inf
    for other in {math.inf, -math.inf, math.nan} - {odd}:
        if not (math.isnan(other) and math.isnan(odd)):
            assert compare_outputs([torch.tensor([1.0, other])], [expected]) == math.inf


def test_other_shapes_and_counts_differ_infinitely() -> None:
    assert compare_outputs([torch.zeros(2)], [torch.zeros(3)]) == math.inf
    assert compare_outputs([torch.zeros(2)], [torch.zeros(2), torch.zeros(2)]) == math.inf
    assert compare_outputs([torch.zeros(0)], [torch.zeros(0)]) == 0.0


# The command line


def test_of_a_recipe_and_of_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("export", "base.yaml", "--out", "dense.pt2", "--batch", "2")
    assert call(*arguments, "--json") == 0
    last = json.loads(capsys.readouterr().out)
    assert call(*arguments) == 0
    text = capsys.readouterr()
    assert (last["format"], last["path"], last["batches"]) == ("pt2", "dense.pt2", [1, 2, 3])
    assert last["difference"] <= last["tolerance"]
    assert last["size_bytes"] == (folder / "dense.pt2").stat().st_size
    assert (last["latency"]["batch"], last["eager"]["threads"]) == (2, 1)
    for words in ("largest difference", "latency in torch", "torch.export"):
        assert words in text.out

    recipe = read_recipe("base.yaml")
    model = make_model(recipe)
    low = sp.merge(sp.factorize(model, rank=2))
    (folder / "run").mkdir()
    (folder / "run" / "recipe.yaml").write_text((folder / "base.yaml").read_text())
    sp.save(low, folder / "run" / "5-merge")
    assert call("export", "run", "--format", "pt2", "--static") == 0
    x = torch.randn(1, 8)
    torch.testing.assert_close(run_exported(folder / "run" / "model.pt2", x), low(x))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["base.yaml"], 2, "the format is missing"),
        (["base.yaml", "--format", "tflite"], 2, "tflite"),
        (["base.yaml", "--out", "a.pt2", "--batch", "5"], 2, "up to 4"),
        (["base.yaml", "--out", "a.zip"], 2, "suffixes"),
        (["nothing.yaml", "--out", "a.pt2"], 2, "no such file"),
        (["branching.yaml", "--out", "a.pt2"], 1, "layer '3'"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_exit_codes(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("export", *arguments) == code
    assert words in capsys.readouterr().err
    assert not Path("a.pt2").exists()
