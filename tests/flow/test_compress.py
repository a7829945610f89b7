"""One call from a dense network to a smaller one: what it keeps to, what it leaves alone, and that a stopped call goes on."""

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import yaml
from torch import Tensor, nn

import spectrim as sp
from spectrim import cli, zoo
from spectrim.budget.cut_to import CutNetwork, Workbench
from spectrim.errors import FormatError, SettingError
from spectrim.files import read_json
from spectrim.layers import FactorizedLayer
from spectrim.metrics.evaluate import Scores
from spectrim.metrics.inputs import first_examples
from spectrim.pipeline.compress import compress
from spectrim.pipeline.compressed import Compressed
from spectrim.pipeline.cutter import Cutter
from spectrim.pipeline.teaching import teacher_for, with_hint_layers
from spectrim.plain.chain import PlainPair
from spectrim.surgery.states import Places

LOSS = nn.CrossEntropyLoss()


class Net(nn.Module):
    """A small convolutional network with normalisation."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for inputs, outputs, stride in ((1, 16, 1), (16, 24, 2), (24, 24, 1)):
            blocks += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features, self.head = nn.Sequential(*blocks), nn.Linear(24, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Any]:
    pytest.importorskip("sklearn")
    torch.default_generator.manual_seed(0)
    splits, model = zoo.digits(batch_size=64), Net()
    sp.fit(model, splits.train, LOSS, torch.optim.Adam(model.parameters(), 0.01), 4, progress=False)
    return model.eval(), splits


def made(trained: tuple[nn.Module, Any], **settings: Any) -> Compressed:
    model, splits = trained
    settings = {"budget": sp.Budget(macs=0.4), "eval_data": splits.val, "examples": 256} | settings
    return compress(model, splits.train, LOSS, progress=False, **settings)


def test_calibration_alone_beats_plain_truncation(trained: tuple[nn.Module, Any]) -> None:
    before = copy.deepcopy(trained[0].state_dict())
    auto, plain = made(trained), made(trained, cut="plain")
    for result in (auto, plain):
        assert result.measured["final"].macs <= 0.4 * result.measured["dense"].macs  # type: ignore[operator]
        assert not any(isinstance(module, FactorizedLayer) for module in result.model.modules())
    best = min((found for stage, found in auto.scores.items() if stage in ("recalibrated", "corrected")), key=lambda found: found["loss"])
    assert auto.measured["final"].loss == pytest.approx(best["loss"], abs=1e-5)  # merged: other rounding
    assert best["accuracy"] >= plain.scores["recalibrated"]["accuracy"]
    assert best["loss"] < plain.scores["recalibrated"]["loss"]
    assert all(torch.equal(before[name], tensor) for name, tensor in trained[0].state_dict().items())


def test_fine_tuning_recovers(trained: tuple[nn.Module, Any]) -> None:
    result = made(trained, budget=sp.Budget(macs=0.25), epochs=2)
    assert len(result.history.epochs) == 2
    assert result.scores["final"]["loss"] < result.scores["recalibrated"]["loss"]
    assert json.loads(json.dumps(result.report))["final"]["ranks"] == result.ranks
    assert "MAC reduction" in result.summary()
    assert result.stages().splitlines()[0] == f"cut: {result.cut}"


def test_the_dense_network_is_distilled_where_the_loss_gap_is_large(trained: tuple[nn.Module, Any]) -> None:
    far = made(trained, budget=sp.Budget(macs=0.15), epochs=1)
    assert far.teacher is not None
    assert far.report["teacher"] == json.loads(json.dumps(far.teacher))
    near = made(trained, budget=sp.Budget(macs=0.95), epochs=1)
    assert near.teacher is None
    assert "distilled" not in near.stages()
    assert "distilled from the dense network: logits and intermediate features" in far.stages()
    assert (far.teacher["features"], far.teacher["until"], far.teacher["layers"]) == (2.0, 0.5, None)
    told = made(trained, budget=sp.Budget(macs=0.15), epochs=1, distill=sp.Distillation(trained[0]))
    assert "distilled from the dense network: logits\n" in told.stages()
    assert made(trained, budget=sp.Budget(macs=0.15), epochs=0).teacher is None
    asked = made(trained, budget=sp.Budget(macs=0.95), epochs=1, distill=sp.Distillation(trained[0], weight=0.2, layers=("features.0",)))
    assert asked.teacher == {
        "temperature": 4.0,
        "weight": 0.2,
        "dim": -1,
        "mix": 0.0,
        "features": 0.0,
        "until": 1.0,
        "layers": ["features.0"],
    }


def test_the_cut_that_starts_best_is_taken(trained: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(best: str, mixed: float, accurate: str = "", *, trains: bool = True, importance: Any = None) -> str:
        """Let one cut have a loss of 1.0 once it is refitted, the others 2.0; and one the highest accuracy."""

        def scored(self: Any, bench: Any, kind: str) -> CutNetwork:
            loss = {best: 1.0, "mixed": mixed}.get(kind, 2.0)
            accuracy = 0.5 if kind == accurate else 0.4
            return CutNetwork(kind, Places(trained[0]).state(), {}, {"corrected": Scores(loss=loss, accuracy=accuracy)})

        monkeypatch.setattr(Cutter, "_made", scored)
        monkeypatch.setattr(Workbench, "show", lambda self, made: None)
        cutter, bench = object.__new__(Cutter), object.__new__(Workbench)
        cutter.importance, cutter.recovery, cutter.seconds, bench.network = importance, None, None, trained[0]
        return cutter._best(bench, trains, 0.0, []).way

    assert chosen("plain", 1.1) == "plain"
    assert chosen("whitened", 1.1) == "whitened"
    assert chosen("sensitive", 1.1) == "sensitive"
    assert chosen("sensitive", 0.99) == "mixed"
    assert chosen("sensitive", 0.99, importance=object()) == "sensitive", "ranks by an importance are not mixed"
    assert chosen("whitened", 1.0, trains=False) == "whitened", "without training the best start is the best end"
    assert chosen("both", 1.0, trains=False) == "both"
    assert chosen("sensitive", 1.0, accurate="plain", trains=False) == "plain", "without training accuracy counts"
    assert chosen("sensitive", 2.0, accurate="plain") == "sensitive", "training mends the rest"
    monkeypatch.undo()
    asked, whitened = (made(trained, budget=sp.Budget(macs=0.15), cut=cut) for cut in ("mixed", "whitened"))
    assert asked.cut == "mixed"
    assert asked.ranks != whitened.ranks


class Answering(nn.Module):
    """Puts out an object with logits among other things, as models of transformers do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Any:
        return SimpleNamespace(loss=None, logits=self.net(images), hidden_states=())


