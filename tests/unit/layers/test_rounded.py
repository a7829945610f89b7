"""Layers that compute in few bits: the plain layer at 32 bits, the same object afterwards, multiply-accumulates by their formula."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spectrim as sp
from spectrim.forms.arithmetic import Arithmetic
from spectrim.layers import named_factors
from spectrim.layers.rounded import computed, lend, lending, operations_of, take_back
from spectrim.linalg.rounding import on_grid
from spectrim.training import rounding

EVERYTHING = sp.match("*")

CASES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(6, 5), (3, 6)),
    (nn.Linear(6, 5, bias=False), (2, 4, 6)),
    (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, stride=2, padding="valid"), (2, 4, 9, 9)),
    (nn.Conv2d(4, 6, (3, 1), padding="same", padding_mode="circular", groups=2), (2, 4, 7, 7)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 7, 7)),
    (nn.Conv3d(2, 4, 2), (1, 2, 4, 4, 4)),
]


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    inputs = x.clone().requires_grad_()
    y = model(inputs)
    torch.manual_seed(5)
    return [y, *torch.autograd.grad((y * torch.randn_like(y)).sum(), [inputs, *model.parameters()])]


@pytest.mark.parametrize(("layer", "shape"), CASES, ids=lambda value: str(value))
def test_at_32_bits_it_is_the_plain_layer_to_the_bit(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    plain, rounded = copy.deepcopy(layer), copy.deepcopy(layer)
    with lending(rounded, {"": Arithmetic([32], 32)}):
        found = gradients(rounded, x)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(plain, x), strict=True))
    assert type(rounded) is type(plain)
    assert vars(rounded).keys() == vars(plain).keys()


@pytest.mark.parametrize("dense", [nn.Linear(12, 8), nn.Conv2d(4, 8, 3)], ids=str)
def test_factors_at_32_bits_are_the_factorized_layer_to_the_bit(dense: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 12) if isinstance(dense, nn.Linear) else torch.randn(2, 4, 6, 6)
    for rank in (2, 8):
        low = sp.prune(sp.factorize(nn.Sequential(dense), where=EVERYTHING), sp.Fixed(rank))
        (name, form), *_ = named_factors(low)
        before = gradients(low, x)
        with lending(low, {name: Arithmetic([32] * len(form.operations), 32)}):
            assert all(torch.equal(a, b) for a, b in zip(gradients(low, x), before, strict=True))


def test_a_rounded_layer_by_hand() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    with rounding(layer, 3):
        y = layer(x)
    torch.testing.assert_close(y, F.linear(on_grid(x, 3), on_grid(layer.weight, 3, by_row=True), layer.bias))


def test_each_factor_has_its_own_bits() -> None:
    torch.manual_seed(0)
    low = sp.prune(sp.factorize(nn.Sequential(nn.Linear(6, 5)), where=EVERYTHING), sp.Fixed(2))
    (name, form), *_ = named_factors(low)
    x = torch.randn(3, 6)
    assert operations_of(name, form) == ("0.Vh", "0.U")
    with rounding(low, {"0.Vh": 3, "0.U": 5}):
        y = low(x)
    left, right = form.pair()
    hidden = F.linear(on_grid(x, 3), on_grid(right, 3, by_row=True))
    torch.testing.assert_close(y, F.linear(on_grid(hidden, 5), on_grid(left, 5, by_row=True), low[0].bias))


@pytest.mark.parametrize("scheme", ["channel", "spatial", "tucker"])
def test_factors_count_the_operations_that_they_are(scheme: Any) -> None:
    low = sp.factorize(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)), scheme=scheme, where=EVERYTHING)
    x = torch.randn(2, 4, 6, 6)
    (name, form), *_ = named_factors(low)
    held = Arithmetic([8] * len(form.operations), 8)
    with lending(low, {name: held}):
        low(x)
    assert sum(held.macs) == low[0].work(low[0], "weight", scheme, form.size, x.shape)
    assert len(held.macs) == (3 if scheme == "tucker" else 2)


def test_what_is_lent_and_taken_back() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    class Reads(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight.abs(), self.bias)

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), Reads(4, 4), nn.LSTM(4, 4), nn.Conv2d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1))
    model[0].extra = "kept"
    assert list(computed(model)) == ["0", "1", "4"]
    kinds, x = [type(module) for module in model], torch.randn(2, 4)
    lent = {name: Arithmetic([3], 8) for name in computed(model)}
    lend(model, lent)
    assert isinstance(model[1], Own)
    assert isinstance(model[4], nn.Conv2d)
    twin = copy.deepcopy(model)
    assert list(computed(model)) == ["0", "1", "4"], "what is lent can be exchanged"
    first = F.linear(on_grid(x, 3), on_grid(model[1].weight, 3, by_row=True), model[1].bias) + 1
    torch.testing.assert_close(model[1](x), first)
    lend(model, {"0": Arithmetic([4], 8)})
    assert take_back(model)["0"].bits == (4,)
    assert take_back(model) == {}
    take_back(twin)
    for each in (model, twin):
        assert [type(module) for module in each] == kinds
        assert each[0].extra == "kept"


def test_tied_factors_are_lent_one_arithmetic() -> None:
    shared = nn.Linear(4, 4)
    low = sp.factorize(nn.Sequential(shared, nn.ReLU(), shared), where=EVERYTHING)
    assert list(computed(low)) == ["0"]
    held = Arithmetic([8, 8], 8)
    with lending(low, {"0": held}):
        low(torch.randn(3, 4))
    assert held.macs == [2 * 3 * 16] * 2
