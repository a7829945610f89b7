"""Crossbars: an ideal device computes the quantized network, deviations are those asked for, tiles are counted."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spectrim as sp
from spectrim.errors import LayerError, SettingError
from spectrim.projections import Structured, Tiles
from spectrim.runtimes.crossbar import PRESETS, Device, Mapping, monte_carlo, on_crossbars, price_on_crossbars
from spectrim.runtimes.crossbar.layers import mapped_layers

IDEAL = Device()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("cell", [1, 4])
@pytest.mark.parametrize("tile", [(1, 1), (7, 3), (128, 64)])
@pytest.mark.parametrize("output_bits", [32, 24], ids=["exact sums", "sums of tiles"])
def test_an_ideal_device_computes_the_quantized_network(bits: int, cell: int, tile: tuple[int, int], output_bits: int) -> None:
    model, mapping, x = network().double(), Mapping(*tile, bits), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    device = replace(IDEAL, bits=cell, output_bits=output_bits)
    quantized = network().double()
    with torch.no_grad():
        for layer in (quantized[0], quantized[3]):
            layer.weight.copy_(mapping.quantized(layer.weight))
        torch.testing.assert_close(on_crossbars(model, device, mapping)(x), quantized(x), rtol=0, atol=1e-6 if output_bits == 32 else 1e-5)


def test_a_weight_is_the_difference_of_its_slices() -> None:
    weight, mapping, device = torch.randn(6, 9, dtype=torch.float64), Mapping(bits=7), replace(IDEAL, bits=3)
    levels, step = mapping.levels(weight, device)
    assert levels.shape == (3, 2, 6, 9)
    assert levels.min() >= 0
    assert levels.max() < 2**3
    assert bool((levels.amin(1) == 0).all()), "one cell of a pair is at its lowest level"
    back = sum(8.0**place * (pair[0] - pair[1]) for place, pair in enumerate(levels)) * step
    torch.testing.assert_close(back, mapping.quantized(weight), rtol=0, atol=1e-12)


def test_deviations_are_those_asked_for_and_repeat_with_the_seed() -> None:
    levels = torch.full((40_000,), 7.0)
    held = replace(IDEAL, programming=0.2).programmed(levels, torch.Generator().manual_seed(0))
    nominal = float(IDEAL.nominal(torch.tensor(7.0)))
    assert float((held / nominal).log().std()) == pytest.approx(0.2, rel=0.02)
    added = replace(IDEAL, level_noise=0.5).programmed(levels, torch.Generator().manual_seed(0))
    assert float((added - nominal).std()) == pytest.approx(0.5 * IDEAL.step, rel=0.02)
    stuck = replace(IDEAL, stuck_low=0.1, stuck_high=0.05).programmed(levels, torch.Generator().manual_seed(0))
    assert float((stuck == IDEAL.g_min).double().mean()) == pytest.approx(0.1, abs=0.005)
    assert float((stuck == IDEAL.g_max).double().mean()) == pytest.approx(0.05, abs=0.005)
    drifted = replace(IDEAL, drift=0.1, time=math.e).programmed(levels, torch.Generator())
    torch.testing.assert_close(drifted, torch.full_like(drifted, nominal * math.exp(-0.1)))
    x, model = torch.randn(2, 3, 8, 8), network()
    noisy = PRESETS["ReRam, worn"]
    one, again, other = (on_crossbars(model, noisy, seed=seed)(x) for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    reading = on_crossbars(model, replace(IDEAL, read_noise=0.05))
    assert not torch.equal(reading(x), reading(x)), "each read has its own noise"


def test_converters_round() -> None:
    model, x = nn.Linear(6, 4, bias=False), torch.randn(3, 6)
    rough = on_crossbars(model, replace(IDEAL, input_bits=2))(x)
    levels = torch.sign(x) * (x.abs() >= x.abs().max() / 2) * x.abs().max()
    torch.testing.assert_close(rough, F.linear(levels, Mapping().quantized(model.weight)))
    coarse = on_crossbars(model, replace(IDEAL, output_bits=2))(x)
    assert len(coarse.unique()) <= 3


def test_halving_the_columns_halves_the_tiles() -> None:
    mapping, device, model = Mapping(rows=16, columns=16, bits=4), Device(bits=4), nn.Sequential(nn.Linear(64, 64))
    whole = price_on_crossbars(model, device, mapping)
    assert whole.tiles == 2 * 16
    assert (whole.cells, whole.dacs) == (32 * 256, 32 * 16)
    with torch.no_grad():
        model[0].weight[::2] = 0  # every second output
    assert price_on_crossbars(model, device, mapping).tiles == 16
    assert price_on_crossbars(model, replace(device, bits=2), mapping).tiles == 32, "two slices"
    low = sp.merge(sp.factorize(nn.Sequential(nn.Linear(64, 64)), where=sp.match("*"), rank=16))
    assert price_on_crossbars(low, device, mapping).tiles == 2 * (4 + 4), "two thin arrays"
    assert len(mapped_layers(low)) == 2


def test_tiles_of_what_is_left_by_hand() -> None:
    """Outputs of one band lie side by side, so that what `Tiles` and blocks prune saves tiles by count."""
    mapping, weight = Mapping(rows=16, columns=16, bits=4), torch.randn(64, 64)
    assert mapping.tiles(weight) == 16
    assert mapping.tiles(Tiles(16, 16, keep=8, along="rows")(weight)) == 8, "half of the outputs of each band"
    assert mapping.tiles(Structured(32, along="columns")(weight)) == 8, "half of the inputs, wherever they are"
    assert mapping.tiles(Structured(5, along="blocks", block=(16, 16))(weight)) == 5
    assert mapping.tiles(Structured(33, along="rows")(weight)) == 12, "one output more than two tiles"
    shifted = weight.clone()
    shifted[:32, 16:32] = 0  # two tiles of the second band; its inputs would lie elsewhere if those of the first band were left out
    shifted[:, :3] = 0
    assert mapping.tiles(shifted) == 14
    assert mapping.tiles(torch.zeros(64, 64)) == 0


def test_what_is_not_built_is_zero_on_any_device() -> None:
    model = nn.Linear(64, 48, bias=False)
    with torch.no_grad():
        model.weight.copy_(Structured(16, along="columns")(Structured(32)(model.weight)))
    built = model.weight.any(0) & model.weight.any(1)[:, None]
    held = on_crossbars(model, PRESETS["ReRam"], Mapping(16, 16, 4)).weight
    assert torch.equal(held != 0, built)
    assert int(built.sum()) == 16 * 32


def test_weights_on_levels_stay_on_them() -> None:
    """Also where the highest levels are free: the step is that of the levels, and an ideal device computes the same network."""
    torch.manual_seed(0)
    step, places = 0.037, torch.randint(-13, 14, (40, 30))
    weight = step * places.float()
    weight[0, 0] = 13 * step
    mapping = Mapping(bits=4)
    assert mapping.step(weight) == pytest.approx(step)
    torch.testing.assert_close(mapping.quantized(weight), weight, rtol=1e-6, atol=0)
    assert mapping.step(torch.randn(50, 50) * 3) > 0
    other = torch.randn(50, 50)
    assert mapping.step(other) == pytest.approx(float(other.abs().max()) / 15), "no levels: the largest magnitude has all bits"
    assert Mapping(bits=2).step(torch.tensor([[1.0, -1.0]])) == pytest.approx(1 / 3)


def test_accuracy_over_draws() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(20, 4), torch.randn(400, 20)
    data = [(x, model(x).argmax(1).detach())]
    found = [
        monte_carlo(model, data, nn.CrossEntropyLoss(), replace(IDEAL, programming=sigma), draws=4).accuracy for sigma in (0.0, 0.2, 0.8)
    ]
    assert found[0][0] > 0.98
    assert found[0][1] == 0
    assert found[0][0] > found[1][0] > found[2][0]


def test_layers_stay_themselves() -> None:
    """References from a list, hooks and the class hold; a forward that is not torch's is refused."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.order = [self.one, torch.relu]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.order:
                x = part(x)
            return x

    class Normed(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return F.linear(input, F.normalize(self.weight))

    model, x, seen = Listed(), torch.randn(3, 4), list[int]()
    model.one.register_forward_hook(lambda *_: seen.append(1))
    rough = on_crossbars(model, replace(IDEAL, programming=0.5, input_bits=6))
    assert isinstance(rough.one, nn.Linear)
    assert not torch.equal(rough(x), model(x)), "the list runs the programmed layer"
    assert len(seen) == 2
    with pytest.raises(LayerError, match="Normed, which is not mapped"):
        on_crossbars(nn.Sequential(Normed(4, 4), nn.Linear(4, 2)), IDEAL)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.LSTM(3, 4), "LSTM, which is not mapped"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), "with groups"),
        (lambda: nn.ReLU(), "no linear layer"),
        (lambda: sp.factorize(nn.Sequential(nn.Linear(8, 8)), where=sp.match("*")), "is factorized"),
    ],
)
def test_what_is_not_mapped_is_refused(make: Any, words: str) -> None:
    with pytest.raises(LayerError, match=words):
        on_crossbars(make(), IDEAL)
    with pytest.raises(LayerError, match=words):
        price_on_crossbars(make(), IDEAL)


@pytest.mark.parametrize(
    "wrong",
    [{"bits": 0}, {"g_max": 0.05}, {"programming": -1.0}, {"stuck_low": 0.6, "stuck_high": 0.6}, {"time": 0.5}, {"output_bits": 33}],
)
def test_settings_are_checked(wrong: Any) -> None:
    with pytest.raises(SettingError, match="Device"):
        Device(**wrong)


def test_counts_are_checked() -> None:
    with pytest.raises(SettingError, match="Mapping"):
        Mapping(rows=0)
    with pytest.raises(SettingError, match="draws"):
        monte_carlo(nn.Linear(2, 2), [(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))], nn.CrossEntropyLoss(), IDEAL, draws=0)