def test_logits_among_other_outputs_are_judged_and_taught(trained: tuple[nn.Module, Any]) -> None:
    model, splits = trained

    def of_logits(output: Any, target: Tensor) -> Tensor:
        return LOSS(output.logits, target)

    settings: dict[str, Any] = {"budget": sp.Budget(macs=0.15), "epochs": 1, "examples": 256, "eval_data": splits.val, "progress": False}
    splits.train.set_epoch(0)
    wrapped = compress(Answering(model), splits.train, of_logits, **settings)
    splits.train.set_epoch(0)
    bare = compress(model, splits.train, LOSS, **settings)
    assert wrapped.teacher is not None
    assert wrapped.teacher["weight"] == 0.5
    assert wrapped.scores["final"] == bare.scores["final"]
    assert wrapped.measured["final"].accuracy == bare.measured["final"].accuracy


def test_a_loss_of_tensors_with_an_output_that_holds_one_says_what_to_give(trained: tuple[nn.Module, Any]) -> None:
    data = [(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))]
    model = Answering(copy.deepcopy(trained[0]))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for loss in (LOSS, lambda output, target: LOSS(output.flatten(1), target)):
        for work in (
            lambda loss: sp.evaluate(model, data, loss),
            lambda loss: sp.fit(model, data, loss, optimizer, 1, progress=False),
            lambda loss: sp.calibrate(sp.factorize(model), data, loss),
        ):
            with pytest.raises(SettingError, match=r"SimpleNamespace.*output\.logits"):
                work(loss)
    with pytest.raises(AttributeError, match="scores"):
        sp.evaluate(trained[0], data, lambda output, target: LOSS(output.scores, target))


