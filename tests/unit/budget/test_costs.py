"""Costs are those of the network that `merge` really writes: every table entry against a count of the cut and merged model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import spectrim as sp
from spectrim import zoo
from spectrim.budget.costs import RankCosts, rank_costs, spectra, with_counts
from spectrim.layers import named_factors
from spectrim.layers.conv import FactorizedConv
from spectrim.linalg.spectral import tail_energy
from spectrim.metrics.macs import count_macs

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")  # torch's own

EVERYTHING = sp.match("*")


class Attend(nn.Module):
    """Attention on given inputs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **settings)

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        key = query if key is None else key
        return self.attention(query=query, key=key, value=key if value is None else value)[0]


class Turned(nn.Module):
    """Attention whose query is its value, but not its key."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return self.attention(query, key, query, need_weights=False)[0]


class Twice(nn.Module):
    """A layer that runs twice, on inputs of different size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x)[:, :, ::2, ::2])


class Packed(nn.Module):
    """A recurrent layer on sequences of different length."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(pack_padded_sequence(x.transpose(0, 1), torch.tensor([6, 4])))[0].data


def images(*shape: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, *shape)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "linear": (lambda: nn.Linear(12, 9), lambda: torch.randn(2, 5, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 5, stride=2, padding=2), lambda: images(6, 13)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), lambda: images(6, 8, 10)),
    "conv2d-stride": (lambda: nn.Conv2d(6, 8, (3, 5), stride=(2, 3), padding=(1, 0), dilation=(2, 1)), lambda: images(6, 11, 13)),
    "conv2d-groups": (lambda: nn.Conv2d(8, 12, 3, groups=2, stride=2), lambda: images(8, 9, 9)),
    "conv2d-same": (lambda: nn.Conv2d(6, 8, 3, padding="same", padding_mode="circular"), lambda: images(6, 7, 9)),
    "conv2d-1x1": (lambda: nn.Conv2d(12, 9, 1, stride=2), lambda: images(12, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, stride=(1, 2, 1)), lambda: images(4, 4, 5, 6)),
    "conv2d-column": (lambda: nn.Conv2d(12, 9, (5, 1), stride=(1, 2), padding=(2, 0)), lambda: images(12, 8, 7)),
    "conv3d-images": (lambda: nn.Conv3d(8, 9, (1, 3, 3), stride=(2, 1, 1), padding=(0, 1, 1)), lambda: images(8, 4, 5, 6)),
    "transposed1d": (lambda: nn.ConvTranspose1d(6, 8, 3, stride=2, output_padding=1), lambda: images(6, 7)),
    "transposed2d": (lambda: nn.ConvTranspose2d(6, 8, (3, 4), (2, 3), (1, 2), (1, 2)), lambda: images(6, 5, 4)),
    "transposed2d-column": (lambda: nn.ConvTranspose2d(6, 8, (4, 1), (2, 3), (1, 0), (1, 2)), lambda: images(6, 5, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(8, 9, (1, 3, 2), (1, 2, 2)), lambda: images(8, 2, 3, 4)),
    "embedding": (lambda: nn.Embedding(30, 8), lambda: torch.randint(0, 30, (3, 5))),
    "lstm": (lambda: nn.LSTM(24, 8, 2, bidirectional=True, batch_first=True), lambda: torch.randn(2, 5, 24)),
    "lstm-projected": (lambda: nn.LSTM(24, 8, proj_size=5, batch_first=True), lambda: torch.randn(2, 5, 24)),
    "gru-packed": (Packed, lambda: torch.randn(2, 6, 12)),
    "attention": (Attend, lambda: torch.randn(2, 5, 16)),
    "attention-cross": (Attend, lambda: (torch.randn(2, 5, 16), torch.randn(2, 7, 16))),
    "attention-three": (Attend, lambda: (torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16))),
    "attention-turned": (Turned, lambda: (torch.randn(2, 5, 16), torch.randn(2, 5, 16))),
    "attention-separate": (lambda: Attend(kdim=12, vdim=10), lambda: (torch.randn(2, 5, 16), torch.randn(2, 7, 12), torch.randn(2, 7, 10))),
    "attention-bias-kv": (lambda: Attend(add_bias_kv=True, add_zero_attn=True), lambda: torch.randn(2, 5, 16)),
    "runs-twice": (Twice, lambda: images(6, 8, 8)),
    "keyword": (lambda: nn.Linear(12, 9), lambda: {"input": torch.randn(2, 12)}),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(16, 2, 24, batch_first=True),
        lambda: torch.randn(2, 5, 16),
    ),
    "language-model": (lambda: zoo.LSTMLanguageModel(40, 12, 12, 1, 0.0), lambda: torch.randint(0, 40, (2, 5))),
    "language-model-tied": (lambda: zoo.LSTMLanguageModel(40, 12, 12, 1, 0.0, tied=True), lambda: torch.randint(0, 40, (2, 5))),
}
SCHEMES = {name for name in CASES if name.startswith(("conv", "transposed"))} | {"runs-twice"}


def convolution_of(name: str) -> nn.Module:
    return next(module for module in CASES[name][0]().modules() if hasattr(module, "kernel_size"))


PARAMETERS = [
    pytest.param(*CASES[name], scheme, id=f"{name}-{scheme}")
    for name in CASES
    for scheme in (FactorizedConv.schemes(convolution_of(name)) if name in SCHEMES else ("auto",))
]


def count_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("make", "call", "scheme"), PARAMETERS)
def test_costs_are_those_of_the_merged_network(make: Any, call: Any, scheme: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectrim.layers.recurrent.LOOP_MACS", 0.0)  # so that hidden projections of a small layer are split too
    dense, x = make(), call()
    low = sp.factorize(dense, scheme, EVERYTHING)
    costs, held = rank_costs(low, x), {name: factors.rank for name, factors in named_factors(low)}
    assert list(costs) == list(held)
    dense_macs, dense_params = count_macs(dense, x), count_params(dense)
    whole = sp.merge(low)
    fixed_macs = count_macs(whole, x) - sum(cost.macs[-1] for cost in costs.values())
    fixed_params = count_params(whole) - sum(cost.params[-1] for cost in costs.values())
    assert fixed_macs + sum(cost.dense_macs for cost in costs.values()) == dense_macs
    assert fixed_params + sum(cost.dense_params for cost in costs.values()) == dense_params
    split = 0
    most = max(held.values())
    for rank in sorted({1, 2, 3, 5, 7, most // 2, most - 1, most}):
        ranks = {name: min(rank, full) for name, full in held.items()}
        forms = dict(named_factors(low))
        merged = sp.merge(sp.prune(low, {name: forms[name].size_of(rung) for name, rung in ranks.items()}))
        assert count_macs(merged, x) == fixed_macs + sum(costs[name].macs[r - 1] for name, r in ranks.items()), ranks
        assert count_params(merged) == fixed_params + sum(costs[name].params[r - 1] for name, r in ranks.items()), ranks
        split += count_params(merged) != dense_params
    assert split, "at least one rank should have paid"


def test_mixed_ranks_and_a_model_that_was_cut_before() -> None:
    dense, x = zoo.mlperftiny_resnet8(), torch.randn(2, 3, 32, 32)
    low = sp.prune(sp.factorize(dense, rank=12), {"conv1": 5} if "conv1" in dict(dense.named_modules()) else sp.budget.Fixed(9))
    costs = rank_costs(low, x)
    assert all(len(cost.macs) == factors.rank for cost, (_, factors) in zip(costs.values(), named_factors(low), strict=True))
    ranks = {name: 1 + index % len(cost.macs) for index, (name, cost) in enumerate(costs.items())}
    merged, whole = sp.merge(sp.prune(low, ranks)), sp.merge(low)
    change = sum(costs[name].macs[r - 1] - costs[name].macs[-1] for name, r in ranks.items())
    assert count_macs(merged, x) == count_macs(whole, x) + change
    change = sum(costs[name].params[r - 1] - costs[name].params[-1] for name, r in ranks.items())
    assert count_params(merged) == count_params(whole) + change


def test_costs_are_for_one_example() -> None:
    low = sp.factorize(nn.Sequential(nn.Conv2d(6, 8, 3)), "spatial", EVERYTHING)
    assert rank_costs(low, images(6, 8, 8, batch=1)) == rank_costs(low, images(6, 8, 8, batch=5))


def test_a_layer_that_does_not_run_costs_parameters_only() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    costs = rank_costs(sp.factorize(Idle(), where=EVERYTHING), torch.randn(3, 8))
    assert costs["idle"].macs == (0.0,) * 8
    assert costs["idle"].dense_macs == 0
    assert costs["used"].macs == (16.0, 32.0, 48.0, 64.0, 64.0, 64.0, 64.0, 64.0)
    assert costs["idle"].params == costs["used"].params == (16, 32, 48, 64, 64, 64, 64, 64)


def test_the_model_is_left_as_it_was() -> None:
    low = sp.factorize(nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), Attend()[:0] if False else nn.Flatten()), where=EVERYTHING)
    low.train()
    before, fast = {key: t.clone() for key, t in low.state_dict().items()}, torch.backends.mha.get_fastpath_enabled()
    rank_costs(low, images(6, 5, 5))
    assert all(torch.equal(before[key], t) for key, t in low.state_dict().items())
    assert all(module.training and not module._forward_pre_hooks for module in low.modules())
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_only_the_output_projection_of_an_attention_in_an_encoder() -> None:
    """Torch runs such an encoder layer in one kernel that calls none of its children; the costs must not miss it."""
    encoder, x = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), torch.randn(2, 5, 16)
    low = sp.factorize(encoder, where=sp.match("*out_proj"))
    costs = rank_costs(low, x)
    assert costs["self_attn.out_proj"].dense_macs == 5 * 16 * 16
    merged = sp.merge(sp.prune(low, {"self_attn.out_proj": 2}))
    assert count_macs(merged, x) == count_macs(encoder, x) - 5 * 16 * 16 + costs["self_attn.out_proj"].macs[1]


def test_spectra_are_the_true_singular_values() -> None:
    model = nn.Sequential(nn.Linear(9, 7), nn.Conv2d(8, 12, 3, groups=2)).double()
    low = sp.factorize(model, "channel", EVERYTHING)
    with torch.no_grad():
        low[0].factors["weight"].U.mul_(torch.rand(7, 7, dtype=torch.float64))  # no longer orthonormal
    found = spectra(low)
    torch.testing.assert_close(found["0"], torch.linalg.svdvals(low[0].weight.detach()), rtol=1e-9, atol=1e-12)
    blocks = model[1].weight.detach().reshape(2, 6, -1)
    tails = sum(tail_energy(torch.linalg.svdvals(block)) for block in blocks)
    torch.testing.assert_close(tail_energy(found["1"]), tails, rtol=1e-9, atol=1e-9)


class Thrice(nn.Module):
    """Three convolutions that are alike, of which one meets a smaller image, one with a stride, and two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1) for _ in range(3)] + [nn.Conv2d(6, 6, 3, stride=2, padding=1)])
        self.one, self.other = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs[3](self.convs[1](self.convs[0](x)))
        x = self.convs[2](x).mean((2, 3))
        return self.one(x) + self.other(x)


