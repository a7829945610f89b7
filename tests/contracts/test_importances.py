"""The laws of an importance, over `spectrim.budget.distortion.METHODS`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.budget.distortion import METHODS
from spectrim.budget.distortion.base import distortions_of
from spectrim.budget.distortion.energy import SpectralEnergy, WhitenedEnergy
from spectrim.budget.distortion.loss import LossSensitivity
from spectrim.budget.distortion.measured import MeasuredLoss
from spectrim.budget.distortion.normalized import NormalizedEnergy
from spectrim.layers import named_factors
from spectrim.protocols import Importance
from spectrim.surgery.calibrate import Calibration, calibrate

EVERYTHING = sp.match("*")
Make = Callable[[nn.Module, list[Any]], Importance]


def calibration(low: nn.Module, data: list[Any]) -> Calibration:
    return calibrate(low, data, nn.CrossEntropyLoss())


MAKE: dict[str, Make] = {
    "spectral": lambda low, data: SpectralEnergy(),
    "normalized": lambda low, data: NormalizedEnergy(data[0][0]),
    "whitened": lambda low, data: WhitenedEnergy(calibration(low, data)),
    "sensitivity": lambda low, data: LossSensitivity(calibration(low, data)),
    "sensitivity, first order": lambda low, data: LossSensitivity(calibration(low, data), order=1),
    "measured": lambda low, data: MeasuredLoss(data, nn.CrossEntropyLoss(), points=1),
}
every_method = pytest.mark.parametrize("method", list(MAKE))


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


def test_every_method_is_made_here() -> None:
    assert {label.partition(",")[0] for label in MAKE} == set(METHODS)
    low, data = case()
    assert all(type(make(low, data)) is METHODS[label.partition(",")[0]] for label, make in MAKE.items())


@every_method
def test_is_an_importance_whose_harms_fall_to_zero(method: str) -> None:
    low, data = case()
    importance = MAKE[method](low, data)
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
def test_leaves_the_model_and_random_numbers_alone(method: str) -> None:
    low, data = case()
    low.train()
    before = {key: value.clone() for key, value in low.state_dict().items()}
    state = torch.get_rng_state()
    MAKE[method](low, data)(low)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in low.state_dict().items())
    assert all(module.training for module in low.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in low.modules())
    assert all(parameter.grad is None for parameter in low.parameters())


@every_method
def test_is_the_same_twice(method: str) -> None:
    low, data = case()
    first, second = (MAKE[method](low, data)(low) for _ in range(2))
    assert all(torch.equal(distortion, second[name]) for name, distortion in first.items())


@every_method
def test_after_a_cut_the_harms_that_are_left_are_for_the_present_rank(method: str) -> None:
    low, data = case()
    cut = sp.prune(low, sp.Fixed(2))
    distortions = MAKE[method](cut, data)(cut)
    assert all(distortions[name].shape == (factors.rank + 1,) for name, factors in named_factors(cut))


@every_method
def test_the_choice_of_factors_does_not_matter(method: str) -> None:
    """The same product, held as factors that are neither orthonormal nor sorted nor positive."""
    low, data = case(torch.float64)
    other = copy.deepcopy(low)
    with torch.no_grad():
        for _, factors in named_factors(other):
            scale = torch.linspace(0.5, 2.0, factors.rank, dtype=torch.float64)
            factors.U.mul_(scale)
            factors.S.copy_(-factors.S / scale)
            order = torch.arange(factors.rank - 1, -1, -1)
            for part, axis in ((factors.U, -1), (factors.S, -1), (factors.Vh, -2)):
                part.copy_(part.index_select(axis, order))
    first, second = MAKE[method](low, data)(low), MAKE[method](other, data)(other)
    for name, distortion in first.items():
        torch.testing.assert_close(distortion, second[name], rtol=1e-6, atol=1e-9)  # roots of matrices that may be singular


@every_method
def test_half_precision_layers(method: str) -> None:
    low, data = case(torch.bfloat16)
    distortions = distortions_of(low, MAKE[method](low, data))
    assert all(distortion.dtype == torch.float64 and torch.isfinite(distortion).all() for distortion in distortions.values())


@every_method
def test_tied_weights_have_one_entry(method: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    model[2].weight = model[0].weight
    low = sp.factorize(model, where=EVERYTHING).eval()
    data = [(torch.randn(20, 6), torch.randint(0, 4, (20,)))]
    assert list(MAKE[method](low, data)(low)) == ["0", "4"]


@every_method
@pytest.mark.parametrize("kind", ["macs", "size"])
def test_allocate_takes_it(method: str, kind: str) -> None:
    low, data = case()
    importance, x = MAKE[method](low, data), data[0][0]
    ranks = sp.allocate(low, sp.Budget(**{kind: 0.8}), x, importance=importance)
    merged, dense = sp.measure(sp.merge(sp.prune(low, ranks)), x, latency=False), sp.measure(Network(), x, latency=False)
    kept, whole = ({"macs": measured.macs, "size": measured.size_bytes}[kind] for measured in (merged, dense))
    assert kept <= 0.8 * whole