def test_layers_that_cannot_be_compared_do_not_teach() -> None:
    class Reads(nn.Module):
        """Uses the weight of a layer that it never calls."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.read, self.last = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(nn.functional.linear(self.first(x).relu(), self.read.weight).relu())

    dense, batch = Reads(), (torch.randn(8, 16), torch.zeros(8, dtype=torch.int64))
    taught = teacher_for(dense, [batch], LOSS)
    assert taught is not None
    assert with_hint_layers(taught, sp.factorize(dense, where=lambda name, _: name in ("first", "read")), batch).layers == ("first",)
    assert with_hint_layers(taught, sp.factorize(dense, where=lambda name, _: name == "first"), batch).layers is None
    assert with_hint_layers(taught, sp.factorize(dense, where=lambda name, _: name == "read"), batch).features == 0.0


def test_squeezing_first_makes_the_cut_nearly_free(trained: tuple[nn.Module, Any]) -> None:
    at_once = made(trained, cut="plain")
    tuning = sp.Tuning(optimizer=lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9))
    squeezed = made(trained, epochs=6, squeeze=0.8, tuning=tuning)
    assert squeezed.cut == "squeezed"
    assert squeezed.measured["final"].macs <= 0.4 * squeezed.measured["dense"].macs  # type: ignore[operator]
    lost = squeezed.scores["recalibrated"]["loss"] - squeezed.scores["squeezed"]["loss"]
    assert lost < 0.5 * (at_once.scores["recalibrated"]["loss"] - at_once.scores["dense"]["loss"])
    assert len(squeezed.history.epochs) == 6


def test_squeezing_empties_the_tails_that_are_cut(trained: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["spectrim.pipeline.tuner"]
    schedules, run = [], module.fit  # type: ignore[attr-defined]

    def spy(*arguments: Any, **settings: Any) -> Any:
        schedules.append(settings["courses"])
        return run(*arguments, **settings)

    monkeypatch.setattr(module, "fit", spy)
    importance = sp.budget.distortion.NormalizedEnergy(torch.zeros(1, 1, 8, 8))
    made(trained, epochs=2, squeeze=0.5, importance=importance)
    assert schedules[0][0].importance is importance  # that of the cut
    assert not schedules[1]


class Stops:
    """Batches of which reading is stopped once, in the middle of some pass; what counts them is of the class: data go on as they were."""

    left: ClassVar[int] = 0

    def __init__(self, data: Any, passes: int) -> None:
        self.data, Stops.left = data, passes

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        Stops.left -= 1
        for index, batch in enumerate(self.data):
            if Stops.left == 0 and index == 3:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("squeeze", [0.0, 0.5])
def test_a_stopped_call_goes_on(trained: tuple[nn.Module, Any], tmp_path: Path, squeeze: float) -> None:
    model, splits = trained
    fixed = list(splits.train)[:6]  # the same batches in the same order, whoever reads them

    def call(data: Any, folder: Path) -> Compressed:
        torch.default_generator.manual_seed(1)
        budget = sp.Budget(macs=0.4)
        return compress(model, data, LOSS, budget, 4, squeeze=squeeze, examples=64, folder=folder, progress=False)

    whole = call(fixed, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        call(Stops(fixed, 5), tmp_path / "stopped")
    again = call(Stops(fixed, 1000), tmp_path / "stopped")  # read through; the list itself would be other data for a folder
    assert len(again.history.epochs) == 4
    for one, other in zip(whole.low.state_dict().values(), again.low.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    stored = read_json(tmp_path / "stopped" / "result.json")
    assert stored["final"]["ranks"] == again.ranks
    loaded = sp.load(tmp_path / "stopped" / "final", model)
    assert torch.equal(loaded.eval()(fixed[0][0]), again.model(fixed[0][0]))


def test_a_folder_belongs_to_one_call(trained: tuple[nn.Module, Any], tmp_path: Path) -> None:
    made(trained, folder=tmp_path, cut="plain")
    with pytest.raises(FormatError, match="another budget"):
        made(trained, folder=tmp_path, cut="plain", budget=sp.Budget(macs=0.5))


def test_whatever_changes_the_result_belongs_to_the_folder(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    data = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(2)]
    call: dict[str, Any] = {"model": model, "data": data, "budget": 0.8, "folder": tmp_path, "progress": False, "cut": "plain"}
    first = compress(loss=LOSS, **call)
    again = compress(loss=LOSS, **call)
    assert again.ranks == first.ranks
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight[0, 0] += 1e-3
    changed_data = [(data[0][0] + 1e-3, data[0][1]), data[1]]
    for change, name in (
        ({"model": other}, "weights"),
        ({"data": changed_data}, "data"),
        ({"where": sp.match("*")}, "where"),
        ({"tuning": sp.Tuning(lambda parameters: torch.optim.SGD(parameters, 0.1))}, "optimizer"),
        ({"tuning": sp.Tuning(clip=1.0)}, "clip"),
        ({"budget": {"macs": 0.9}}, "budget"),
    ):
        with pytest.raises(FormatError, match=f"another {name}"):
            compress(loss=LOSS, **(call | change))


@pytest.mark.parametrize(
    ("budget", "message"),
    [({"flops": 0.5}, "compress: budget must be a dict with the keys"), (1.5, "compress: budget must be a Budget, a fraction of")],
)
def test_budgets_that_are_none_are_refused_in_a_sentence(budget: Any, message: str) -> None:
    model, data = nn.Linear(8, 8), [(torch.randn(4, 8), torch.randint(8, (4,)))]
    with pytest.raises(SettingError, match=message):
        compress(model, data, LOSS, budget, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1}, "epochs must be an integer of at least 0"),
        ({"squeeze": 1.0}, "squeeze must be"),
        ({"examples": 0}, "examples must be an integer of at least 1"),
        ({"budget": sp.Budget(macs=0.001)}, "at least 0.0"),
    ],
    ids=["epochs", "squeeze", "examples", "budget"],
)
def test_bad_settings(trained: tuple[nn.Module, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        made(trained, **settings)


def test_by_the_clock() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 4))
    data = [(torch.randn(32, 64), torch.randint(4, (32,))) for _ in range(3)]
    low = sp.factorize(model)
    table = sp.latency_table(low, data[0][0][:1], time_box=1e-3, multiple=1)
    wide, narrow = (table.weights[name].calls[0] for name in ("0", "2"))
    known = {wide: (1e-3, 1e-5), narrow: (1e-3, 1.0)}  # seconds dense, and of a pair for each rank: for the second none is faster
    timings = {
        key: replace(table.timings[key], dense_s=dense, pair_s=tuple(pair * rank for rank in table.timings[key].ranks))
        for key, (dense, pair) in known.items()
    }
    made = compress(model, data, LOSS, sp.Budget(macs=0.9), latency=replace(table, timings=timings), progress=False)
    assert isinstance(made.model[0], PlainPair)  # type: ignore[index]
    assert isinstance(made.model[2], nn.Linear)  # type: ignore[index]
    assert made.ranks["0"] < 48
    assert made.ranks["2"] == 48


class Encoder(nn.Module):
    """Classes of sequences by a transformer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def test_a_transformer() -> None:
    data = [(torch.randn(8, 6, 16), torch.randint(5, (8,))) for _ in range(3)]
    made = compress(Encoder(), data, LOSS, sp.Budget(macs=0.6), 1, progress=False)
    assert made.measured["final"].macs <= 0.6 * made.measured["dense"].macs  # type: ignore[operator]
    assert "final" in made.scores


