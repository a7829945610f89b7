"""Tiles as a unit of budgets: counted by hand, as the merged network takes them, and chosen by the one knapsack."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.budget.allocate import as_fractions, choices_of
from spectrim.budget.budget import Budget, BudgetError
from spectrim.budget.ladder import ladder
from spectrim.cli import main
from spectrim.cli.shared import crossbars as read
from spectrim.errors import LayerError, SettingError, UsageError
from spectrim.layers import named_factors
from spectrim.runtimes.crossbar import Crossbars, Device, Mapping
from spectrim.training import Ramp, Squeeze

CHIP = Crossbars(Device(bits=4), Mapping(rows=32, columns=32, bits=4))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)).eval()


def everything(name: str, module: nn.Module) -> bool:
    return True


def test_tiles_by_hand() -> None:
    """800 inputs are 25 bands, 500 outputs 16 columns of tiles: 400 tiles, 800 with pairs; at rank 32 ``25 + 16``, at 33 twice that."""
    low, x = sp.factorize(mlp(), where=everything), torch.zeros(1, 800)
    tiles = ladder(low, x, crossbars=CHIP).unit("tiles")
    assert (tiles.whole, tiles.dense, tiles.fixed) == (2 * (400 + 16), 2 * (400 + 16), 0)
    assert [tiles.weights["0"][rank - 1] for rank in (1, 32, 33, 64, 65, 500)] == [82, 82, 164, 164, 246, 800]
    assert set(tiles.weights["2"][:9]) == {34}, "500 inputs are 16 bands: a pair takes 17 tiles, dense 16"
    assert tiles.weights["2"][9] == 32
    assert sp.allocate(low, Budget(tiles=0.3), x, crossbars=CHIP) == {"0": 64, "2": 10}, "164 + 32 of 249.6 tiles; 65 would take 246"
    assert sp.allocate(low, Budget(tile_count=114), x, crossbars=CHIP) == {"0": 32, "2": 10}
    half = Crossbars(Device(bits=2), CHIP.mapping)
    assert ladder(low, x, crossbars=half).unit("tiles").whole == 2 * tiles.whole, "two slices"


def test_reads_by_hand() -> None:
    """A convolution reads its tiles at every place of its output: 6 x 6 of them, by one tile and its pair."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(8 * 36, 20)).eval()
    x = torch.zeros(2, 3, 12, 12)
    price = CHIP.price(model, x)
    assert (price.tiles, price.reads) == (2 * (1 + 9), 2 * (36 * 1 + 9))
    assert price.energy_nj == pytest.approx(90 * (32 * 0.003 + 32 * 1.67 + 1024 * 0.001) / 1000)
    low = sp.factorize(model, scheme="spatial", where=everything)
    reads = ladder(low, x, crossbars=CHIP).unit("tile_reads")
    assert reads.whole == 90
    assert reads.weights["0"][3] == 2 * (6 * 12 + 6 * 6), "a spatial pair: first along one axis, at the places of the other"


@pytest.mark.parametrize("scheme", ["channel", "spatial", "input", "tucker", "tt"])
def test_the_ladder_is_what_the_merged_network_takes(scheme: Any) -> None:
    torch.manual_seed(0)
    chip, x = Crossbars(mapping=Mapping(16, 8, 4)), torch.randn(3, 16, 8, 8)
    model = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 24, 3), nn.Flatten(), nn.Linear(96, 40), nn.Linear(40, 5))
    low = sp.factorize(model.eval(), scheme=scheme, where=lambda name, module: name != "5")
    prices, held = ladder(low, x, crossbars=chip), dict(named_factors(low))
    for rung in (1, 5, 9, 16, 99):
        rungs = {name: min(rung, factors.rank) for name, factors in held.items()}
        price = chip.price(sp.merge(sp.prune(low, {name: held[name].size_of(at) for name, at in rungs.items()})), x)
        for unit, count in (("tiles", price.tiles), ("tile_reads", price.reads)):
            costs = prices.unit(unit)
            assert costs.fixed + sum(costs.weights[name][at - 1] for name, at in rungs.items()) == count, (unit, rung)


