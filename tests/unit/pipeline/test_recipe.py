"""Recipes: what is checked before any work, what the errors say, how changes apply, and which stages run again."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import spectrim as sp
from spectrim import cli
from spectrim.errors import FormatError, RecipeError, SettingError, UsageError
from spectrim.files import read_json
from spectrim.metrics.inputs import one_example
from spectrim.metrics.measurement import Measurement
from spectrim.pipeline import recipe as recipes
from spectrim.pipeline import run as runs
from spectrim.pipeline.components import make_loss
from spectrim.pipeline.parsing import plain
from spectrim.pipeline.recipe import parse_recipe, read_recipe
from spectrim.pipeline.run import Run
from spectrim.pipeline.stages import make_data, make_model

MODULE = '''
"""A user's own code, next to the recipe."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from spectrim.errors import SettingError


class Net(nn.Module):
    def __init__(self, width: int = 12, depth: int = 1):
        super().__init__()
        if width < 2:
            raise SettingError("Net", "width", got=width, rule=">= 2")
        self.first = nn.Linear(8, width)
        self.norm = nn.BatchNorm1d(width)
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.middle(self.norm(self.first(x))).relu())


class Data:
    def __init__(self, count, own_generator):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(3 * count, 8, generator=generator)
        y = x[:, :3].argmax(1)
        parts = [TensorDataset(a, b) for a, b in zip(x.split(count), y.split(count))]
        self.train = DataLoader(parts[0], 16, shuffle=True, generator=torch.Generator().manual_seed(5) if own_generator else None)
        self.val, self.test = DataLoader(parts[1], 16), DataLoader(parts[2], 16)


def data(count: int = 32, own_generator: bool = True) -> Data:
    return Data(count, own_generator)


def missing():
    raise FileNotFoundError("data/x: no such file")


def damaged():
    raise KeyError("row 7")


def without_val():
    found = data()
    found.val = None
    return found


def plain_loss(output, target):
    return nn.functional.cross_entropy(output, target)


def smoothed(amount: float = 0.1):
    return nn.CrossEntropyLoss(label_smoothing=amount)


def no_loss():
    return 3


class MyPenalty:
    def __init__(self, weight: float = 0.1):
        self.weight = weight

    def __call__(self, model):
        return self.weight * model.head.weight.square().sum()


def keep_two(values):
    return 2


def rule():
    return keep_two


def not_a_rule():
    return lambda values: values


