"""`factorize` and `merge`: schemes, starting ranks, and what they say when they cannot."""

import re
import sys
import time
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import spectrim as sp
from spectrim import linalg
from spectrim.errors import LayerError, RankError, SettingError, SpectrimError
from spectrim.forms.svd import Factors
from spectrim.layers import FactorizedLayer, named_factors
from spectrim.plain.chain import PlainPair
from spectrim.surgery.factorize import build, pick_scheme

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


@pytest.mark.parametrize("fold", ["channel", "spatial", "input"])
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
    monkeypatch.setattr(sys.modules["spectrim.surgery.factorize"], "AUTO_ENERGY", 0.9999)
    assert pick_scheme(layer, "auto") == "channel"


def test_auto_by_its_definition() -> None:
    for stride in (1, 2, 3):
        layer = nn.Conv2d(10, 12, (3, 5), stride=stride)
        cost = {}
        for fold in ("channel", "spatial", "input"):
            energy = np.linalg.svd(linalg.to_matrix(layer.weight.detach().double(), fold).numpy(), compute_uv=False) ** 2
            rank = int(np.searchsorted(np.cumsum(energy), 0.8 * energy.sum())) + 1
            # per output position: the first operation runs at every column in the spatial scheme, at every position in the input scheme
            first, second = {"channel": (10 * 15, 12), "spatial": (10 * 3 * stride, 12 * 5), "input": (10 * stride**2, 12 * 15)}[fold]
            cost[fold] = rank * (first + second)
        assert pick_scheme(layer, "auto") == min(cost, key=lambda fold: cost[fold])


def test_a_scheme_that_a_layer_does_not_have_falls_back_to_the_one_it_has() -> None:
    low = sp.factorize(network(), "spatial", EVERYTHING)
    assert [low[index].scheme for index in (0, 2, 4)] == ["spatial", "channel", "channel"]
    assert [sp.factorize(network(), "channel", EVERYTHING)[index].scheme for index in (0, 2, 4)] == ["channel"] * 3


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(SettingError, match=r"factorize: scheme must be 'auto', 'all', 'channel', .*, got 'diagonal'"):
        sp.factorize(network(), "diagonal")


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
        (sp.budget.Fixed(5), {"0": 5, "2": 5, "4": 5}),
        (sp.budget.Fraction(0.5), {"0": 4, "2": 4, "4": 6}),
        (lambda spectrum: len(spectrum) - 1, {"0": 7, "2": 7, "4": 11}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # the same in every process
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
    stated = re.escape("factorize: rank['0'] must be an integer of at least 1, got True") if bad is True else message
    with pytest.raises(SpectrimError, match=stated):
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


# ---- fast decompositions


def wide() -> nn.Sequential:
    return nn.Sequential(nn.Linear(150, 120), nn.Conv2d(30, 40, 3), nn.Linear(12, 12), nn.Linear(120, 150))


def error_of(low: nn.Module, model: nn.Module, name: str) -> float:
    return float((low.get_submodule(name).weight - model.get_submodule(name).weight).detach().double().norm())


@pytest.mark.parametrize("method", ["randomized", "auto"])
@pytest.mark.parametrize("rank", [8, {"0": 8, "1": 4, "3": 100}], ids=str)
def test_randomized_factors_are_nearly_the_best(method: Any, rank: Any) -> None:
    model = wide()
    state = torch.get_rng_state()
    exact, sketched, again = (sp.factorize(model, "channel", EVERYTHING, rank=rank, method=m) for m in ("exact", method, method))
    assert torch.equal(torch.get_rng_state(), state)
    assert ranks_of(exact) == ranks_of(sketched)
    assert all(torch.equal(a, b) for a, b in zip(sketched.parameters(), again.parameters(), strict=True))
    for name in ranks_of(exact):
        best = error_of(exact, model, name)
        assert best * (1 - 1e-6) <= error_of(sketched, model, name) <= 1.01 * best + 1e-5  # float32 factors of full rank


def test_where_the_sketch_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, ...]] = []
    sketch = linalg.randomized_svd
    monkeypatch.setattr(linalg, "randomized_svd", lambda matrix, rank: taken.append(tuple(matrix.shape)) or sketch(matrix, rank))
    shapes = {"0": (120, 150), "1": (40, 270), "2": (12, 12), "3": (150, 120)}
    for method, rank, expected in [
        ("auto", 14, "03"),  # 14 + 16 is a quarter of 120
        ("auto", 15, ""),
        ("auto", sp.budget.Fixed(2), ""),
        ("auto", None, ""),
        ("auto", {"3": 2}, "3"),
        ("exact", 2, ""),
        ("randomized", 2, "013"),  # 2 + 16 columns are more than the 12 of the small layer
        ("randomized", 23, "013"),
        ("randomized", 24, "03"),
    ]:
        taken.clear()
        sp.factorize(wide(), "channel", EVERYTHING, rank=rank, method=method)
        assert taken == [shapes[name] for name in expected]


@pytest.mark.parametrize("rank", [None, sp.Energy(0.9), sp.budget.Fixed(3)], ids=str)
def test_a_sketch_needs_to_know_the_rank(rank: Any) -> None:
    message = r"factorize: rank must be a number or a mapping .*, got .*; rules need the whole spectrum: method='exact'"
    with pytest.raises(SettingError, match=message):
        sp.factorize(network(), rank=rank, method="randomized")
    with pytest.raises(RankError, match=re.escape("layer '0' (8 x 54): rank must be in [1, 8], got 0")):
        sp.factorize(network(), "channel", rank=0, method="randomized")
    with pytest.raises(SettingError, match=r"factorize: method must be 'exact', 'randomized' or 'auto', got 'fast'"):
        sp.factorize(network(), method="fast")


