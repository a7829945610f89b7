"""A plan says beforehand what a cut gives: its numbers are those of the network that is then made."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spectrim as sp
from spectrim import cli, zoo
from spectrim.budget.allocate import allocate
from spectrim.budget.budget import Budget
from spectrim.budget.distortion.energy import SpectralEnergy
from spectrim.budget.distortion.normalized import NormalizedEnergy
from spectrim.budget.plan import BUDGETS, plan
from spectrim.budget.plan_table import Plan, budget_name
from spectrim.errors import FormatError, LayerError, SettingError
from spectrim.metrics.macs import count_macs
from spectrim.metrics.measurement import measure

EVERYTHING = sp.match("*")


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    layers = (nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype).eval()


def inputs(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64)


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(inputs(8), torch.randint(4, (8,))) for _ in range(count)]


@pytest.fixture(scope="module")
def found() -> Plan:
    torch.default_generator.manual_seed(0)
    return plan(network(), inputs(), batches(1), F.cross_entropy, budgets=[0.5, 0.001])


def error(before: nn.Module, after: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((after(x) - before(x)).norm() / before(x).norm())


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_every_row_is_the_network_that_the_cut_gives(scheme: Any) -> None:
    dense, x = network(), inputs()
    found = plan(dense, x, budgets=[0.4, 0.7], scheme=scheme)
    low = sp.factorize(dense, scheme)
    method = {"SpectralEnergy": SpectralEnergy(), "NormalizedEnergy": NormalizedEnergy(x)}[found.importance]
    for row, fraction in zip(found.budgets, (0.4, 0.7), strict=True):
        assert row.ranks == allocate(low, Budget(macs=fraction), x, importance=method)
        cut = sp.merge(sp.prune(low, row.ranks))
        real = measure(cut, x, latency=False)
        assert row.totals is not None
        assert (row.totals.macs, row.totals.params, row.totals.size_bytes) == (real.macs, real.params, real.size_bytes)
        assert row.totals.output_error == pytest.approx(error(dense, cut, x), rel=1e-9)
        assert row.totals.macs <= fraction * count_macs(dense, x)


def test_weights_and_fixed_part_add_up_to_every_network() -> None:
    dense, x = network(), inputs()
    found = plan(dense, x, budgets=[0.8, 0.3], where=EVERYTHING)
    real = measure(dense, x, latency=False)
    assert (found.dense.macs, found.dense.params, found.dense.size_bytes) == (real.macs, real.params, real.size_bytes)
    for row in found.budgets:
        assert row.totals is not None
        at = {weight.name: row.ranks[weight.name] - 1 for weight in found.weights}
        assert row.totals.macs == found.fixed.macs + sum(weight.macs[at[weight.name]] for weight in found.weights)
        assert row.totals.params == found.fixed.params + sum(weight.params[at[weight.name]] for weight in found.weights)
        kept = sum(weight.params[at[weight.name]] * weight.element_bytes for weight in found.weights)
        assert row.totals.size_bytes == found.fixed.size_bytes + kept


def test_everything_kept_changes_nothing() -> None:
    found = plan(network(), inputs(), batches(), F.cross_entropy, budgets=[1.0])
    (row,) = found.budgets
    assert row.totals is not None
    assert row.totals.output_error == pytest.approx(0, abs=1e-12)
    assert row.totals.loss == pytest.approx(found.dense.loss, rel=1e-9)
    assert row.totals.macs == found.dense.macs


def test_a_diagonal_worked_by_hand() -> None:
    layer = nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0])))
    found = plan(nn.Sequential(layer), torch.ones(1, 4, dtype=torch.float64), budgets=[0.5])
    (weight,), (row,) = found.weights, found.budgets
    assert weight.spectrum == pytest.approx((4, 2, 1, 1))
    assert weight.distortions["SpectralEnergy"] == pytest.approx((1, 6 / 22, 2 / 22, 1 / 22, 0), rel=1e-6)
    assert weight.macs == (8, 16, 16, 16), "at rank 2 a pair costs what the dense layer costs"
    assert weight.break_even == 1
    assert row.ranks == {"0": 1}
    assert row.totals is not None
    assert row.totals.output_error == pytest.approx((6 / 22) ** 0.5), "of 4, 2, 1, 1 the first is left"


def test_data_and_loss_add_importances_and_merits() -> None:
    dense, x, data = network(), inputs(), batches()
    targets = [target for _, target in data]
    bare = plan(dense, x, [x for x, _ in data], budgets=[0.5])
    full = plan(dense, x, data, F.cross_entropy, budgets=[0.5])
    assert set(bare.weights[0].distortions) == {"SpectralEnergy", "NormalizedEnergy", "WhitenedEnergy"}
    assert set(full.weights[0].distortions) == {"SpectralEnergy", "NormalizedEnergy", "WhitenedEnergy", "LossSensitivity"}
    assert bare.dense.loss is None
    with torch.no_grad():
        outputs = torch.cat([dense(x) for x, _ in data])
    assert full.dense.loss == pytest.approx(float(F.cross_entropy(outputs, torch.cat(targets))))
    assert full.dense.accuracy == float((outputs.argmax(1) == torch.cat(targets)).double().mean())
    assert full.budgets[0].totals is not None
    assert full.budgets[0].totals.accuracy is not None


def test_calibrated_cut_changes_the_output_less_where_inputs_lie_in_a_plane() -> None:
    layer = nn.Sequential(nn.Linear(12, 12, bias=False)).double()
    data = [torch.randn(64, 2, dtype=torch.float64) @ torch.randn(2, 12, dtype=torch.float64)]
    blind, seeing = (plan(layer, data[0], found, budgets=[0.4], where=EVERYTHING).budgets[0].totals for found in (None, data))
    assert blind is not None
    assert seeing is not None
    assert seeing.output_error == pytest.approx(0, abs=1e-7), "two directions are all that comes in; the root of their moments is inexact"
    assert blind.output_error is not None
    assert blind.output_error > 0.1


def test_eval_data_judges_and_examples_limit_both() -> None:
    class Counted(list[Any]):
        seen = 0

        def __iter__(self) -> Any:
            for batch in super().__iter__():
                self.seen += 1
                yield batch

    data, judges = Counted(batches(5)), Counted(batches(5))
    dense = network()
    found = plan(dense, inputs(), data, F.cross_entropy, budgets=[0.5], eval_data=judges, examples=16)
    assert (data.seen, judges.seen) == (2, 2)
    with torch.no_grad():
        loss = sum(float(F.cross_entropy(dense(x), y)) for x, y in list(judges)[:2]) / 2
    assert found.dense.loss == pytest.approx(loss)


def test_a_budget_that_cannot_be_met_is_a_row_that_says_the_smallest(found: Plan) -> None:
    met, missed = found.budgets
    assert met.totals is not None
    assert missed.totals is None
    assert not missed.ranks
    assert "at least 0." in missed.problem
    assert "0.1 % macs: cannot be met" in str(found)
    assert plan(network(), inputs(), budgets=[0.001]).budgets[0].totals is None, "not even when it is the only one"


def test_budgets_of_other_kinds() -> None:
    dense, x = network(), inputs()
    found = plan(dense, x, budgets=[Budget(params=0.5), Budget(macs=0.6, size=0.5)])
    params, both = (row.totals for row in found.budgets)
    assert params is not None
    assert both is not None
    assert params.params <= 0.5 * found.dense.params
    assert both.macs <= 0.6 * found.dense.macs
    assert both.size_bytes <= 0.5 * found.dense.size_bytes
    assert budget_name(found.budgets[1].budget) == "60 % macs, 50 % size"


def test_a_factorized_and_cut_network_is_planned_as_it_is() -> None:
    x = inputs()
    cut = sp.prune(sp.factorize(network(), "channel"), sp.budget.Fraction(0.5))
    found = plan(cut, x, budgets=[0.3])
    assert [len(weight.macs) for weight in found.weights] == [factors.rank for _, factors in sp.layers.named_factors(cut)]
    assert found.dense.macs == count_macs(network(), x), "fractions are of the dense network"
    assert found.budgets[0].totals is not None
    assert found.budgets[0].totals.macs <= 0.3 * found.dense.macs


def test_every_layer_is_accounted_for() -> None:
    dense = network()
    found = plan(dense, inputs(), budgets=[])
    assert found.importance == "SpectralEnergy"
    lines = sp.coverage(sp.factorize(dense))
    assert [weight.name for weight in found.weights] == [line.name for line in lines if line.factorized]
    assert {layer.name: layer.reason for layer in found.skipped} == {line.name: line.reason for line in lines if not line.factorized}
    assert all(layer.reason for layer in found.skipped)


class Known:
    """A latency table with a second for each MAC of a pair and a tenth of that for dense weights, of which it knows one."""

    dense_s = 40.0

    def limits(self, model: nn.Module) -> dict[str, int]:
        from spectrim.layers import sites

        return {site.name: 2 for site in sites(model)}

    def seconds(self, name: str, rank: int | None) -> float | None:
        return None if name != "3" else 5.0 if rank is None else float(rank)

    def multiple(self, name: str) -> int:
        return 2

    def verdict(self, name: str, rank: int) -> str:
        return "timed"


def test_a_latency_table_predicts_seconds() -> None:
    found = plan(network(), inputs(), budgets=[0.5], latency=Known())
    weight = next(weight for weight in found.weights if weight.name == "3")
    assert weight.seconds is not None
    assert weight.seconds[:3] == (1.0, 2.0, 5.0)
    assert weight.break_even == 2
    assert weight.multiple == 2
    assert found.weights[0].seconds is None, "not timed"
    (row,) = found.budgets
    assert row.totals is not None
    assert found.fixed.latency_s is not None
    assert row.totals.latency_s == found.fixed.latency_s + weight.seconds[row.ranks["3"] - 1]
    assert found.dense.latency_s == found.fixed.latency_s + 5.0
    assert all(rank % 2 == 0 or rank == len(w.macs) for w, rank in zip(found.weights, row.ranks.values(), strict=True))


@pytest.mark.parametrize("kind", ["lstm", "attention", "tied", "half"])
def test_every_kind_of_network(kind: str) -> None:
    if kind == "lstm":
        model, x = nn.LSTM(8, 10, batch_first=True), torch.randn(2, 5, 8)
    elif kind == "attention":
        model, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 6, 16)
    elif kind == "half":
        model, x = network(torch.bfloat16), inputs().bfloat16()
    else:
        model = nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 12), nn.Linear(12, 20, bias=False))
        model[2].weight = model[0].weight
        x = torch.randint(20, (2, 7))
    found = plan(model, x, [x], budgets=[0.8], where=EVERYTHING)
    totals = found.budgets[0].totals
    assert totals is not None
    assert totals.macs <= 0.8 * found.dense.macs
    assert totals.output_error is not None
    assert 0 < totals.output_error < 1.5
    assert Plan.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_files_come_back_equal_and_others_are_refused(tmp_path: Path, found: Plan) -> None:
    found.save(tmp_path / "deep" / "plan.json")
    assert Plan.load(tmp_path / "deep" / "plan.json") == found
    for text, says in (("{", "is damaged"), ("{}", "is not a plan"), ('{"weights": []}', "is not what to_dict wrote")):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(FormatError, match=says):
            Plan.load(tmp_path / "other.json")
    with pytest.raises(FormatError, match="has format 99"):
        Plan.from_dict(found.to_dict() | {"format": 99})


def test_text_shows_budgets_layers_and_reasons(found: Plan) -> None:
    text = str(found)
    assert "| 50 % macs |" in text
    assert "at 50 % macs" in text
    assert "1 (BatchNorm2d) stays dense: BatchNorm2d has vectors only" in text
    assert "loss" in text.splitlines()[1]
    assert "latency" not in text.splitlines()[1], "what was not measured has no column"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"loss": F.cross_entropy}, "given together with data"),
        ({"examples": 0}, "at least 1"),
        ({"budgets": [40.0]}, "plan: each of budgets must be a Budget"),
    ],
    ids=["loss-alone", "examples", "budget"],
)
def test_wrong_arguments(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        plan(network(), inputs(), **arguments)


def test_nothing_to_factorize() -> None:
    with pytest.raises(LayerError):
        plan(nn.ReLU(), inputs())


def test_the_model_is_left_untouched() -> None:
    dense = network().train()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    plan(dense, inputs(), batches(1), F.cross_entropy, budgets=[0.5])
    assert dense.training
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())


RECIPE = """
model: {class_path: spectrim.zoo.lenet5, init_args: {}}
data: {class_path: test_plan.Digits, init_args: {}}
loss: torch.nn.CrossEntropyLoss
factorize: {scheme: spatial}
prune: {budget: {macs: 0.5}}
"""


class Digits:
    """Noise in the shape of digits."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        size = next(p for p in zoo.lenet5().parameters()).shape[1]
        self.train = self.val = self.test = [(torch.randn(8, size, 28, 28, generator=generator), torch.arange(8))]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    out = tmp_path / "plan.json"
    cli.main(["plan", str(recipe), "--budgets", "0.5,0.001", "--out", str(out), "--json", "--quiet"])
    text = capsys.readouterr().out
    found = Plan.load(out)
    assert Plan.from_dict(json.loads(text)) == found
    assert [row.budget for row in found.budgets] == [{"macs": 0.5}, {"macs": 0.001}]
    assert (tmp_path / "plan.html").is_file()
    assert found.dense.loss is not None


def test_command_line_by_weights_alone_and_wrong_budgets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE + "dense: {epochs: 1}\n")
    cli.main(["plan", str(recipe), "--weights-only", "--budgets", "0.5", "--quiet"])
    told = capsys.readouterr()
    assert "untrained" in told.err
    assert "WhitenedEnergy" not in told.out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", str(recipe), "--budgets", "50"])
    assert stopped.value.code == 2
    assert BUDGETS[0] == 0.8