VALUE = 3
'''

BASE: dict[str, Any] = {
    "model": "mymodule.Net",
    "data": "mymodule.data",
    "loss": "mymodule.plain_loss",
    "dense": {"epochs": 1},
    "train": [{"epochs": 1, "penalties": [{"class_path": "spectrim.Orthogonality", "init_args": {"weight": 1.0}}, "mymodule.MyPenalty"]}],
    "prune": {"rule": {"class_path": "spectrim.Energy", "init_args": {"keep": 0.9}}},
    "finetune": {"epochs": 1},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the user's module and the recipe, which is also the working directory; the import path is restored afterwards."""
    (tmp_path / "mymodule.py").write_text(MODULE)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    for name in [name for name in sys.modules if name.split(".")[0] in ("mymodule", "broken")]:
        del sys.modules[name]


def changed(*changes: str) -> recipes.Recipe:
    return read_recipe("base.yaml", changes)


# Errors before any work


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("foo=1", "'foo': unknown key; allowed: model, data, loss, seed, precision"),
        ("dense.epoch=3", "'dense.epoch': unknown key; allowed: epochs, optimizer, scheduler"),
        ("train.0.foo=1", "'train.0.foo': unknown key; allowed: epochs, optimizer"),
        ("prune.keep=1", "'prune.keep': unknown key; allowed: rule, budget, ranks, cut, correct, examples, recalibrate"),
        ("prune.cut=auto", "'prune.cut': got 'auto'; allowed: plain, whitened, sensitive, mixed"),
        ("prune.examples=0", "'prune.examples': got 0; allowed: >= 1"),
        ("finetune.distill.temp=1", "'finetune.distill.temp': unknown key; allowed: temperature, weight, dim"),
        ("model.foo=1", "'model': got {'class_path': 'mymodule.Net', 'foo': 1}; allowed: an import path, or {class_path"),
        ("model.init_args.foo=1", "'model.init_args.foo': unknown argument; allowed: depth, width"),
        ("dense.optimizer.init_args.foo=1", "'dense.optimizer.init_args.foo': unknown argument; allowed: amsgrad, betas, capturable"),
        ("train.0.penalties.1.init_args.foo=1", "'train.0.penalties.1.init_args.foo': unknown argument; allowed: weight"),
        ("model=null", "'model': got None; allowed: an import path"),
        ("dense.epochs=abc", "'dense.epochs': got 'abc'; allowed: an integer"),
        ("dense.epochs=1.5", "'dense.epochs': got 1.5; allowed: an integer"),
        ("dense.epochs=true", "'dense.epochs': got True; allowed: an integer"),
        ("dense.epochs=-1", "'dense.epochs': got -1; allowed: >= 0"),
        ("train.0.accumulate=0", "'train.0.accumulate': got 0; allowed: an integer of at least 1"),
        ("dense.clip=-1", "'dense.clip': got -1.0; allowed: above 0"),
        ("dense.clip=abc", "'dense.clip': got 'abc'; allowed: a number"),
        ("dense.scheduler_steps=step", "'dense.scheduler_steps': got 'step'; allowed: epoch, batch"),
        ("precision=fp8", "'precision': got 'fp8'; allowed: no, bf16, fp16"),
        ("seed=abc", "'seed': got 'abc'; allowed: an integer"),
        ("threads=-1", "'threads': got -1; allowed: >= 0"),
        ("latency_threads=0", "'latency_threads': got 0; allowed: >= 1"),
        ("train={}", "'train': got {}; allowed: a list"),
        ("train=[3]", "'train.0': got 3; allowed: a mapping with epochs"),
        ("dense=3", "'dense': got 3; allowed: a mapping with epochs"),
        ("train.0.penalties=spectrim.Hoyer", "'train.0.penalties': got 'spectrim.Hoyer'; allowed: a list"),
        ("factorize.scheme=chanel", "'factorize.scheme': got 'chanel'; allowed: auto, all, channel, spatial, input"),
        ("factorize.start=foo", "'factorize.start': got 'foo'; allowed: dense, initial"),
        ("factorize.where=middle", "'factorize.where': got 'middle'; allowed: a list"),
        ("factorize.where=[3]", "'factorize.where.0': got 3; allowed: a string"),
        ("prune.recalibrate=maybe", "'prune.recalibrate': got 'maybe'; allowed: true or false"),
        ("model=no.such.Thing", "'model.class_path': 'no.such.Thing' cannot be imported (ModuleNotFoundError: No module named 'no')"),
        ("model=mymodule.Nett", "'model.class_path': 'mymodule.Nett' cannot be imported (AttributeError"),
        ("model=Net", "'model.class_path': got 'Net'; allowed: a dotted import path"),
        ("model=mymodule.VALUE", "'model.class_path': 'mymodule.VALUE' is a int; allowed: a class or function"),
        ("model.class_path=3", "'model': got {'class_path': 3}; allowed: an import path"),
        ("model.init_args.width=wide", "'model.init_args.width': got 'wide'; allowed: int"),
        ("model.init_args=3", "'model': got {'class_path': 'mymodule.Net', 'init_args': 3}"),
        ("train.0.penalties.0.init_args.weight=-1", "'train.0.penalties.0': Orthogonality: weight must be a finite number >= 0, got -1.0"),
        ("train.0.penalties.0=spectrim.Hoyer", "'train.0.penalties.0.init_args.weight': is missing"),
        ("train.0.penalties.0=mymodule.no_loss", "'train.0.penalties.0': mymodule.no_loss gives a int; allowed: a penalty"),
        ("prune.rule.init_args.keep=90", "'prune.rule': Energy: keep must be a fraction in (0, 1], got 90.0; for 90 % write keep=0.9"),
        ("prune.rule=mymodule.not_a_rule", "'prune.rule': mymodule.not_a_rule chooses no rank (only integer tensors"),
        ("prune={}", "'prune': has none of rule, budget, ranks; allowed: exactly one"),
        ("prune.budget.macs=0.4", "'prune': has rule and budget of rule, budget, ranks; allowed: exactly one"),
        ("prune={budget: {macs: 40}}", "'prune.budget': Budget: macs must be the fraction kept, in (0, 1], got 40.0"),
        (
            "prune={budget: {}}",
            "'prune.budget': Budget: one of macs, params, size, latency, size_bytes, latency_s, tiles, "
            "tile_reads, tile_count, max_drop, max_loss_ri",
        ),
        (
            "prune={budget: {latency: 0.5}}",
            "'prune.budget.latency': needs a latency table, which a recipe does not make; allowed: macs, params",
        ),
        ("prune={budget: {macs: 0.5, latency_s: 0.5}}", "'prune.budget.latency_s': needs a latency table"),
        ("prune={budget: 0.4}", "'prune.budget': got 0.4; allowed: a mapping with macs, params"),
        ("prune={ranks: {first: x}}", "'prune.ranks.first': got 'x'; allowed: an integer"),
        ("prune={ranks: {first: 0}}", "'prune.ranks.first': got 0; allowed: >= 1"),
        ("dense.optimizer.init_args.lr=-1", "'dense.optimizer': Invalid learning rate: -1"),
        ("dense.scheduler=torch.optim.lr_scheduler.OneCycleLR", "'dense.scheduler.init_args.max_lr': is missing"),
        (
            "dense.scheduler={class_path: torch.optim.lr_scheduler.OneCycleLR, init_args: {max_lr: 1, pct_start: 3}}",
            "'dense.scheduler': Expected float between 0 and 1 pct_start",
        ),
        ("dense.scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau", "'dense.scheduler': waits for a metric"),
        ("finetune.distill.temperature=-1", "'finetune.distill': Distillation: temperature must be > 0, got -1.0"),
        ("finetune.distill.layers=middle", "'finetune.distill.layers': got 'middle'; allowed: a list"),
        ("finetune.distill.layers=[3]", "'finetune.distill.layers.0': got 3; allowed: a string"),
        ("finetune.distill.weight=2", "'finetune.distill': Distillation: weight must be a fraction in [0, 1], got 2.0"),
        ("loss=mymodule.no_loss", "'loss': mymodule.no_loss gives a int; allowed: (output, target) -> scalar"),
        ("loss=torch.nn.CrossEntropyLosss", "'loss.class_path': 'torch.nn.CrossEntropyLosss' cannot be imported"),
        ("train.1.epochs=3", "'train.1': no such entry; allowed: 0 to 0"),
        ("train.x.epochs=3", "'train.x': no such entry; allowed: 0 to 0"),
        ("dense.epochs.foo=3", "'dense.epochs.foo': cannot be set inside 1"),
        ("dense.epochs=[1", "'dense.epochs': got '[1', which is not YAML"),
        ("dense.epochs", "'dense.epochs': is not a change; allowed: KEY=VALUE, for example train.0.epochs=3"),
        ("=3", "'=3': is not a change; allowed: KEY=VALUE"),
        ("seed=99999999999999999999", "'seed': got 99999999999999999999; allowed: an integer of magnitude below 4,611,686,018,427,387,904"),
        ("code=nowhere", "'code': no folder "),
        ("model={class_path: a.b, class_path: c.d}", "'model': holds 'class_path' twice, again in line 1; allowed: each key once"),
        ("a..b=3", "'a..b=3': is not a change"),
    ],
)
def test_bad_recipes_name_the_key_what_came_and_what_is_allowed(change: str, message: str, folder: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        changed(change)
    assert str(caught.value).startswith(f"recipe key {message}"), str(caught.value)
    with pytest.raises(SystemExit) as left:
        cli.main(["run", "base.yaml", "--out", "out", "--set", change])
    assert left.value.code == 2
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("factorize.where=[nothing*]", "'factorize.where': selects no layer that can be factorized; allowed: see spectrim coverage RECIPE"),
        ("prune={ranks: {firts: 2}}", "'prune.ranks.firts': is no weight that will be factorized; allowed: first, middle"),
        ("prune={ranks: {head: 2}}", "'prune.ranks.head': is no weight that will be factorized; allowed: first, middle"),
        ("model.init_args.width=1", "'model.init_args': Net: width must be >= 2, got 1"),
        ("model=mymodule.data", "'model': mymodule.data gives a Data; allowed: a torch.nn.Module"),
        (
            "data=mymodule.without_val",
            "'data': mymodule.without_val gives a NoneType as 'val'; allowed: an iterable of batches (inputs, target)",
        ),
        ("data=mymodule.Net", "'data': mymodule.Net gives a Net without 'val'; allowed: an object with train, val, test"),
    ],
)
def test_what_needs_the_model_is_checked_before_any_work_too(change: str, message: str, folder: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        Run(changed(change), "out", progress=False)
    assert str(caught.value) == f"recipe key {message}"
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is a list; allowed: a mapping of keys"),
        ("", "is a NoneType; allowed: a mapping of keys"),
        ("a: [1", "is not YAML"),
        ("a: &a {b: *a}", "holds an alias of a value that contains it"),
        ("[" * 5000, "nested too deep"),
        ("a: 2020-99-99", "is not YAML"),
        ("loss: x.y\nseed: 1\nloss: x.z", "holds 'loss' twice, again in line 3; allowed: each key once"),
        ("a: " + "9" * 5000, "a number of 5,000 digits"),
        ("loss: x.y", "'model': is missing; allowed: an import path"),
        ("model: x.y\ndata: x.y\nloss: x.y", "'prune': has none of rule, budget, ranks"),
    ],
)
def test_files_that_are_no_recipes(text: str, message: str, folder: Path) -> None:
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        read_recipe("bad.yaml")


def bomb(levels: int, how: str) -> str:
    """YAML of a few hundred bytes whose aliases stand for ``9 ** levels`` values."""
    if how == "lists":
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    else:
        lines = ["a0: &a0 {k0: 1, k1: 1}"]
        lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], n{n}: 1}}" for n in range(1, levels)]
    return "\n".join([*lines, f"model: *a{levels - 1}", "data: x.y", "loss: x.y"])


@pytest.mark.parametrize("how", ["lists", "merges"])
def test_a_small_file_that_expands_is_refused_early(how: str, folder: Path) -> None:
    text = bomb(9, how)
    assert len(text) < 700
    (folder / "bomb.yaml").write_text(text)
    start = time.perf_counter()
    with pytest.raises(RecipeError, match="expands to too many values") as caught:
        read_recipe("bomb.yaml")
    assert time.perf_counter() - start < 1, "without the bound it takes minutes"
    assert len(str(caught.value)) < 200
    with pytest.raises(RecipeError, match="expands to too many values"):
        changed(f"model={{{', '.join(text.splitlines()[:-3])}}}")
    (folder / "few.yaml").write_text(bomb(3, how))
    with pytest.raises(RecipeError) as caught:
        read_recipe("few.yaml")
    assert len(str(caught.value)) < 2500


def test_long_values_are_cut_short_in_errors(folder: Path) -> None:
    (folder / "long.yaml").write_text(yaml.safe_dump(BASE | {"model": ["x" * 10_000] * 100}))
    with pytest.raises(RecipeError, match="'model': got") as caught:
        read_recipe("long.yaml")
    assert len(str(caught.value)) < 2000
    (folder / "large.yaml").write_text("#" * (1 << 20) + "\n")
    with pytest.raises(UsageError, match="too large for a recipe"):
        read_recipe("large.yaml")


def test_aliases_are_allowed(folder: Path) -> None:
    (folder / "alias.yaml").write_text(yaml.safe_dump(BASE) + "continued: &phase {epochs: 2}\ntruncated: *phase\n")
    assert read_recipe("alias.yaml").truncated == read_recipe("alias.yaml").continued


def test_a_file_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match=r"^nothing\.yaml: no such file; allowed: a YAML recipe"):
        read_recipe("nothing.yaml")


def test_a_users_module_that_is_broken(folder: Path) -> None:
    (folder / "broken.py").write_text("def f(:\n")
    with pytest.raises(RecipeError, match=r"'model.class_path': 'broken.f' cannot be imported \(SyntaxError"):
        changed("model=broken.f")


# What recipes may say


@pytest.mark.parametrize(
    ("change", "look", "value"),
    [
        ("dense.epochs=7", lambda r: r.dense.epochs, 7),
        (
            "train.0.penalties.0.init_args.weight=0.5",
            lambda r: r.train[0].penalties[0]["init_args"],
            {"weight": 0.5, "sample": None, "every": 1},
        ),
        (
            "train.0.penalties.0=mymodule.MyPenalty",
            lambda r: r.train[0].penalties[0],
            {"class_path": "mymodule.MyPenalty", "init_args": {"weight": 0.1}},
        ),
        ("train.0.penalties.1.init_args.weight=1e-3", lambda r: r.train[0].penalties[1]["init_args"], {"weight": 0.001}),
        ("train=[{epochs: 2}, {epochs: 3}]", lambda r: [p.epochs for p in r.train], [2, 3]),
        ("model.init_args.width=20", lambda r: r.model["init_args"], {"width": 20, "depth": 1}),
        ("data.init_args.count=16", lambda r: r.data["init_args"], {"count": 16, "own_generator": True}),
        ("dense.optimizer.init_args.lr=1e-2", lambda r: r.dense.optimizer["init_args"]["lr"], 0.01),
        ("dense.optimizer=torch.optim.RMSprop", lambda r: r.dense.optimizer["init_args"]["alpha"], 0.99),
        ("dense.clip=1e-1", lambda r: r.dense.clip, 0.1),
        ("dense.clip=2", lambda r: r.dense.clip, 2.0),
        ("precision=no", lambda r: r.precision, "no"),
        ("finetune.distill={}", lambda r: (r.finetune.distill.temperature, r.finetune.distill.weight), (4.0, 0.7)),
        ("finetune.distill.layers=[middle, last]", lambda r: r.finetune.distill.layers, ("middle", "last")),
        ("finetune.distill.weight=1", lambda r: r.finetune.distill.weight, 1.0),
        ("truncated.epochs=2", lambda r: r.truncated.epochs, 2),
        ("factorize.where=[mid*]", lambda r: r.factorize.where, ["mid*"]),
        ("prune={ranks: {middle: 3, 0: 2}}", lambda r: r.prune.ranks, {"middle": 3, "0": 2}),
        ("prune={budget: {params: 1}}", lambda r: r.prune.budget, sp.Budget(params=1.0)),
        ("prune.rule=mymodule.rule", lambda r: r.prune.rule, {"class_path": "mymodule.rule", "init_args": {}}),
        ("loss=torch.nn.CrossEntropyLoss", lambda r: r.loss["init_args"]["reduction"], "mean"),
        (
            "dense.scheduler=torch.optim.lr_scheduler.CosineAnnealingLR",
            lambda r: r.dense.scheduler["init_args"],
            {"eta_min": 0.0, "last_epoch": -1},
        ),
    ],
)
def test_changes_on_nested_keys_and_lists(change: str, look: Callable[[Any], Any], value: Any) -> None:
    assert look(changed(change)) == value


def test_later_changes_win_and_the_file_stays_as_it_is(folder: Path) -> None:
    before = (folder / "base.yaml").read_bytes()
    assert changed("dense.epochs=3", "dense.epochs=4", "prune.rule=null", "prune.budget.macs=0.3").dense.epochs == 4
    assert (folder / "base.yaml").read_bytes() == before


def test_every_default_is_written_out_and_read_back_the_same(folder: Path) -> None:
    recipe = changed("finetune.distill={}", "dense.scheduler=torch.optim.lr_scheduler.CosineAnnealingLR", "truncated={}")
    written = plain(recipe)
    assert parse_recipe(written) == recipe
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(written))) == recipe
    assert set(written) == set(recipes.Recipe.__dataclass_fields__)
    assert written["dense"]["optimizer"]["init_args"]["betas"] == [0.9, 0.999]
    assert written["model"]["init_args"] == {"width": 12, "depth": 1}
    assert written["truncated"]["accumulate"] == 1
    assert "T_max" not in written["dense"]["scheduler"]["init_args"], "filled in when the number of steps is known"


@pytest.mark.parametrize(
    ("loss", "amount"),
    [
        ("mymodule.plain_loss", 0.0),
        ("torch.nn.functional.cross_entropy", 0.0),
        ("torch.nn.CrossEntropyLoss", 0.0),
        ("{class_path: torch.nn.CrossEntropyLoss, init_args: {label_smoothing: 0.2}}", 0.2),
        ("mymodule.smoothed", 0.1),
        ("{class_path: mymodule.smoothed, init_args: {amount: 0.3}}", 0.3),
    ],
)
def test_a_loss_is_a_function_or_a_class_or_made_by_a_function(loss: str, amount: float) -> None:
    output, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    found = make_loss(changed(f"loss={loss}").loss)(output, target)
    assert torch.equal(found, nn.functional.cross_entropy(output, target, label_smoothing=amount))


def test_the_model_is_seeded_and_the_example_is_one(folder: Path) -> None:
    a, b, c = (make_model(changed(change)) for change in ("seed=1", "seed=1", "seed=2"))
    assert torch.equal(a.first.weight, b.first.weight)
    assert not torch.equal(a.first.weight, c.first.weight)
    assert one_example(make_data(changed("seed=1")).val).shape == (1, 8)
    nested = one_example([((torch.zeros(5, 2), {"a": torch.zeros(5), "b": [torch.zeros(5), "text"]}), None)])
    assert nested[0].shape == (1, 2)
    assert nested[1]["a"].shape == nested[1]["b"][0].shape == (1,)
    assert nested[1]["b"][1] == "text"


# Stages


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time models for a moment only."""
    monkeypatch.setattr(
        sys.modules["spectrim.metrics.measurement"], "compare_latency", partial(sp.compare_latency, repeats=1, min_time=1e-3)
    )


STAGES = ["1-dense", "2-train", "3-prune", "4-finetune", "5-merge", "b1-truncated", "b2-continued", "measure"]
BASELINES = ("truncated.epochs=1", "continued.epochs=1")


def stamps(out: Path) -> dict[str, int]:
    return {name: (out / name / "stage.json").stat().st_mtime_ns for name in STAGES if (out / name / "stage.json").exists()}


@pytest.mark.usefixtures("quick")
def test_a_changed_setting_reruns_exactly_what_depends_on_it(folder: Path) -> None:
    out = folder / "out"
    result = Run(changed(*BASELINES), out, progress=False).run()
    assert list(stamps(out)) == STAGES
    assert read_json(out / "result.json") == json.loads(json.dumps(result))
    assert not list(out.rglob("*.tmp"))
    for changes, rerun in (
        ([], []),
        (["threads=1"], []),
        (["latency_threads=2"], ["measure"]),
        (["continued.epochs=2"], ["b2-continued", "measure"]),
        (["continued.epochs=2", "truncated.epochs=2"], ["b1-truncated", "measure"]),
        (["finetune.epochs=2"], [*STAGES[3:]]),
        (["prune.rule.init_args.keep=0.8"], [*STAGES[2:6], "measure"]),
        (["factorize.scheme=channel"], [*STAGES[1:6], "measure"]),
        (["precision=bf16"], STAGES),
    ):
        before = stamps(out)
        again = Run(changed(*BASELINES, *changes), out, progress=False).run()
        assert [name for name in STAGES if stamps(out)[name] != before[name]] == rerun, changes
        assert yaml.safe_load((out / "recipe.yaml").read_text()) == plain(changed(*BASELINES, *changes))
        assert again["recipe"] == plain(changed(*BASELINES, *changes)) | {"code": None}, "a result names no folder of this machine"


@pytest.mark.usefixtures("quick")
def test_the_result(folder: Path) -> None:
    out = folder / "out"
    result = Run(changed(), out, progress=False).run()
    assert set(result) == {"dense", "final", "stages", "recipe", "environment", "verdict"}
    for name in ("dense", "final"):
        assert {field.name for field in fields(Measurement)} == set(result[name])
        assert result[name]["batch"] == result[name]["threads"] == 1
    assert result["dense"]["ranks"] == {}
    assert result["dense"]["macs"] == 8 * 12 + 12 * 12 + 12 * 3
    cut = sp.load(out / "4-finetune", make_model(changed()))
    assert result["final"]["ranks"] == result["stages"]["3-prune"]["ranks"] == {name: f.rank for name, f in sp.layers.named_factors(cut)}
    assert result["final"]["macs"] == sp.measure(sp.merge(cut), torch.zeros(1, 8), latency=False).macs
    test = sp.evaluate(sp.load(out / "5-merge", make_model(changed())), make_data(changed()).test, nn.functional.cross_entropy)
    assert {key: result["final"][key] for key in test} == test
    stages = result["stages"]
    assert list(stages) == STAGES[:5]
    assert len(stages["1-dense"]["epochs"]) == len(stages["4-finetune"]["epochs"]) == 1
    assert set(stages["2-train"]["phases"][0][0]) >= {"loss", "Orthogonality", "MyPenalty", "mean_rank", "eval_loss", "eval_accuracy"}
    assert set(stages["2-train"]["spectra"]) == {"first", "middle"}
    assert {"python", "torch", "spectrim"} <= set(result["environment"]["versions"])


@pytest.mark.usefixtures("quick")
def test_a_recipe_written_out_is_the_same_run(folder: Path) -> None:
    out = folder / "out"
    Run(changed(), out, progress=False).run()
    before = stamps(out)
    Run(read_recipe(out / "recipe.yaml"), out, progress=False).run()
    assert stamps(out) == before


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("stage", ["1-dense", "2-train", "4-finetune"])
def test_a_run_stopped_inside_a_stage_ends_with_the_same_bits(folder: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader has a generator of its own: what it drew in a stage that is skipped now must not matter."""
    twice = [f"{key}.epochs=2" for key in ("dense", "train.0", "finetune")] + ["train.0.clip=1.0"]
    whole = Run(changed(*twice), folder / "whole", progress=False).run()
    fit, calls = runs.fit, 0  # type: ignore[attr-defined]

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == {"1-dense": 1, "2-train": 2, "4-finetune": 3}[stage]:
            fit(*args, **kwargs | {"epochs": 1})
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "fit", stopping)
        with pytest.raises(KeyboardInterrupt):
            Run(changed(*twice), folder / "stopped", progress=False).run()
    Run(changed(*twice), folder / "stopped", progress=False).run()
    for name in STAGES[:5]:
        a, b = (sp.load(folder / run / name, make_model(changed())).state_dict() for run in ("whole", "stopped"))
        assert all(torch.equal(a[key], b[key]) for key in a), name
    resumed = read_json(folder / "stopped" / "result.json")
    assert {key: resumed["final"][key] for key in ("accuracy", "loss")} == {key: whole["final"][key] for key in ("accuracy", "loss")}


@pytest.mark.usefixtures("quick")
def test_damaged_stages(folder: Path) -> None:
    out = folder / "out"
    first = Run(changed(), out, progress=False).run()
    whole = (out / "4-finetune" / "stage.json").read_text()
    for text in (whole[: len(whole) // 2], "", "[]", "{}", json.dumps({**json.loads(whole), "finished": False})):
        (out / "4-finetune" / "stage.json").write_text(text)
        before = stamps(out)
        again = Run(changed(), out, progress=False).run()
        assert [name for name in stamps(out) if stamps(out)[name] != before[name]] == ["4-finetune"]
        assert again["final"]["loss"] == first["final"]["loss"]
    weights = out / "2-train" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(FormatError, match=r"2-train: the stage is finished but cannot be read \(.*model.safetensors.*delete the folder"):
        Run(changed(), out, progress=False).run()


@pytest.mark.usefixtures("quick")
def test_ranks_and_budgets_are_what_the_recipe_says(folder: Path) -> None:
    result = Run(changed("prune={ranks: {middle: 3}}"), folder / "ranks", progress=False).run()
    assert result["final"]["ranks"] == {"first": 8, "middle": 3}
    result = Run(changed("prune={budget: {macs: 0.7}, recalibrate: true}", "truncated.epochs=0"), folder / "budget", progress=False).run()
    assert result["final"]["macs"] <= 0.7 * result["dense"]["macs"]
    assert result["truncated"]["macs"] <= result["final"]["macs"]
    assert set(result["stages"]["3-prune"]) >= {"val", "val_cut"}
    assert result["stages"]["3-prune"]["val"] != result["stages"]["3-prune"]["val_cut"], "statistics of BatchNorm were renewed"
    with pytest.raises(SettingError, match=r"macs must be at least 0\.\d+ for this network, got 0.01"):
        Run(changed("prune={budget: {macs: 0.01}}"), folder / "small", progress=False).run()


@pytest.mark.usefixtures("quick")
def test_a_recipe_cuts_as_far_as_a_loss_may_rise(folder: Path) -> None:
    recipe = changed("prune={budget: {macs: 0.9, max_loss_rise: 0.02}}", "finetune.epochs=0", "truncated=null")
    stages = Run(recipe, folder / "search", progress=False).run()["stages"]
    tried = stages["3-prune"]["tried"]
    assert stages["3-prune"]["val_cut"]["loss"] <= 1.02 * stages["2-train"]["val"]["loss"]
    assert {one["kept"] for one in tried} == {True, False}
    assert all(one["budget"]["macs"] <= 0.9 for one in tried)


@pytest.mark.usefixtures("quick")
def test_a_cut_is_calibrated_where_the_recipe_says_so(folder: Path) -> None:
    cuts = {}
    for name, how in {
        "plain": "",
        "refit": "correct: true,",
        "whitened": "cut: whitened,",
        "sensitive": "cut: sensitive, examples: 8,",
    }.items():
        recipe = changed(f"prune={{{how} ranks: {{middle: 2}}}}", "train.0.epochs=0")
        stages = Run(recipe, folder / name, progress=False).run()["stages"]
        assert stages["3-prune"]["ranks"] == {"first": 8, "middle": 2}
        cuts[name] = sp.load(folder / name / "3-prune", make_model(recipe))
    before = sp.load(folder / "plain" / "2-train", make_model(recipe)).eval()
    x = torch.cat([inputs for inputs, _ in make_data(recipe).train])
    with torch.no_grad():
        read = before.norm(before.first(x))  # what the middle layer reads: it alone is cut
        errors = {name: float((net.middle(read) - before.middle(read)).square().sum()) for name, net in cuts.items()}
    assert errors["whitened"] < errors["plain"]
    assert errors["refit"] == pytest.approx(errors["whitened"], rel=1e-3)  # both are the optimum of that rank
    assert len({round(error, 4) for error in errors.values()}) == 3, "the loss is harmed least by another cut"


@pytest.mark.usefixtures("quick")
def test_ranks_fall_in_the_course_of_a_phase(folder: Path) -> None:
    ramp = "train.0.courses=[{class_path: spectrim.Ramp, init_args: {target: {macs: 0.7}, end: 1.0, cuts: 2}}]"
    recipe = changed(ramp, "train.0.epochs=2", "prune={rule: {class_path: spectrim.Energy, init_args: {keep: 1.0}}}")
    assert recipe.train[0].courses[0]["init_args"]["begin"] == 0.0
    result = Run(recipe, folder / "ramp", progress=False).run()
    ranks = [line["mean_rank"] for line in result["stages"]["2-train"]["phases"][0]]
    assert (8 + 12) / 2 == ranks[0] > ranks[1]  # both cuts fall into the second epoch
    assert result["final"]["macs"] <= 0.7 * result["dense"]["macs"]
    with pytest.raises(RecipeError, match=r"'dense\.courses': given where nothing is left to cut"):
        changed(ramp.replace("train.0", "dense"))
    with pytest.raises(RecipeError, match=r"courses.*end"):
        changed(ramp.replace("end: 1.0", "end: 7.0"))


@pytest.mark.usefixtures("quick")
def test_a_phase_trains_toward_its_budget(folder: Path) -> None:
    squeeze = "train.0.courses=[{class_path: spectrim.training.squeeze.Squeeze, init_args: {budget: {macs: 0.7}, updates: 3}}]"
    recipe = changed(squeeze, "train.0.epochs=2", "prune={rule: {class_path: spectrim.Energy, init_args: {keep: 1.0}}}")
    assert recipe.train[0].courses[0]["init_args"]["end"] == 0.6
    result = Run(recipe, folder / "squeeze", progress=False).run()
    lines = result["stages"]["2-train"]["phases"][0]
    assert lines[0]["Squeeze"] > 0
    assert result["final"]["macs"] <= 0.7 * result["dense"]["macs"]
    with pytest.raises(RecipeError, match=r"courses.*left"):
        changed(squeeze.replace("updates: 3", "left: 7.0"))


@pytest.mark.usefixtures("quick")
def test_a_random_start_ignores_the_dense_stage(folder: Path) -> None:
    Run(changed("factorize.start=initial", "train.0.epochs=0"), folder / "out", progress=False).run()
    low = sp.load(folder / "out" / "2-train", make_model(changed()))
    torch.testing.assert_close(low.middle.dense_weight("weight"), make_model(changed()).middle.weight)


# The command line


def call(*args: str) -> int:
    try:
        cli.main(list(args))
    except SystemExit as left:
        return int(left.code or 0)
    return 0


@pytest.mark.usefixtures("quick")
def test_exit_codes_and_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "base.yaml", "--out", "out", "--quiet", "--json", "--set", "dense.epochs=0") == 0
    text = capsys.readouterr()
    assert text.err == ""
    last = json.loads(text.out)
    assert list(last) == ["dense", "final", "verdict"]
    assert all({"accuracy", "params", "macs", "size_bytes", "latency_s"} <= set(last[name]) for name in ("dense", "final"))
    assert set(last["final"]["ranks"]) == {"first", "middle"}
    assert call("run", "base.yaml", "--out", "out", "--quiet", "--set", "dense.epochs=0") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert [word in first for word in ("dense", "low-rank")] == [True, True]
    assert call("coverage", "out", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["factorized"] for row in rows} == {"first": True, "norm": False, "middle": True, "head": False}
    assert {row["name"]: row["rank"] for row in rows if row["factorized"]} == last["final"]["ranks"]
    assert call("coverage", "base.yaml") == 0
    assert "stays dense by default" in capsys.readouterr().out


def test_failures_and_wrong_usage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, words in (
        ([], 2, "command"),
        (["fly"], 2, "fly"),
        (["run"], 2, "recipe"),
        (["run", "base.yaml", "--nothing"], 2, "nothing"),
        (["measure", "base.yaml", "--threads", "0"], 2, "threads"),
        (["run", "nothing.yaml"], 2, "no such file"),
        (["run", "base.yaml", "--set", "foo=1"], 2, "recipe key 'foo'"),
        (["run", "base.yaml", "--out", "out", "--set", "data=mymodule.missing"], 1, "data/x: no such file"),
        (["run", "base.yaml", "--out", "out", "--set", "data=mymodule.damaged"], 1, "KeyError: 'row 7' ("),
        (["plan", "base.yaml", "--out", ""], 2, "--out: is empty"),
        (["measure", ""], 2, "target: is empty"),
        (["plan", "base.yaml", "--out", "base.yaml"], 2, "--out: base.yaml is read by this command"),
        (["plan", "base.yaml", "--out", "plan.html"], 2, "--out: got 'plan.html', where the page of the plan goes"),
        (["latency", "table.json", "--out", "other.json"], 2, "table.json is a table, which is shown"),
        (["compress", "base.yaml", "--size-bytes", "9" * 400], 2, "size_bytes must be bytes"),
        (["measure", "nothing"], 2, "no such file"),
        (["measure", str(folder)], 1, "is not the folder of a run"),
        (["coverage", "base.yaml", "--set", "foo=1"], 2, "recipe key 'foo'"),
    ):
        assert call(*arguments) == code, arguments
        assert words in capsys.readouterr().err, arguments
    assert not (folder / "out").exists()
    assert call("--version") == 0
    assert capsys.readouterr().out.split() == ["spectrim", sp.__version__]


def test_a_run_does_not_overwrite_its_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (folder / "base.yaml").read_text()
    (folder / "recipe.yaml").write_text(text)
    for arguments in (("run",), ("compress", "--macs", "0.5")):
        assert call(*arguments, "recipe.yaml", "--out", ".", "--quiet") == 2
        assert "recipe.yaml is the recipe itself" in capsys.readouterr().err
    assert (folder / "recipe.yaml").read_text() == text
    job = Run(changed("dense.epochs=0"), folder / "out", progress=False)
    job.dense()
    again = Run(read_recipe(folder / "out" / "recipe.yaml"), folder / "out", progress=False)
    assert again.text == (folder / "out" / "recipe.yaml").read_text()  # so the folder's own recipe goes on


def test_an_interrupted_run_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "run", interrupt)
    assert call("run", "base.yaml", "--out", "out") == 130
    assert "the same command resumes from the last checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_trained_weights_fill_the_dense_network(folder: Path, suffix: str) -> None:
    """They are found beside the recipe, whatever wrapper or checkpoint they come in; a stage knows them by their content."""
    from safetensors.torch import save_file

    recipe = {**BASE, "weights": f"net{suffix}"}
    (folder / "net.yaml").write_text(yaml.safe_dump(recipe))
    other = make_model(parse_recipe({**BASE, "seed": 5}))
    state = {f"module.{name}": value for name, value in other.state_dict().items()}
    if suffix == ".pt":
        torch.save({"epoch": 3, "state_dict": state}, folder / "net.pt")
    else:
        save_file(state, folder / "net.safetensors")
    read = read_recipe(folder / "net.yaml", cut=False)
    filled = make_model(read).state_dict()
    assert all(torch.equal(value, filled[name]) for name, value in other.state_dict().items())
    assert not torch.equal(make_model(read, filled=False).first.weight, other.first.weight)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"first.weight": torch.zeros(12, 8)}, "lacks"),
        ({"first.weight": torch.zeros(3, 8)}, r"first.weight \(3, 8\), not \(12, 8\)"),
        ({"more": torch.zeros(1)}, "has the unknown more"),
        ([torch.zeros(1)], "holds a list, no state dict"),
        (nn.Linear(2, 2), "cannot be read"),
        (None, "no such file"),
        ({1: torch.zeros(1)}, "net.pt holds 1, a sparse, quantized or empty tensor"),
        ({"first.weight": torch.zeros(12, 8).to_sparse()}, "net.pt holds 'first.weight', a sparse"),
        (lambda weight: weight.to(torch.int8), r"holds first.weight in torch.int8; allowed: numbers that torch.float32 can hold"),
        (lambda weight: weight.to(torch.complex64), "holds first.weight in torch.complex64"),
        (lambda weight: weight.double() * 1e300, "holds values in first.weight that are not finite"),
        (b"PK", r"cannot be read \(BadZipFile: the checksum of"),
    ],
)
def test_weights_of_another_network_are_refused(folder: Path, held: Any, words: str) -> None:
    (folder / "net.yaml").write_text(yaml.safe_dump({**BASE, "weights": "net.pt"}))
    state = make_model(parse_recipe(BASE)).state_dict()
    if callable(held) and not isinstance(held, nn.Module):
        held = state | {"first.weight": held(state["first.weight"])}
    if held is not None:
        torch.save(state if isinstance(held, bytes) else held, folder / "net.pt")
    if isinstance(held, bytes):
        whole, value = (folder / "net.pt").read_bytes(), state["first.weight"].numpy().tobytes()
        (folder / "net.pt").write_bytes(whole.replace(value, value[:-1] + bytes([value[-1] ^ 1])))
    with pytest.raises(RecipeError, match=words) as caught:
        make_model(read_recipe(folder / "net.yaml", cut=False))
    assert "weights" in str(caught.value)


def test_prefixes_of_several_wrappers_come_off_and_a_result_names_no_folder(folder: Path) -> None:
    state = {f"_orig_mod.module.{name}": value for name, value in make_model(parse_recipe({**BASE, "seed": 5})).state_dict().items()}
    torch.save(state, folder / "net.pt")
    (folder / "net.yaml").write_text(yaml.safe_dump({**BASE, "dense": {}, "weights": "net.pt"}))
    result = Run(read_recipe(folder / "net.yaml"), folder / "out", progress=False).run()
    assert (result["recipe"]["weights"], result["recipe"]["code"]) == ("net.pt", None)
    assert yaml.safe_load((folder / "out" / "recipe.yaml").read_text())["code"] == str(folder)


def test_a_table_and_a_backend_are_not_given_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "base.yaml", "--table", "t.json", "--latency", "eager"])
    assert ended.value.code == 2
    assert "given together" in capsys.readouterr().err
