"""`factorize` and `merge`: schemes, starting ranks, and what they say when they cannot."""

import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim import linalg
from spectrim.errors import LayerError, RankError, SettingError
from spectrim.factorize import pick_scheme
from spectrim.layers import FactorizedLayer, named_factors

EVERYTHING = sp.match("*")


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 25, 12), nn.Linear(12, 4)
    )


def ranks_of(model: nn.Module) -> dict[str, int]:
    return {name: factors.rank for name, factors in named_factors(model)}


# ---- schemes


def low_rank_kernel(fold: Any, shape: tuple[int, ...] = (16, 16, 3, 3), noise: float = 0.01) -> torch.Tensor:
    """A kernel of rank one in one fold (and of high rank in the other) with a little noise."""
    matrix = linalg.to_matrix(torch.zeros(shape), fold)
    product = torch.randn(matrix.shape[0], 1) @ torch.randn(1, matrix.shape[1]) + noise * torch.randn(matrix.shape)
    return linalg.from_matrix(product, shape, fold)


@pytest.mark.parametrize("fold", ["channel", "spatial"])
def test_auto_takes_the_scheme_with_fewer_macs_at_equal_energy(fold: Any) -> None:
    layer = nn.Conv2d(16, 16, 3)
    layer.weight.data = low_rank_kernel(fold)
    assert pick_scheme(layer, "auto") == fold
    assert sp.factorize(layer).scheme == fold