def test_a_recurrent_language_model_with_two_limits() -> None:
    model = zoo.LSTMLanguageModel(30, embedding=16, hidden=16, layers=2, dropout=0.0)
    data = [(torch.randint(30, (4, 7)), torch.randint(30, (4, 7))) for _ in range(3)]
    budget = sp.Budget(macs=0.7, params=0.6)
    made = compress(model, data, zoo.language_model_loss, budget, 1, where=sp.match("*"), progress=False)
    dense, final = made.measured["dense"], made.measured["final"]
    assert final.macs <= 0.7 * dense.macs  # type: ignore[operator]
    assert final.params <= 0.6 * dense.params


def test_the_teacher_knows_the_axis_of_the_classes() -> None:
    def axis(dense: nn.Module, inputs: Tensor, target: Tensor) -> int | None:
        found = teacher_for(dense, [(inputs, target)], nn.CrossEntropyLoss() if target.dim() != 2 else zoo.language_model_loss)
        return None if found is None else found.dim

    labels = torch.int64
    assert axis(nn.Linear(6, 3), torch.zeros(2, 6), torch.zeros(2, dtype=labels)) == 1
    assert axis(nn.Linear(6, 3), torch.zeros(2, 5, 6), torch.zeros(2, 5, dtype=labels)) == 2
    assert axis(nn.Conv2d(1, 3, 1), torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4, dtype=labels)) == 1
    assert axis(nn.Linear(6, 3), torch.zeros(2, 6), torch.zeros(2, 3)) is None  # a regression
    assert axis(nn.Linear(6, 1), torch.zeros(2, 6), torch.zeros(2, 1, dtype=labels)) is None


