"""`compress` under a limit on coded bytes: the written file is what counts; label-free; after a cut; by a search; from the command line."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

import spectrim as sp
from spectrim.budget.budget import BudgetError, FloorError
from spectrim.budget.rounding.round_to import round_to
from spectrim.cli import main
from spectrim.errors import RecipeError, SettingError
from spectrim.linalg.feedback import metric_of
from spectrim.metrics.measurement import Measurement, measure
from spectrim.metrics.verdict import verdict
from spectrim.pipeline.coding import check_size
from spectrim.pipeline.recipe import parse_recipe
from spectrim.pipeline.search import smallest, unit_of
from spectrim.report import text_report
from spectrim.storage.pack import pack, packed_sizes, unpack

LOSS = nn.CrossEntropyLoss()


def network() -> nn.Sequential:
    first = nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*first, nn.Linear(72, 24), nn.ReLU(), nn.Linear(24, 10))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    centers = torch.randn(10, 1, 8, 8)
    data = []
    for _ in range(2):
        labels = torch.randint(10, (128,))
        data.append((centers[labels] + 0.5 * torch.randn(128, 1, 8, 8), labels))
    model = network()
    sp.fit(model, data, LOSS, torch.optim.Adam(model.parameters(), 1e-2), epochs=12, progress=False)
    return model.eval(), data


def test_inputs_alone_give_a_network_and_a_file_within_the_bytes(
    trained: tuple[nn.Module, list[tuple[Tensor, Tensor]]], tmp_path: Path
) -> None:
    model, data = trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = sp.compress(model, [x for x, _ in data], sp.Budget(coded_bytes=0.2), folder=tmp_path, progress=False)
    held = measure(model, latency=False).size_bytes
    size = (tmp_path / "model.spz").stat().st_size
    assert 0.9 * 0.2 * held < size <= 0.2 * held
    final = made.measured["final"]
    assert made.packed is not None
    assert (final.coded_bytes, made.packed.coded_bytes, packed_sizes(tmp_path / "model.spz").coded_bytes) == (size, size, size)
    assert 0 < (final.data_bytes or 0) + (final.index_bytes or 0) < size
    again = unpack(tmp_path / "model.spz", network()).eval()
    assert torch.equal(again(data[0][0]), made.model(data[0][0]))
    assert torch.equal(sp.load(tmp_path / "final", network()).eval()(data[0][0]), made.model(data[0][0]))
    assert list(made.scores) == ["dense", "rounded"]
    assert made.scores["rounded"]["loss"] < 0.05
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert "coded file" in made.summary()
    assert f"to {size:,} B" in made.verdict.size
    assert "coded file" in text_report(tmp_path)


def test_a_cut_comes_first_and_rounding_last(trained: tuple[nn.Module, list[tuple[Tensor, Tensor]]]) -> None:
    model, data = trained
    made = sp.compress(model, data, LOSS, sp.Budget(macs=0.6, coded_bytes=0.17), 1, cut="plain", progress=False)
    dense, final = made.measured["dense"], made.measured["final"]
    assert (final.macs or 0) <= 0.6 * (dense.macs or 0)
    assert (final.coded_bytes or 9999) <= 0.17 * dense.size_bytes
    assert list(made.scores)[-2:] == ["final", "rounded"]
    assert len(made.ranks) > 0
    assert made.report["packed"]["coded_bytes"] == final.coded_bytes


def test_a_search_looks_for_the_smallest_file_by_factors() -> None:
    def make(budget: sp.Budget) -> float:
        assert budget.coded_bytes is not None
        if budget.coded_bytes < 0.02:
            raise BudgetError("too few")
        return float(budget.coded_bytes)

    budget = sp.Budget(coded_bytes=0.5, max_drop=1.0)
    made, tried = smallest(budget, unit_of(budget), make, lambda size: ({"accuracy": 0.9}, {"accuracy": 0.9 - 0.0005 / size}))
    assert 0.05 <= made <= 0.05 * 1.12
    assert len(tried) == 5
    assert all(set(one["budget"]) == {"coded_bytes"} for one in tried)
    absolute = sp.Budget(coded_bytes=2000, max_drop=1.0)
    with pytest.raises(SettingError, match="a fraction"):
        smallest(absolute, unit_of(absolute), make, lambda size: ({}, {}))


def test_what_cannot_be_met_is_refused(trained: tuple[nn.Module, list[tuple[Tensor, Tensor]]], tmp_path: Path) -> None:
    model, data = trained
    with pytest.raises(BudgetError, match=r"coded_bytes=0.001 allows \d bytes; it must be at least"):
        sp.compress(model, data, LOSS, sp.Budget(coded_bytes=0.001), progress=False)
    with pytest.raises(FloorError, match="macs"):
        sp.compress(model, data, LOSS, sp.Budget(coded_bytes=0.1, macs=0.001), progress=False)
    with pytest.raises(BudgetError, match="the coded file has"):
        check_size(sp.Budget(coded_bytes=1000), 1000, pack(model, tmp_path / "large.spz"))
    with pytest.raises(SettingError, match="epochs must be left out"):
        sp.compress(model, data, LOSS, sp.Budget(coded_bytes=0.1), epochs=1)
    low = sp.factorize(model)
    with pytest.raises(SettingError, match="allocate: budget must be without coded_bytes"):
        sp.allocate(low, sp.Budget(coded_bytes=0.1, macs=0.5), data[0][0])
    recipe = {"model": "a.b", "data": "a.c", "loss": "torch.nn.MSELoss", "prune": {"budget": {"coded_bytes": 0.1}}}
    with pytest.raises(RecipeError, match="coded_bytes"):
        parse_recipe(recipe)


@pytest.mark.parametrize("value", [0, -0.1, 1, 1.0, 999, float("inf"), float("nan"), True])
def test_coded_bytes_are_a_fraction_or_bytes(value: float) -> None:
    with pytest.raises(SettingError, match="Budget: coded_bytes must be"):
        sp.Budget(coded_bytes=value)


def test_a_budget_tells_what_ranks_decide_from_what_rounding_does() -> None:
    budget = sp.Budget(macs=0.5, coded_bytes=0.05)
    assert budget.limits == {"macs": 0.5}
    assert budget.asked == {"macs": 0.5, "coded_bytes": 0.05}
    assert repr(budget) == "Budget(macs=0.5, coded_bytes=0.05)"


def test_the_verdict_compares_the_file_and_suggests_more_bytes() -> None:
    dense = Measurement(1000, 900, 4000, accuracy=0.9, targets=10_000)
    final = Measurement(1000, 900, 4000, accuracy=0.8, targets=10_000, coded_bytes=400, data_bytes=200, index_bytes=150)
    found = verdict(dense, final)
    assert found.size == "10.00x smaller as a coded file (4,000 to 400 B: values 200, positions of zeros 150)"
    assert found.next.startswith("more coded_bytes")


def test_a_moment_of_constant_inputs_is_factored_all_the_same() -> None:
    noise = torch.randn(12, 12, generator=torch.Generator().manual_seed(0)).double().numpy() * 1e-9
    metric = metric_of(noise + noise.T + 1e-12, 0.01)
    assert (metric.weights > 0).all()


MODULE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))

class Splits:
    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.train = self.val = self.test = [(torch.randn(64, 1, 8, 8, generator=g), torch.randint(10, (64,), generator=g))]
"""


