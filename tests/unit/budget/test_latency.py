"""A table of seconds decides what is written. Seconds here are made up; only the smoke test of each backend reads a clock."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import spectrim as sp
from spectrim.budget import latency_cache
from spectrim.budget import latency_table as latency_module
from spectrim.budget.costs import rank_costs
from spectrim.budget.latency_cache import default_cache
from spectrim.budget.latency_table import latency_table
from spectrim.budget.timed import LatencyTable, TimedWeight
from spectrim.budget.timing import Timing
from spectrim.errors import FormatError, LayerError, SettingError
from spectrim.metrics.macs import count_macs
from spectrim.plain.attention import PlainAttention
from spectrim.plain.chain import PlainPair
from spectrim.plain.recurrent import PlainRecurrent

EVERYTHING = sp.match("*")


def network() -> nn.Module:
    """Costs of the two linear layers, in multiply-accumulates: 64 * 64 dense and 128 a rank, so that MACs break even at 31."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Flatten(), nn.Linear(64, 5))


class Clock:
    """Stands for `time_layer`: one second a multiply-accumulate, and `overhead` for a second operation; remembers what it was asked."""

    def __init__(self, overhead: float = 0.0) -> None:
        self.overhead = overhead
        self.asked: list[Any] = []

    def __call__(self, operation: Any, backend: str, threads: int, time_box: float) -> Timing:
        self.asked.append(operation)
        macs = operation.call.macs
        return Timing(macs(None), operation.ranks, tuple(self.overhead + macs(rank) for rank in operation.ranks))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency_module, "time_layer", clock)
    monkeypatch.setattr(latency_module, "time_network", lambda *_: (1e5, ""))
    return clock


def table_of(low: nn.Module, x: Any, slow: dict[str, float]) -> LatencyTable:
    """A table in which a pair's second operation costs what `slow` says of a weight."""
    table = latency_table(low, x)
    weights, timings = {}, dict(table.timings)
    for name, weight in table.weights.items():
        weights[name] = dataclasses.replace(weight, calls=tuple(f"{name} {call}" for call in weight.calls))
        for call in weight.calls:
            old = table.timings[call]
            timings[f"{name} {call}"] = dataclasses.replace(old, pair_s=tuple(s + slow.get(name, 0.0) for s in old.pair_s))
    return dataclasses.replace(table, weights=weights, timings=timings)


# ---- break-even ranks


def test_break_evens_by_hand(clock: Clock) -> None:
    """``128 r + overhead <= 0.95 * 4096``: r <= 30.4 without overhead, r <= 22.6 with 1000; multiples of 8."""
    low, x = sp.factorize(network()), torch.randn(1, 64)
    table = latency_table(low, x)
    assert [operation.ranks for operation in clock.asked] == [(8, 16, 24)], "equal layers are timed once"
    assert {name: table.break_even(name) for name in table.weights} == {"0": 24, "2": 24}
    assert latency_table(low, x, multiple=3).break_even("0") == 30
    assert latency_table(low, x, multiple=1).break_even("0") == 30
    assert latency_table(low, x, multiple=1, margin=0.0).break_even("0") == 31, "at 32 both cost the same"
    assert latency_table(low, x, multiple=1, margin=0.5).break_even("0") == 16
    clock.overhead = 1000.0
    assert latency_table(low, x, multiple=1).break_even("0") == 22
    clock.overhead = 4000.0
    slow = latency_table(low, x)
    assert slow.break_even("0") == 0
    assert slow.seconds("0", None) == 4096
    assert slow.seconds("0", 12) == pytest.approx(4000 + 12 * 128)


def test_interpolation_is_monotone() -> None:
    timing = Timing(1.0, (8, 16, 24), (0.6, 0.5, 0.9))
    seconds = [timing.at(rank) for rank in range(1, 40)]
    assert seconds == sorted(seconds)
    assert timing.at(20) == pytest.approx(0.75)
    assert Timing(1.0, (), ()).at(3) == math.inf


def test_a_pair_with_more_macs_is_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_module, "time_layer", lambda op, *_: Timing(1.0, op.ranks, (1e-3,) * len(op.ranks)))
    table = latency_table(sp.factorize(network()), torch.randn(1, 64), multiple=1)
    assert table.break_even("0") == 31


def test_layers_that_run_more_than_once_add_up(clock: Clock) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)[:, :, ::2, ::2])

    low = sp.factorize(Twice(), "spatial", EVERYTHING)
    table = latency_table(low, torch.randn(2, 16, 8, 8))
    assert len(clock.asked) == 2
    assert table.seconds("conv", None) == 2 * 16 * 16 * 9 * (64 + 16)
    assert table.seconds("conv", 4) == 2 * 4 * (16 * 3 + 16 * 3) * (64 + 16)
    assert table.break_even("conv") == 20, "0.95 * 24 = 22.8"


