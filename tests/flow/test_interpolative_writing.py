"""A network cut and written in r (m + n - r) numbers, from factorize to files."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.layers import named_layers
from spectrim.plain.chain import PlainPair
from spectrim.plain.pieces import PlainInterpolative

EVERYTHING = sp.match("*")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16, bias=False)
        self.conv = nn.Conv1d(16, 24, 3, stride=2, padding=1, groups=2)
        self.deconv = nn.ConvTranspose1d(24, 16, 3, stride=2)
        self.head = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.head.weight
        self.layers = [self.up, self.down]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.relu(layer(x))
        x = self.deconv(torch.relu(self.conv(x.mT))).mT
        return self.head(x) + self.tied(x)


@pytest.mark.parametrize("scheme", ["channel", "input"])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_prices_are_kept_and_the_function_and_the_file(scheme: str, share: float, tmp_path: Path) -> None:
    model, ids = Net().double(), torch.randint(40, (2, 8))
    low = sp.factorize(model, scheme, EVERYTHING, writing="interpolative")  # type: ignore[arg-type]
    for budget in (sp.Budget(params=share), sp.Budget(macs=share)):
        cut = sp.prune(low, sp.allocate(low, budget, ids))
        merged = sp.merge(cut)
        torch.testing.assert_close(merged(ids), cut(ids), rtol=1e-9, atol=1e-9)
        dense, small = (sp.measure(network, ids, latency=False) for network in (model, merged))
        assert small.params <= share * dense.params or budget.params is None
        assert small.macs is not None
        assert dense.macs is not None
        assert small.macs <= share * dense.macs or budget.macs is None
        assert merged.layers[0] is merged.up
        assert isinstance(merged.up, nn.Linear)
        for network, name in ((merged, "merged"), (cut, "cut")):
            sp.save(network, tmp_path / name)
            again = sp.load(tmp_path / name, copy.deepcopy(model))
            torch.testing.assert_close(again(ids), network(ids))
            assert [type(m)._own if hasattr(type(m), "_own") else type(m) for m in again.modules()] == [
                type(m)._own if hasattr(type(m), "_own") else type(m) for m in network.modules()
            ]
        assert [layer.writing for _, layer in named_layers(again)] == [layer.writing for _, layer in named_layers(cut)]


def test_a_weight_of_rank_r_takes_r_of_m_plus_n_minus_r_numbers_and_any_cut_saves() -> None:
    model = nn.Sequential(nn.Linear(30, 20, bias=False))
    low = sp.factorize(model, where=EVERYTHING, writing="interpolative")
    counts = []
    for rank in range(1, 20):
        merged = sp.merge(sp.prune(low, {"0": rank}))
        counts.append(sum(p.numel() for p in merged.parameters()))
        written = PlainInterpolative if rank >= 0.05 * 50 else PlainPair
        assert isinstance(merged[0], written)
        assert counts[-1] == rank * (50 - rank if written is PlainInterpolative else 50)
    assert counts == sorted(counts)
    assert counts[-1] < 600
    (line,) = sp.coverage(low, EVERYTHING)
    assert line.break_even == 19


def test_tied_weights_keep_the_pair() -> None:
    low = sp.factorize(Net(), where=EVERYTHING, writing="interpolative")
    assert {name for name, layer in named_layers(low) if layer.writing == "pair"} == {"head", "tied"}


def test_more_of_the_spectrum_is_kept_at_equal_cost() -> None:
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), torch.randn(4, 64)
    lost = {}
    for writing in ("pair", "interpolative"):
        low = sp.factorize(model, where=EVERYTHING, writing=writing)  # type: ignore[arg-type]
        cut = sp.prune(low, sp.allocate(low, sp.Budget(macs=0.8), x))
        lost[writing] = sum(float((cut[i].weight.detach() - model[i].weight.detach()).square().sum()) for i in (0, 2))  # type: ignore[operator]
    assert lost["interpolative"] < 0.7 * lost["pair"]