# ---- progress


def test_progress_is_shown_only_when_it_lasts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sp.factorize(network(), progress=True)
    assert capsys.readouterr() == ("", "")  # no terminal
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    sp.factorize(network(), progress=True)
    assert capsys.readouterr() == ("", "")  # too short
    monkeypatch.setattr(sys.modules["spectrim.surgery.factorize"], "PATIENCE_S", 0.0)
    sp.factorize(network())
    assert capsys.readouterr() == ("", "")
    slow = linalg.svd
    monkeypatch.setattr(linalg, "svd", lambda matrix: time.sleep(0.1) or slow(matrix))
    sp.factorize(network(), progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "factorize" in shown.err
    broken = network()
    broken[4].weight.data.fill_(float("nan"))
    with pytest.raises(LayerError, match="layer '4'"):
        sp.factorize(broken, progress=True)


# ---- memory


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of living storages that operations made, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {
            tensor.untyped_storage()._cdata for tensor in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) and not tensor.is_meta else None
            if storage is not None and storage._cdata not in self.seen | inputs:
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return result

    def forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_memory_is_that_of_the_factors_and_of_one_layer(method: Any) -> None:
    size, count, rank = 96, 30, 4
    model = nn.Sequential(*[nn.Linear(size, size, bias=False) for _ in range(count)])
    one, factors = 4 * size * size, 4 * rank * (2 * size + 1)
    sp.factorize(model[:1], where=EVERYTHING, rank=rank, method=method)  # fingerprints keep one vector for all weights of a size
    with LiveBytes() as memory:
        low = sp.factorize(model, where=EVERYTHING, rank=rank, method=method)
    assert len(ranks_of(low)) == count
    assert count * factors <= memory.live <= 1.01 * count * factors  # what is left: the factors
    assert memory.peak <= count * factors + 12 * one  # of one layer: its float64 copy, U, S and Vh of twice its size, and what SVD needs
    assert count * one > 2 * (memory.peak - count * factors)  # the bound would notice a copy of the model


def test_weights_that_are_exchanged_are_not_copied_and_others_are() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 5), nn.MultiheadAttention(6, 2), nn.Embedding(7, 6), nn.Linear(6, 3))
    before = {name: (id(p), p._version, p.clone()) for name, p in model.named_parameters()}
    low = sp.factorize(model)
    assert not any(p.is_meta for p in [*low.parameters(), *low.buffers()])
    assert not any(value.is_meta for m in low.modules() for value in vars(m).values() if isinstance(value, Tensor))
    held = {p.data_ptr() for p in low.parameters()}
    for name, parameter in model.named_parameters():
        assert (id(parameter), parameter._version) == before[name][:2]
        assert torch.equal(parameter, before[name][2])
        assert parameter.data_ptr() not in held


def test_a_weight_that_an_unchosen_layer_holds_as_well_is_copied() -> None:
    """`build` is also called with plans from files, which may know nothing of a tie."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    built = build(model, lambda name, module: "channel" if name == "0" else None, lambda name, weight, matrix: Factors.of(weight, matrix))
    assert torch.equal(built[1].weight, model[1].weight)
    assert built[1].weight is not model[1].weight


def test_a_model_on_the_meta_device_is_factorized_without_computing() -> None:
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Linear(4096, 4096), nn.Conv2d(512, 512, 3), nn.LSTM(4096, 4096), nn.Embedding(32000, 4096), nn.Linear(4096, 10)
        )
    model = model.bfloat16()
    start = time.perf_counter()
    low = sp.factorize(model, rank=64)
    full = sp.factorize(model, method="auto")
    assert time.perf_counter() - start < 5  # exact decompositions of these 300 million weights take minutes
    assert all(p.is_meta for p in low.parameters())
    assert ranks_of(low) == {"0": 64, "1": 64, "2.weight_ih_l0": 64, "2.weight_hh_l0": 64, "3": 64}
    assert ranks_of(full) == {"0": 4096, "1": 512, "2.weight_ih_l0": 4096, "2.weight_hh_l0": 4096, "3": 4096}
    assert low[1].scheme == "channel"
    assert low[0].factors["weight"].dtype == torch.bfloat16
    with pytest.raises(SettingError, match="rank must be a number or a mapping on the meta device, which has no spectra, got Energy"):
        sp.factorize(model, rank=sp.Energy(0.9))


def test_factors_on_meta_have_the_state_dict_of_real_ones() -> None:
    with torch.device("meta"):
        hollow = sp.factorize(network(), "channel", rank=3)
    real = sp.factorize(network(), "channel", rank=3)
    assert {k: v.shape for k, v in hollow.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}


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
    with pytest.raises(LayerError, match=r"layer '2': its weight holds NaN or infinite values; load an undamaged checkpoint"):
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


def test_merge_writes_torch_layers_and_pairs_of_them_only() -> None:
    low = sp.factorize(network(), where=EVERYTHING, rank=2)
    merged = sp.merge(low)
    own = [module for module in merged.modules() if type(module).__module__.split(".")[0] != "torch"]
    assert own
    assert all(isinstance(module, PlainPair) for module in own)
    assert {type(layer).__module__.split(".")[0] for pair in merged.modules() if isinstance(pair, PlainPair) for layer in pair} == {"torch"}
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