def test_a_rung_that_saves_no_tile_is_no_rung_and_the_best_of_all_is_chosen() -> None:
    torch.manual_seed(0)
    chip, x = Crossbars(mapping=Mapping(4, 4, 4)), torch.zeros(1, 16)
    low = sp.factorize(nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), where=everything)
    held, prices, budget = dict(named_factors(low)), ladder(low, x, crossbars=chip), Budget(tiles=0.8)
    choices = choices_of(held, budget, prices, None)
    assert choices == {name: [4, 16] for name in held}, "7 is the break-even rank, and 5 takes what the dense weight takes"
    assert choices_of(held, Budget(tiles=0.8, macs=0.8), prices, None)["0"] == [1, 2, 3, 4, 5, 6, 7, 16], "fewer operations count, too"
    errors = {name: factors.tail() for name, factors in held.items()}
    relative = {name: tail / tail[0] for name, tail in errors.items()}
    tiles = prices.unit("tiles").weights
    possible = [
        (sum(float(relative[name][rank]) for name, rank in zip(held, ranks, strict=True)), ranks)
        for ranks in itertools.product(*choices.values())
        if sum(tiles[name][rank - 1] for name, rank in zip(held, ranks, strict=True)) <= 0.8 * prices.unit("tiles").whole
    ]
    assert tuple(sp.allocate(low, budget, x, prices=prices).values()) == min(possible)[1]


def test_compress_and_plan_to_tiles() -> None:
    torch.manual_seed(0)
    model, loss = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)), nn.CrossEntropyLoss()
    data, chip = [(torch.randn(64, 64), torch.arange(64) % 10)], Crossbars(mapping=Mapping(16, 16, 4))
    with torch.no_grad():
        model[0].weight[:16] = 0  # a part of the dense network that takes no tiles: what is kept is a part of the rest
    made = sp.compress(model, data, loss, Budget(tiles=0.6), crossbars=chip, cut="plain", progress=False)
    dense, final = made.measured["dense"], made.measured["final"]
    assert (dense.tiles, dense.tile_reads) == (2 * (4 * 7 + 8 * 4 + 4), 2 * (4 * 7 + 8 * 4 + 4))
    assert final.tiles == chip.price(made.model).tiles <= 0.6 * dense.tiles
    assert set(made.ranks.values()) <= {16, 32, 64}
    assert "| tile reduction |" in made.summary()
    found = sp.plan(model, data[0][0], budgets=[Budget(tiles=0.6), Budget(tile_reads=0.01)], crossbars=chip)
    assert found.budgets[0].totals is not None
    assert found.budgets[0].totals.tiles == final.tiles
    assert "tile_reads must be at least" in found.budgets[1].problem
    assert "60 % tiles" in str(found)
    assert type(found).from_dict(found.to_dict()) == found
    assert sp.measure(model, data[0][0], latency=False, crossbars=chip).tile_reads == dense.tile_reads


def test_what_cannot_be_counted_is_refused() -> None:
    low, x = sp.factorize(mlp(), where=everything), torch.zeros(1, 800)
    with pytest.raises(SettingError, match="allocate: crossbars must be given for a budget of tiles"):
        sp.allocate(low, Budget(tiles=0.3), x)
    with pytest.raises(BudgetError, match="tile_count must be at least 114 tiles for this network"):
        sp.allocate(low, Budget(tile_count=50), x, crossbars=CHIP)
    with pytest.raises(LayerError, match="LSTM, which is not mapped"):
        ladder(sp.factorize(nn.LSTM(8, 8), where=everything), torch.zeros(3, 2, 8), crossbars=CHIP)
    with pytest.raises(LayerError, match="is written interpolative"):
        ladder(sp.factorize(mlp(), where=everything, writing="interpolative"), x, crossbars=CHIP)
    for wrong in ({"tiles": 1.5}, {"tile_reads": 0.0}, {"tile_count": 0}):
        with pytest.raises(SettingError, match="Budget: tile"):
            Budget(**wrong)
    with pytest.raises(SettingError, match="tiles crossbars"):
        Ramp(Budget(tiles=0.5))


def test_other_ways_to_a_budget_of_tiles(tmp_path: Path) -> None:
    low, x = sp.factorize(mlp(), where=everything), torch.zeros(1, 800)
    assert Squeeze(Budget(tiles=0.3), crossbars=CHIP, begin=0.0, end=0.5)(low, x, 50, 100) == {"0": 64, "2": 10}
    assert as_fractions(Budget(tile_count=416), low, x, crossbars=CHIP) == Budget(tiles=0.5)
    sp.save(low, tmp_path)
    assert sp.load(tmp_path, mlp(), Budget(tiles=0.3), inputs=x, crossbars=CHIP)[0].rank == 64


def test_the_command_line_reads_crossbars(capsys: pytest.CaptureFixture[str]) -> None:
    assert read("rows=32,columns=32,bits=4,cell_bits=4") == CHIP
    assert read("rows=64") == Crossbars(mapping=Mapping(rows=64))
    assert read(None) is None
    for wrong in ("32x32", "rows=0", "rows=3,rows=4", "cell_bits=9", ""):
        with pytest.raises(UsageError, match="--crossbars"):
            read(wrong)
    with pytest.raises(SystemExit, match="2"):
        main(["compress", "net.yaml", "--tiles", "0.3"])
    assert "tiles of what size" in capsys.readouterr().err