def test_weights_alike_are_priced_once_and_as_if_each_were_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    low, x = sp.factorize(Thrice(), where=EVERYTHING), torch.randn(2, 6, 8, 8)
    together = rank_costs(low, x)
    assert together["convs.0"] is together["convs.1"]
    assert len({id(cost) for cost in together.values()}) == 4
    monkeypatch.setattr("spectrim.budget.costs.description", lambda site: None)
    alone = rank_costs(low, x)
    assert len({id(cost) for cost in alone.values()}) == len(alone) == 5
    assert together == alone


@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_ranks_that_a_kernel_pads_are_priced_by_steps(multiple: int) -> None:
    """20 a padded rank up to rank 12, dense from 13 on; counted at no rank but the first ones."""
    padded = [20.0 * -(-rank // multiple) * multiple for rank in range(1, 13)]
    formulas = RankCosts((*(20.0 * rank for rank in range(1, 13)), 300.0, 300.0), (*range(1, 13), 99, 99), 300.0, 99)
    asked: list[int] = []

    def count(rank: int) -> float:
        asked.append(rank)
        return padded[rank - 1]

    assert with_counts(formulas, count).macs == (*padded, 300.0, 300.0)
    assert asked == [1, *(1 + wide for wide in (1, 2, 4, 8) if wide <= multiple)]


def test_a_weight_that_is_read_costs_the_same_at_every_rank() -> None:
    formulas = RankCosts((10.0, 20.0, 30.0, 90.0), (1, 2, 3, 9), 90.0, 9)
    assert with_counts(formulas, lambda rank: 95.0).macs == (95.0, 95.0, 95.0, 90.0)