def test_the_command_line_writes_the_file_and_measures_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "codednet.py").write_text(MODULE)
    recipe = tmp_path / "net.yaml"
    recipe.write_text(yaml.safe_dump({"model": "codednet.net", "data": "codednet.Splits", "loss": "torch.nn.CrossEntropyLoss"}))
    main(["compress", str(recipe), "--coded-bytes", "0.2", "--out", str(tmp_path / "out"), "--quiet", "--json"])
    result = json.loads(capsys.readouterr().out)
    file = tmp_path / "out" / "compress" / "model.spz"
    assert result["final"]["coded_bytes"] == file.stat().st_size <= 0.2 * result["dense"]["size_bytes"]
    main(["measure", str(tmp_path / "out"), "--json"])
    assert json.loads(capsys.readouterr().out)["coded_bytes"] == file.stat().st_size
    main(["measure", str(file), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["coded_bytes"], told["data_bytes"] > 0, told["index_bytes"] > 0) == (file.stat().st_size, True, True)
    assert '"coded":[["' in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(SystemExit):
        main(["compress", str(recipe), "--coded-bytes", "12"])
    assert "--coded-bytes" in capsys.readouterr().err
    sys.modules.pop("codednet", None)


def test_round_to_still_names_itself() -> None:
    with pytest.raises(SettingError, match="round_to: coded_bytes"):
        round_to(network(), [torch.randn(4, 1, 8, 8)], 5)
