"""The laws of an importance, over `spectrim.budget.distortion.METHODS`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.budget.distortion import LAWS, METHODS, Evidence
from spectrim.budget.distortion.base import distortions_of
from spectrim.layers import named_factors
from spectrim.protocols import Importance
from spectrim.surgery.calibrate import calibrate
from spectrim.tables import Row

EVERYTHING = sp.match("*")
Method = Row[Callable[[Evidence], Importance]]


def make(row: Method, low: nn.Module, data: list[Any]) -> Importance:
    loss = nn.CrossEntropyLoss()
    return row.example(Evidence(data, loss, calibrate(low, data, loss)))


def obeying(*laws: str) -> pytest.MarkDecorator:
    rows = [row for row in METHODS if not laws or row.laws & set(laws)]
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.label)


every_method = obeying()


class Network(nn.Module):
    """An embedding, grouped and plain convolutions, a recurrent layer, attention, and a head tied to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.mix = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.image = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(2))
        self.head = nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.mix(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        x = self.norm(self.lstm(x)[0])
        x = self.attention(x, x, x)[0]
        x = x + self.image(x.unsqueeze(1)).mean(2).unsqueeze(1)
        out: Tensor = self.head(x.mean(1))
        return out


def case(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Any]]:
    low = sp.factorize(Network().to(dtype), where=EVERYTHING).eval()
    return low, [(torch.randint(0, 9, (12, 5)), torch.randint(0, 4, (12,)))]


def test_every_row_makes_its_class_and_every_law_has_a_row() -> None:
    low, data = case()
    assert all(type(make(row, low, data)) is row.method for row in METHODS)
    assert set().union(*(row.laws for row in METHODS)) == set(LAWS)


@obeying("data-free")
def test_data_does_not_matter(row: Method) -> None:
    low, data = case()
    others = [(inputs.flip(0), target.flip(0) * 0) for inputs, target in data]
    first, second = make(row, low, data)(low), make(row, low, others)(low)
    assert all(torch.equal(values, second[name]) for name, values in first.items())


@obeying("plain-cut")
def test_equals_the_squared_error_of_the_cut(row: Method) -> None:
    low, data = case(torch.float64)
    found = make(row, low, data)(low)
    for name, factors in named_factors(low):
        whole = factors.matrix().detach()
        for rank in {1, 2, factors.rank - 1} - {0, factors.rank}:
            error = (factors.cut(lambda spectrum, rank=rank: rank).matrix().detach() - whole).square().sum()
            torch.testing.assert_close(found[name][rank], error / whole.square().sum(), rtol=1e-9, atol=1e-15)


@every_method
def test_is_an_importance_whose_distortions_fall_to_zero(row: Method) -> None:
    low, data = case()
    importance = make(row, low, data)
    assert isinstance(importance, Importance)
    distortions = importance(low)
    factors = dict(named_factors(low))
    assert set(distortions) == set(factors)
    for name, distortion in distortions.items():
        assert distortion.dtype == torch.float64
        assert distortion.shape == (factors[name].rank + 1,)
        assert torch.isfinite(distortion).all()
        assert distortion[-1] == 0
        assert (distortion.diff() <= 0).all()
        assert distortion[0] > 0
    assert distortions_of(low, importance).keys() == factors.keys()


@every_method
def test_leaves_the_model_and_random_numbers_alone(row: Method) -> None:
    low, data = case()
    low.train()
    before = {key: value.clone() for key, value in low.state_dict().items()}
    state = torch.get_rng_state()
    make(row, low, data)(low)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in low.state_dict().items())
    assert all(module.training for module in low.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in low.modules())
    assert all(parameter.grad is None for parameter in low.parameters())


@every_method
def test_is_the_same_twice(row: Method) -> None:
    low, data = case()
    first, second = (make(row, low, data)(low) for _ in range(2))
    assert all(torch.equal(distortion, second[name]) for name, distortion in first.items())


@every_method
def test_after_a_cut_the_distortions_that_are_left_are_for_the_present_rank(row: Method) -> None:
    low, data = case()
    cut = sp.prune(low, sp.budget.Fixed(2))
    distortions = make(row, cut, data)(cut)
    assert all(distortions[name].shape == (factors.rank + 1,) for name, factors in named_factors(cut))


@every_method
def test_the_choice_of_factors_does_not_matter(row: Method) -> None:
    """The same product, held as factors that are neither orthonormal nor sorted nor positive."""
    low, data = case(torch.float64)
    other = copy.deepcopy(low)
    with torch.no_grad():
        for _, factors in named_factors(other):
            scale = torch.linspace(0.5, 2.0, factors.rank, dtype=torch.float64)
            factors.U.mul_(scale)
            factors.S.copy_(-factors.S / scale)
            factors.Vh.neg_()
            order = torch.arange(factors.rank - 1, -1, -1)
            for part, axis in ((factors.U, -1), (factors.S, -1), (factors.Vh, -2)):
                part.copy_(part.index_select(axis, order))
    first, second = make(row, low, data)(low), make(row, other, data)(other)
    for name, distortion in first.items():
        torch.testing.assert_close(distortion, second[name], rtol=1e-6, atol=1e-9)  # roots of matrices that may be singular


@every_method
def test_half_precision_layers(row: Method) -> None:
    low, data = case(torch.bfloat16)
    distortions = distortions_of(low, make(row, low, data))
    assert all(distortion.dtype == torch.float64 and torch.isfinite(distortion).all() for distortion in distortions.values())


@every_method
def test_tied_weights_have_one_entry(row: Method) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    model[2].weight = model[0].weight
    low = sp.factorize(model, where=EVERYTHING).eval()
    data = [(torch.randn(20, 6), torch.randint(0, 4, (20,)))]
    assert list(make(row, low, data)(low)) == ["0", "4"]


@every_method
@pytest.mark.parametrize("kind", ["macs", "size"])
def test_allocate_takes_it(row: Method, kind: str) -> None:
    low, data = case()
    importance, x = make(row, low, data), data[0][0]
    ranks = sp.allocate(low, sp.Budget(**{kind: 0.8}), x, importance=importance)
    merged, dense = sp.measure(sp.merge(sp.prune(low, ranks)), x, latency=False), sp.measure(Network(), x, latency=False)
    kept, whole = ({"macs": measured.macs, "size": measured.size_bytes}[kind] for measured in (merged, dense))
    assert kept <= 0.8 * whole