def test_a_teacher_that_has_memorized_the_examples_gives_softer_logits_alone(trained: tuple[nn.Module, Any]) -> None:
    dense = copy.deepcopy(trained[0]).eval()
    known = [(images, dense(images).argmax(1)) for images, _ in trained[1].train]  # labels it never misses
    for share, way in ((1.0, (2.0, 0.5, 2.0, 0.5)), (100.0, (4.0, 0.7, 0.0, 1.0))):
        with torch.no_grad():
            dense.head.weight.mul_(share)
            dense.head.bias.mul_(share)
        knows = sp.evaluate(dense, known, LOSS)["loss"] < 0.05
        taught = teacher_for(dense, known, LOSS)
        assert taught is not None
        assert (knows, taught.temperature, taught.weight, taught.features, taught.until) == (share > 1, *way)
    result = compress(dense, known, LOSS, budget=sp.Budget(macs=0.3), epochs=1, progress=False, examples=256)
    assert result.teacher is not None
    assert (result.teacher["temperature"], result.teacher["features"]) == (4.0, 0.0)


def test_first_examples_are_whole_batches() -> None:
    batches = [(torch.zeros(4, 1), torch.zeros(4)) for _ in range(5)]
    assert len(first_examples(batches, 9)) == 3
    assert len(first_examples(batches, 100)) == 5


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    recipe = tmp_path / "net.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": {"class_path": "spectrim.zoo.vgg_small", "init_args": {"in_channels": 1, "width": 0.25}},
                "data": {"class_path": "spectrim.zoo.digits", "init_args": {"batch_size": 128}},
                "loss": "torch.nn.CrossEntropyLoss",
                "dense": {"epochs": 1},
            }
        )
    )
    arguments = ["compress", str(recipe), "--macs", "0.5", "--examples", "64", "--out", str(tmp_path / "out"), "--quiet", "--json"]
    cli.main([*arguments, "--cut", "both", "--writing", "interpolative", "--reconstruct", "2"])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["final"]["macs"] <= 0.5 * result["dense"]["macs"]
    assert len(out.splitlines()) == 1
    written = json.loads((tmp_path / "out" / "compress" / "result.json").read_text())
    assert written["cut"] == "both"
    assert any("reconstructed" in note for note in written["notes"])
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compress", str(recipe), "--quiet"])
    assert "no budget" in capsys.readouterr().err


