"""Whole runs on small real data: the user's own module, skipped stages, what a changed setting reruns, the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from spectrim.cli import main
from spectrim.files import read_json
from spectrim.pipeline.recipe import parse_recipe, read_recipe
from spectrim.pipeline.run import Run
from spectrim.pipeline.stages import make_model
from spectrim.storage.save import load

MODULE = """
import torch
from torch import nn
from spectrim import zoo


class Net(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        stem = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        self.features = nn.Sequential(*stem, nn.Conv2d(width, width, 3, stride=2))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def data(batch_size: int = 128):
    return zoo.digits(batch_size=batch_size)


def my_loss(output, target):
    return nn.functional.cross_entropy(output, target)
"""
STAGES = ["1-dense", "2-train", "3-prune", "4-finetune", "5-merge", "b1-truncated", "b2-continued"]


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    pytest.importorskip("sklearn")
    (tmp_path / "mynet.py").write_text(MODULE)
    recipe = {
        "model": {"class_path": "mynet.Net", "init_args": {"width": 12}},
        "data": "mynet.data",
        "loss": "mynet.my_loss",
        "dense": {"epochs": 2, "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-2}}},
        "train": [{"epochs": 1, "penalties": [{"class_path": "spectrim.Orthogonality", "init_args": {"weight": 1.0}}, "spectrim.Hoyer"]}],
        "prune": {"budget": {"macs": 0.5}, "recalibrate": True},
        "finetune": {"epochs": 1, "distill": {"temperature": 2.0}},
        "truncated": {"epochs": 1},
        "continued": {"epochs": 1},
    }
    recipe["train"][0]["penalties"][1] = {"class_path": "spectrim.Hoyer", "init_args": {"weight": 0.01}}  # type: ignore[index]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(autouse=True)
def _forget_the_users_module() -> None:
    sys.modules.pop("mynet", None)


def done(out: Path) -> dict[str, float]:
    """Return when each stage was finished."""
    return {name: (out / name / "stage.json").stat().st_mtime_ns for name in STAGES if (out / name / "stage.json").exists()}


def test_a_run_measures_everything_and_is_skipped_the_second_time(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = read_recipe(recipe_file)
    result = Run(recipe, out, progress=False).run()
    assert list(done(out)) == STAGES
    assert {"dense", "final", "truncated", "continued"} <= set(result)
    assert result["final"]["macs"] <= 0.5 * result["dense"]["macs"]
    assert result["truncated"]["macs"] <= result["final"]["macs"]
    assert result["final"]["ranks"].keys() == {"features.0", "features.3"}
    for name in ("dense", "final"):
        assert 0 < result[name]["accuracy"] <= 1
        assert result[name]["latency_s"] > 0
    assert read_json(out / "result.json") == json.loads(json.dumps(result))
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    assert written["model"]["init_args"] == {"width": 12}
    assert written["data"]["init_args"] == {"batch_size": 128}  # a default, written out
    assert written["dense"]["optimizer"]["init_args"]["betas"] == [0.9, 0.999]
    before = done(out)
    again = Run(recipe, out, progress=False).run()
    assert done(out) == before
    assert {key: again[key] for key in ("dense", "final")} == {key: result[key] for key in ("dense", "final")}
    x = torch.randn(2, 1, 8, 8)
    merged = load(out / "5-merge", make_model(recipe)).eval()
    torch.testing.assert_close(merged(x), load(out / "4-finetune", make_model(recipe)).eval()(x))


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ("finetune.epochs=2", STAGES[:3] + STAGES[6:]),
        ("train.0.penalties.1.init_args.weight=0.02", ["1-dense", "b2-continued"]),
        ("seed=3", []),
    ],
)
def test_a_changed_setting_reruns_what_depends_on_it_and_nothing_else(
    recipe_file: Path, tmp_path: Path, change: str, kept: list[str]
) -> None:
    out = tmp_path / "run"
    Run(read_recipe(recipe_file), out, progress=False).run()
    before = done(out)
    Run(read_recipe(recipe_file, [change]), out, progress=False).run()
    after = done(out)
    assert [name for name in STAGES if after[name] == before[name]] == kept


def test_a_cut_off_stage_file_reruns_the_stage(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = Run(read_recipe(recipe_file), out, progress=False).run()
    text = (out / "3-prune" / "stage.json").read_text()
    (out / "3-prune" / "stage.json").write_text(text[: len(text) // 2])
    before = done(out)
    again = Run(read_recipe(recipe_file), out, progress=False).run()
    assert [name for name in STAGES if done(out)[name] != before[name]] == ["3-prune"]
    assert again["final"]["accuracy"] == first["final"]["accuracy"]


def test_the_command_line(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spectrim(*args: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"}
        command = [sys.executable, "-m", "spectrim.cli", *args]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)

    def here(*args: str) -> tuple[int, str, str]:
        """The same in this process, which saves the imports: code, output and errors."""
        try:
            main(list(args))
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        return code, *capsys.readouterr()

    out = str(tmp_path / "run")
    ran = spectrim("run", str(recipe_file), "--out", out, "--json", "--set", "truncated=null", "--set", "continued=null")
    assert ran.returncode == 0, ran.stderr
    last = json.loads(ran.stdout)
    assert last.keys() == {"dense", "final", "verdict"}
    for name in ("dense", "final"):
        assert {"accuracy", "params", "macs", "size_bytes", "latency_s"} <= last[name].keys()
    assert last["final"]["ranks"]
    code, listed, err = here("coverage", out, "--json")
    assert code == 0, err
    rows = json.loads(listed)
    assert {row["name"] for row in rows if row["factorized"]} == {"features.0", "features.3"}
    code, measured, err = here("measure", out, "--json")
    assert code == 0, err
    assert json.loads(measured)["macs"] == last["final"]["macs"]
    bad = spectrim("run", str(recipe_file), "--out", str(tmp_path / "bad"), "--set", "dense.epochs=many")
    assert bad.returncode == 2
    assert "dense.epochs" in bad.stderr
    assert "many" in bad.stderr
    assert not (tmp_path / "bad").exists()
    (tmp_path / "empty").mkdir()
    code, _, err = here("measure", str(tmp_path / "empty"))
    assert code == 1
    assert "recipe.yaml" in err
    assert here("--version")[1].strip().startswith("spectrim")


BASE = {
    "model": "torch.nn.Identity",
    "data": "spectrim.zoo.digits",
    "loss": "torch.nn.CrossEntropyLoss",
    "prune": {"budget": {"macs": 0.5}},
}


def test_every_recipe_parses() -> None:
    recipes = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
    assert {path.stem for path in recipes} >= {
        "digits", "fashion_mnist_lenet5", "cifar10_resnet20", "cifar10_resnet20_paper", "ptb_lstm", "stories260k",
    }  # fmt: skip
    for path in recipes:
        read_recipe(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modle": "x"}, ["modle", "model"]),
        ({"dense": {"epoch": 3}}, ["dense.epoch", "epochs"]),
        ({"dense": {"epochs": -1}}, ["dense.epochs", "-1", ">= 0"]),
        ({"train": [{"epochs": "many"}]}, ["train.0.epochs", "many"]),
        ({"model": "no.such.Model"}, ["model", "no.such.Model"]),
        ({"model": "Model"}, ["model", "Model", "import path"]),
        ({"dense": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"learning_rate": 1}}}}, ["learning_rate", "lr"]),
        ({"train": [{"penalties": [{"class_path": "spectrim.Hoyer", "init_args": {"weight": -1}}]}]}, ["train.0.penalties.0", "-1"]),
        ({"prune": {}}, ["prune", "exactly one"]),
        ({"prune": {"budget": {"macs": 0.5}, "ranks": {"a": 1}}}, ["prune", "exactly one"]),
        ({"prune": {"budget": {"macs": 40}}}, ["40", "macs"]),
        ({"precision": "fp8"}, ["precision", "fp8", "bf16"]),
        ({"finetune": {"distill": {"weight": 2}}}, ["finetune.distill", "2"]),
    ],
)
def test_bad_recipes_name_the_key_what_came_and_what_is_allowed(change: dict[str, object], words: list[str]) -> None:
    from spectrim.errors import RecipeError

    with pytest.raises(RecipeError) as caught:
        parse_recipe(BASE | change)
    for word in words:
        assert word in str(caught.value)