def test_auto_compares_at_95_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 2 % of noise, which is of full rank in both folds: at full rank channel costs 16 * 160, spatial 48 * 96."""
    layer = nn.Conv2d(16, 16, 3)
    layer.weight.data = low_rank_kernel("spatial", noise=0.15)
    assert pick_scheme(layer, "auto") == "spatial"
    monkeypatch.setattr(sys.modules["spectrim.factorize"], "AUTO_ENERGY", 0.9999)
    assert pick_scheme(layer, "auto") == "channel"


def test_auto_by_its_definition() -> None:
    for stride in (1, 2, 3):
        layer = nn.Conv2d(10, 12, (3, 5), stride=stride)
        cost = {}
        for fold in ("channel", "spatial"):
            energy = np.linalg.svd(linalg.to_matrix(layer.weight.detach().double(), fold).numpy(), compute_uv=False) ** 2
            rank = int(np.searchsorted(np.cumsum(energy), 0.95 * energy.sum())) + 1
            # per output position: the first operation runs at stride-1 columns in the spatial scheme
            first, second = {"channel": (10 * 15, 12), "spatial": (10 * 3 * stride, 12 * 5)}[fold]
            cost[fold] = rank * (first + second)
        assert pick_scheme(layer, "auto") == min(cost, key=lambda fold: cost[fold])


def test_a_scheme_that_a_layer_does_not_have_falls_back_to_the_one_it_has() -> None:
    low = sp.factorize(network(), "spatial", EVERYTHING)
    assert [low[index].scheme for index in (0, 2, 4)] == ["spatial", "channel", "channel"]
    assert [sp.factorize(network(), "channel", EVERYTHING)[index].scheme for index in (0, 2, 4)] == ["channel"] * 3


def test_an_unknown_scheme_is_refused() -> None:
    factorize = getattr(sp.factorize, "__wrapped__", sp.factorize)  # without the checks of argument types
    with pytest.raises(SettingError, match=r"factorize: scheme must be 'auto', 'channel' or 'spatial', got 'diagonal'"):
        factorize(network(), "diagonal")


# ---- ranks from the start


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (None, {"0": 8, "2": 8, "4": 12}),
        (3, {"0": 3, "2": 3, "4": 3}),
        (10, {"0": 8, "2": 8, "4": 10}),
        (np.int64(3), {"0": 3, "2": 3, "4": 3}),
        ({"4": 2}, {"0": 8, "2": 8, "4": 2}),
        ({"4": np.int32(2), "0": 1}, {"0": 1, "2": 8, "4": 2}),
        (sp.Fixed(5), {"0": 5, "2": 5, "4": 5}),
        (sp.Fraction(0.5), {"0": 4, "2": 4, "4": 6}),
        (lambda spectrum: len(spectrum) - 1, {"0": 7, "2": 7, "4": 11}),
    ],
    ids=str,
)
def test_rank(rank: Any, expected: dict[str, int]) -> None:
    low = sp.factorize(network(), "channel", rank=rank)
    assert ranks_of(low) == expected
    assert all(type(found) is int for found in ranks_of(low).values())


def test_starting_low_is_factorizing_and_then_cutting() -> None:
    model = network().double()
    at_once, later = sp.factorize(model, rank=sp.Energy(0.8)), sp.prune(sp.factorize(model), sp.Energy(0.8))
    assert ranks_of(at_once) == ranks_of(later)
    for (_, a), (_, b) in zip(named_factors(at_once), named_factors(later), strict=True):
        torch.testing.assert_close(a.matrix(), b.matrix(), rtol=1e-9, atol=1e-12)
    x = torch.randn(2, 6, 5, 5).double()
    torch.testing.assert_close(at_once(x), later(x), rtol=1e-9, atol=1e-9)


def test_a_weight_of_zeros_has_rank_one_at_least() -> None:
    layer = nn.Linear(5, 5)
    layer.weight.data.zero_()
    low = sp.factorize(layer, rank=sp.Energy(1.0))
    assert low.rank == 1
    assert not low.weight.any()


@pytest.mark.parametrize("bad", [0, -1, True])
def test_ranks_out_of_range_are_refused_by_name(bad: Any) -> None:
    message = re.escape(f"layer '0' (8 x 54): rank must be in [1, 8], got {bad!r}")
    with pytest.raises(RankError, match=message):
        sp.factorize(network(), "channel", rank=bad)
    with pytest.raises(RankError, match=message):
        sp.factorize(network(), "channel", rank={"0": bad})
    with pytest.raises(RankError, match=message):
        sp.factorize(network(), "channel", rank=lambda spectrum: bad)


@pytest.mark.parametrize("bad", [9, 2.0])
def test_ranks_of_a_mapping_are_not_bent_to_fit(bad: Any) -> None:
    with pytest.raises(RankError, match=re.escape(f"layer '0' (8 x 54): rank must be in [1, 8], got {bad!r}")):
        sp.factorize(network(), "channel", rank=lambda spectrum: bad if len(spectrum) == 8 else 1)
    with pytest.raises(RankError, match=re.escape("layer '2' (8 x 8): rank must be in [1, 8], got 9")):
        sp.factorize(network(), "channel", rank={"2": 9})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("layer1.con1", "did you mean 'layer1.conv1'?"),
        ("layer1.conv1.weight", "did you mean 'layer1.conv1'?"),
        ("zzz", "factorized are: layer1.conv1, layer1.conv2"),
    ],
)
def test_names_that_are_not_factorized_are_refused_with_a_suggestion(name: str, hint: str) -> None:
    model = nn.Sequential()
    model.add_module("layer1", nn.Sequential())
    model.layer1.add_module("conv1", nn.Conv2d(3, 4, 3))
    model.layer1.add_module("conv2", nn.Conv2d(4, 4, 3))
    model.add_module("fc", nn.Linear(4, 4))
    with pytest.raises(LayerError, match=re.escape(f"layer '{name}': is not a factorized weight of this model; {hint}")):
        sp.factorize(model, rank={name: 1})
    with pytest.raises(LayerError, match=re.escape(f"layer '{name}': is not a factorized weight of this model; {hint}")):
        sp.prune(sp.factorize(model), {name: 1})


# ---- what cannot be done


def test_a_model_without_anything_to_factorize_says_why() -> None:
    with pytest.raises(LayerError, match=r"layer 'Sequential': nothing to factorize; '0': LayerNorm has vectors only"):
        sp.factorize(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(LayerError, match=r"layer 'ReLU': nothing to factorize; it has no parameters"):
        sp.factorize(nn.ReLU())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    model = network()
    model[2].weight.data[1, 2] = bad
    with pytest.raises(LayerError, match=r"layer '2': its weight holds NaN or infinite values; load a sound checkpoint"):
        sp.factorize(model)
    lstm = nn.LSTM(4, 4)
    lstm.weight_hh_l0.data[1, 2] = bad
    with pytest.raises(LayerError, match=r"layer 'weight_hh_l0': its weight holds NaN or infinite values"):
        sp.factorize(lstm)


# ---- merge


def test_merging_a_dense_model_copies_it() -> None:
    model = network()
    merged = sp.merge(model)
    assert repr(merged) == repr(model)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(merged.parameters(), model.parameters(), strict=True))


def test_a_round_trip_gives_the_dense_model_back() -> None:
    model = network().double()
    merged = sp.merge(sp.factorize(model, where=EVERYTHING))
    assert repr(merged) == repr(model)
    assert list(merged.state_dict()) == list(model.state_dict())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, rtol=1e-9, atol=1e-12)


def test_merge_writes_torch_layers_only() -> None:
    low = sp.factorize(network(), where=EVERYTHING, rank=2)
    merged = sp.merge(low)
    assert {type(module).__module__.split(".")[0] for module in merged.modules()} == {"torch"}
    assert sum(p.numel() for p in merged.parameters()) < sum(p.numel() for p in network().parameters()) / 2
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(merged(x), low(x))


def test_merged_models_train_on_their_own() -> None:
    low = sp.factorize(network(), rank=2)
    merged = sp.merge(low)
    before = [p.clone() for p in low.parameters()]
    optimizer = torch.optim.SGD(merged.parameters(), lr=0.1)
    merged(torch.randn(2, 6, 5, 5)).square().sum().backward()
    optimizer.step()
    assert all(p.grad is not None for p in merged.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, low.parameters(), strict=True))


def test_only_the_output_projection_of_an_attention_is_low_rank() -> None:
    model = nn.Sequential(nn.MultiheadAttention(12, 2))
    low = sp.factorize(model, where=sp.match("*out_proj"), rank=2)
    assert ranks_of(low) == {"0.out_proj": 2}
    x = torch.randn(5, 2, 12)
    torch.testing.assert_close(sp.merge(low)[0](x, x, x), low[0](x, x, x))
    full = sp.factorize(model, where=sp.match("*out_proj"))
    assert isinstance(full[0].out_proj, FactorizedLayer)
    assert type(sp.merge(full)[0].out_proj) is type(model[0].out_proj)
    torch.testing.assert_close(sp.merge(full)[0](x, x, x), model[0](x, x, x))