def test_multiples_follow_the_size(clock: Clock) -> None:
    low = sp.factorize(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 40), nn.Linear(40, 40), nn.Linear(40, 80), nn.Linear(80, 80)))
    table = latency_table(low, torch.randn(1, 12))
    assert {name: table.multiple(name) for name in table.weights} == {"0": 1, "1": 1, "2": 4, "3": 4}
    assert len(clock.asked[0].ranks) <= 6


# ---- merge, allocate, coverage


def test_merge_writes_what_the_table_says(clock: Clock) -> None:
    low, x = sp.prune(sp.factorize(network()), sp.budget.Fixed(16)), torch.randn(1, 64)
    table = table_of(low, x, {"2": 2000.0})  # 2000 + 128 * 16 > 0.95 * 4096
    merged = sp.merge(low, latency=table)
    assert [layer._get_name() for layer in merged] == ["PlainPair", "ReLU", "Linear", "Flatten", "Linear"]
    torch.testing.assert_close(merged(x), low(x))
    assert isinstance(sp.merge(low)[2], PlainPair)
    lines = {line.name: line.reason for line in sp.coverage(low, latency=table)}
    assert lines["0"] == "merges to two layers (rank 16 <= 24; as two 2.00x as fast)"
    assert lines["2"] == "merges to one dense layer (rank 16 > 8; as two 1.01x as fast)"
    assert sp.coverage(low, latency=table)[1].break_even == 8
    never = table_of(low, x, {"2": 4000.0})
    expected = f"dense: no rank is faster than dense on this machine ({4096 / (4000 + 1024):.2f}x at rank 8)"
    assert {line.name: line.reason for line in sp.coverage(low, latency=never)}["2"] == expected


def test_a_table_made_before_the_cut_fits_after_it(clock: Clock) -> None:
    low, x = sp.factorize(network()), torch.randn(1, 64)
    table = latency_table(low, x)
    assert table == latency_table(sp.prune(low, sp.budget.Fixed(5)), x)
    assert isinstance(sp.merge(sp.prune(low, sp.budget.Fixed(5)), latency=table)[0], PlainPair)


@pytest.mark.parametrize("fraction", [0.65, 0.8, 0.97])
def test_allocate_respects_multiples_and_dense_layers(clock: Clock, fraction: float) -> None:
    dense, x = network(), torch.randn(1, 64)
    low = sp.factorize(dense)
    table = table_of(low, x, {"2": 2900.0})  # 2900 + 1024 > 0.95 * 4096: at no rank
    ranks = sp.allocate(low, sp.Budget(macs=fraction), x, latency=table)
    assert ranks["0"] in (8, 16, 24)
    assert ranks["2"] == 64, "stays dense"
    merged = sp.merge(sp.prune(low, ranks), latency=table)
    assert isinstance(merged[0], PlainPair)
    assert type(merged[2]) is nn.Linear
    limit = fraction * count_macs(dense, x)
    assert limit - 8 * 128 < count_macs(merged, x) <= limit or ranks["0"] == 24
    with pytest.raises(SettingError, match=r"Budget: macs must be at least 0\.6"):  # (1024 + 4096 + 320) / 8512
        sp.allocate(low, sp.Budget(macs=0.4), x, latency=table)


def test_multiples_without_a_table() -> None:
    dense, x = network(), torch.randn(1, 64)
    low = sp.factorize(dense)
    ranks = sp.allocate(low, sp.Budget(macs=0.5), x, multiple=5)
    assert all(rank % 5 == 0 or rank == 64 for rank in ranks.values())
    assert count_macs(sp.merge(sp.prune(low, ranks)), x) <= 0.5 * count_macs(dense, x)
    with pytest.raises(SettingError, match="allocate: multiple must be an integer of at least 1, got 0"):
        sp.allocate(low, sp.Budget(macs=0.5), x, multiple=0)


def test_costs_are_those_of_the_network_merged_with_the_table(clock: Clock) -> None:
    clock.overhead = 500.0
    low, x = sp.factorize(network(), where=EVERYTHING), torch.randn(2, 64)
    table = latency_table(low, x, multiple=1)
    costs = rank_costs(low, x, table)
    fixed = count_macs(sp.merge(low, latency=table), x) - sum(cost.macs[-1] for cost in costs.values())
    for rank in (1, 4, 24, 27, 28, 30):
        cut = sp.prune(low, {"0": rank, "2": rank, "4": min(rank, 5)})
        merged = sp.merge(cut, latency=table)
        macs = [cost.macs[min(rank, len(cost.macs)) - 1] for cost in costs.values()]
        assert count_macs(merged, x) == fixed + sum(macs)
        assert sum(p.numel() for p in merged.parameters()) - 133 == sum(
            cost.params[min(rank, len(cost.params)) - 1] for cost in costs.values()
        )
    cost = costs["0"]
    assert cost.dense_seconds == 2 * 4096
    assert cost.seconds is not None
    assert cost.seconds[3] == pytest.approx(500 + 2 * 4 * 128)
    assert cost.seconds[63] == cost.seconds[29] == 2 * 4096, "dense above the break-even rank"
    assert rank_costs(low, x)["0"].seconds is None