def test_large_weights_are_balanced_while_they_are_fine_tuned_and_orthonormal_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Embedding(1500, 8), nn.Flatten(), nn.Linear(8, 3))
    data = [(torch.randint(1500, (64, 1)), torch.randint(3, (64,))) for _ in range(4)]
    seen: list[list[str]] = []

    def noted(network: nn.Module) -> list[str]:
        seen.append(sp.surgery.balance_(network))
        return seen[-1]

    monkeypatch.setattr(sys.modules["spectrim.surgery.balance"], "balance_", noted)
    call: dict[str, Any] = {"budget": sp.Budget(params=0.7), "epochs": 1, "where": sp.match("*"), "progress": False, "distill": None}
    made = compress(model, data, LOSS, **call)
    assert seen == [["0"]]
    factors = dict(sp.layers.named_factors(made.low))["0"]
    assert torch.allclose(factors.U.mT @ factors.U, torch.eye(factors.rank), atol=1e-5)
    assert torch.allclose(made.model(data[0][0]), made.low(data[0][0]), atol=1e-5)
    compress(model, data, LOSS, penalties=[sp.Orthogonality()], **call)
    assert len(seen) == 1  # a penalty on the factors wants them as they are


def test_a_refit_of_few_examples_is_kept_only_where_examples_left_out_say_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 8)).eval()
    few, many = [torch.randn(16, 64) for _ in range(2)], [torch.randn(128, 64) for _ in range(8)]
    kinds = {"where": lambda name, module: True, "cut": "plain", "progress": False}

    def lost(made: sp.pipeline.compress.Compressed) -> float:
        x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(1))
        return float((made.model(x) - model(x)).square().mean().detach())

    made = sp.compress(model, few, sp.Budget(params=0.5), **kinds)
    assert "refit held out" in made.dropped
    assert "corrected" not in made.scores
    assert "a quarter of the examples that was left out" in made.stages()
    trusted = sp.compress(model, few, sp.Budget(params=0.5), eval_data=few, **kinds)
    assert "corrected" in trusted.scores, "on its own examples the refit looks good"
    assert lost(made) < lost(trusted)
    assert "corrected" in sp.compress(model, many, sp.Budget(params=0.5), **kinds).scores


def test_fine_tuning_that_ends_worse_than_the_cut_is_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    x, y = torch.randn(256, 16), torch.randint(4, (256,))
    data, loss = [(x, y)], nn.CrossEntropyLoss()
    sp.fit(model, data, loss, torch.optim.Adam(model.parameters(), 0.01), 60, progress=False)

    def destroy(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=100.0)

    settings = {"eval_data": data, "cut": "whitened", "distill": None, "progress": False}
    plain = sp.compress(model, data, loss, 0.7, **settings)  # type: ignore[arg-type]
    made = sp.compress(model, data, loss, 0.7, 1, tuning=sp.Tuning(optimizer=destroy), **settings)  # type: ignore[arg-type]
    assert "fine-tuned" in made.dropped
    assert made.dropped["fine-tuned"]["loss"] > made.scores["final"]["loss"]
    assert made.scores["final"] == pytest.approx(plain.scores[list(plain.scores)[-1]])
    torch.testing.assert_close(made.model(x), plain.model(x))
    assert any("fine-tuning ended worse" in warning for warning in made.verdict.warnings)
    assert "fine-tuning ended worse" in caplog.text
    assert made.summary().splitlines()[-1] == str(made.verdict)
    assert "not kept: worse than the cut" in made.stages()
    assert made.report["split"] == "validation"


def test_every_step_is_named_from_the_first_second(capsys: pytest.CaptureFixture[str]) -> None:
    model, data = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), [(torch.randn(32, 16), torch.randint(4, (32,)))]
    sp.compress(model, data, nn.CrossEntropyLoss(), 0.7, 1)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("compress ")]
    assert told[0] == "compress 1/11: reading the calibration set"
    assert told[-1] == "compress 11/11: merging and measuring"
    assert [int(line.split()[1].split("/")[0]) for line in told] == sorted(int(line.split()[1].split("/")[0]) for line in told)
    assert any("fine-tuning" in line for line in told)