# ---- other kinds


@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers(clock: Clock, batch_first: bool) -> None:
    low = sp.factorize(nn.LSTM(32, 32, 2, batch_first=batch_first, bidirectional=True), rank=4)
    x = torch.randn(3, 7, 32)
    table = latency_table(low, x)
    shapes = {operation.call.weight: latency_module._example(operation.call).shape for operation in clock.asked}
    steps = (7, 3) if batch_first else (3, 7)
    assert shapes["weight_ih_l0"] == (*steps, 32)
    assert shapes["weight_ih_l1_reverse"] == (*steps, 64)
    assert table.weights["weight_ih_l1"].share + table.weights["weight_hh_l1"].share == 1
    merged = sp.merge(low, latency=table)
    assert isinstance(merged, PlainRecurrent)
    torch.testing.assert_close(merged(x)[0], low(x)[0])


def test_sequences_of_different_length_and_layers_that_do_not_run(clock: Clock) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.idle = nn.GRU(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(pack_padded_sequence(x.transpose(0, 1), torch.tensor([6, 4])))[0].data

    low = sp.factorize(Packed(), where=EVERYTHING)
    table = latency_table(low, torch.randn(2, 6, 32))
    assert {latency_module._example(operation.call).shape for operation in clock.asked} == {(6, 2, 32)}
    assert table.seconds("idle", None) is None
    assert table.break_even("idle") == low.idle.break_even("weight")
    assert table.verdict("idle", 15) == "merges to two layers (rank 15 <= 15, by multiply-accumulates: it does not run on these inputs)"
    assert rank_costs(low, torch.randn(2, 6, 32), table)["idle"].seconds is None


def test_attention_and_embedding(clock: Clock) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 32)
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            return self.attention(x, x, x, need_weights=False)[0]

    low, tokens = sp.factorize(Block(), where=EVERYTHING, rank=4), torch.randint(0, 50, (2, 5))
    table = latency_table(low, tokens)
    assert "look-up" in table.verdict("embedding", 4)
    assert table.seconds("attention.in_proj_weight", 4) == 10 * 4 * 128
    merged = sp.merge(low, latency=table)
    assert isinstance(merged.attention, PlainAttention)
    torch.testing.assert_close(merged(tokens), low(tokens))
    slow = table_of(low, tokens, {"attention.in_proj_weight": 1e9, "attention.out_proj": 1e9})
    assert type(sp.merge(low, latency=slow).attention) is nn.MultiheadAttention
    half = sp.merge(low, latency=table_of(low, tokens, {"attention.in_proj_weight": 1e9}))
    assert isinstance(half.attention, PlainAttention)
    torch.testing.assert_close(half(tokens), low(tokens))


# ---- a table for another model, files


def test_tables_of_other_models_are_refused(clock: Clock) -> None:
    x = torch.randn(1, 64)
    table = latency_table(sp.factorize(network()), x)
    with pytest.raises(LayerError, match=r"layer '4': is not in the latency table; make the table of this model"):
        sp.merge(sp.factorize(network(), where=EVERYTHING), latency=table)
    with pytest.raises(LayerError, match=r"layer '0': was timed as Linear\(.*float32.* and is Linear\(.*float64"):
        sp.merge(sp.factorize(network()).double(), latency=table)
    conv = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
    table = latency_table(sp.factorize(conv, "channel", EVERYTHING), torch.randn(1, 8, 5, 5))
    with pytest.raises(LayerError, match=r"scheme=channel.*scheme=spatial"):
        sp.coverage(sp.factorize(conv, "spatial", EVERYTHING), latency=table)


def test_a_table_survives_json(clock: Clock) -> None:
    table = latency_table(sp.factorize(network()), torch.randn(1, 64))
    fields = json.loads(json.dumps(table.to_dict()))
    assert LatencyTable.from_dict(fields) == table
    for change in ({"timings": {}}, {"margin": 3}, {"weights": {"0": {}}}, {"other": 1}):
        with pytest.raises(FormatError, match="LatencyTable"):
            LatencyTable.from_dict({**fields, **change})
    with pytest.raises(FormatError, match="LatencyTable"):
        LatencyTable.from_dict({})


def test_the_cache(clock: Clock, tmp_path: Path) -> None:
    low, x = sp.factorize(network()), torch.randn(1, 64)
    table = latency_table(low, x, cache=tmp_path / "deep" / "cache")
    (path,) = (tmp_path / "deep" / "cache").iterdir()
    assert latency_table(low, x, cache=path.parent) == table
    assert len(clock.asked) == 1, "the second time it was read"
    latency_table(low, torch.randn(2, 64), cache=path.parent)
    assert len(clock.asked) == 2, "another input"
    latency_table(low, x, multiple=4, cache=path.parent)
    assert len(clock.asked) == 3, "other ranks"
    latency_table(low, x, threads=2, cache=path.parent)
    assert len(clock.asked) == 4, "other threads"
    assert len(list(path.parent.iterdir())) == 2
    latency_table(low, x)
    assert len(clock.asked) == 5, "no cache"


def test_another_machine_does_not_read_it(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    low, x = sp.factorize(network()), torch.randn(1, 64)
    latency_table(low, x, cache=tmp_path)
    monkeypatch.setattr(latency_cache, "_processor", lambda: "another processor")
    assert latency_table(low, x, cache=tmp_path).machine["cpu"] == "another processor"
    assert len(clock.asked) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"timings": {"a": {}}}', '{"timings": {"a": {"dense_s": 1, "ranks": [8], "pair_s": [-1]}}}']
)
def test_a_damaged_cache_is_timed_anew(clock: Clock, tmp_path: Path, text: str) -> None:
    low, x = sp.factorize(network()), torch.randn(1, 64)
    table = latency_table(low, x, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match="damaged, its layers are timed again"):
        assert latency_table(low, x, cache=tmp_path) == table
    assert len(clock.asked) == 2
    assert latency_table(low, x, cache=tmp_path) == table
    assert len(clock.asked) == 2, "and written anew"


def test_the_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "spectrim"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache().parts[-2:] == (".cache", "spectrim")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threads": 0}, "latency_table: threads must be an integer of at least 1, got 0"),
        ({"multiple": 0}, "multiple must be an integer of at least 1"),
        ({"margin": 1.0}, r"margin must be in \[0, 1\)"),
        ({"time_box": 0.0}, "time_box must be above 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        latency_table(sp.factorize(network()), torch.randn(1, 64), **settings)


def test_nothing_to_time() -> None:
    with pytest.raises(LayerError, match=r"call factorize\(model\) first"):
        latency_table(network(), torch.randn(1, 64))


# ---- the real clock


def every_kind() -> tuple[nn.Module, Tensor]:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolutions = nn.Sequential(
                nn.Conv2d(8, 16, 3, padding=1),
                nn.Conv2d(16, 16, (3, 5), (1, 2), padding=(1, 2), groups=2),
                nn.ConvTranspose2d(16, 16, 4, 2, 1),
            )
            self.same = nn.Conv1d(16, 16, 5, padding="same", bias=False)
            self.lstm, self.gru = nn.LSTM(16, 16, batch_first=True), nn.GRU(16, 16, 2, bias=False, bidirectional=True)
            self.attention, self.linear = nn.MultiheadAttention(32, 2), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.same(self.convolutions(x).flatten(2)[..., :12])
            x = self.gru(self.lstm(x.transpose(1, 2))[0])[0]
            return self.linear(self.attention(x, x, x)[0])

    return Model(), torch.randn(1, 8, 6, 6)


@pytest.mark.parametrize("backend", ["eager", "onnx"])
def test_real_seconds_are_positive_and_finite(backend: Any) -> None:
    if backend == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnx")
    model, x = every_kind()
    low = sp.factorize(model, "spatial", EVERYTHING)
    hits: list[int] = []
    low.linear.register_forward_hook(lambda *_: hits.append(1))
    table = latency_table(low, x, backend=backend, time_box=1e-3)
    assert len(hits) == 1, "the model runs once; what is timed has no hooks"
    untimed = {name for name, weight in table.weights.items() if weight.untimed}
    assert untimed == (set() if backend == "eager" else {name for name in table.weights if "weight_hh" in name})
    for timing in table.timings.values():
        assert timing.ranks
        assert all(0 < seconds < 60 for seconds in (timing.dense_s, *timing.pair_s))
    merged = sp.merge(sp.prune(low, sp.budget.Fixed(4)), latency=table)
    torch.testing.assert_close(merged(x), sp.prune(low, sp.budget.Fixed(4))(x))


def test_onnx_says_what_it_has_no_form_for(clock: Clock) -> None:
    pytest.importorskip("onnxruntime")
    low = sp.factorize(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"), nn.ReLU()), where=EVERYTHING)
    table = latency_table(low, torch.randn(1, 16, 5, 5), backend="onnx")
    assert table.weights["0"] == TimedWeight(
        table.weights["0"].layer, (), 4, low[0].break_even("weight"), 1.0, "no ONNX form of padding_mode='circular' is implemented"
    )
