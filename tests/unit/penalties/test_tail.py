"""`TailEnergy` is the distance to the ranks that it names, and pulls on nothing else."""

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import LayerError, SettingError
from spectrim.forms.svd import tail_share
from spectrim.layers import named_factors
from spectrim.penalties import TailEnergy, tail_shares
from spectrim.protocols import Penalty

RANKS = {"0": 2, "1": 3, "2.weight_ih_l0": 1, "2.weight_hh_l0": 3, "3": 4}
STRENGTHS = {"0": 0.3, "1": 2.0, "2.weight_ih_l0": 0.5, "2.weight_hh_l0": 1.0, "3": 7.0}


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Grouped convolution, linear and recurrent layers and a tied pair; the last rank of `RANKS` is all that its weight holds."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Linear(7, 5), nn.LSTM(5, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[4].weight = model[3].weight
    return sp.factorize(model.to(dtype), "channel", sp.match("*"))


def spectra(model: nn.Module) -> dict[str, Any]:
    return {name: factors.S.detach().double().numpy() for name, factors in named_factors(model)}


def set_spectra(model: nn.Module, change: Any) -> None:
    with torch.no_grad():
        for _, factors in named_factors(model):
            factors.S.copy_(change(factors.S))


def test_value_equals_the_formula() -> None:
    model = network()
    set_spectra(model, lambda S: S + 0.3 * torch.randn_like(S))  # neither sorted nor positive
    expected = 0.0
    for name, S in spectra(model).items():
        squares = -np.sort(-(S**2), axis=-1)
        expected += STRENGTHS[name] * squares[..., RANKS[name] :].sum() / squares.sum()
    penalty = TailEnergy(RANKS, STRENGTHS)
    assert isinstance(penalty, Penalty)
    assert float(penalty(model).detach()) == pytest.approx(expected, rel=1e-12)
    assert expected > 0.1
    shares = tail_shares(model, RANKS)
    assert shares.keys() == RANKS.keys() - {"3"}
    assert sum(STRENGTHS[name] * share for name, share in shares.items()) == pytest.approx(expected, rel=1e-12)


def test_it_is_the_squared_distance_to_the_nearest_weight_of_that_rank() -> None:
    model = network()
    cut = sp.prune(model, RANKS)
    shares = tail_shares(model, RANKS)
    for (name, old), (_, new) in zip(named_factors(model), named_factors(cut), strict=True):
        distance = (old.matrix() - new.matrix()).square().sum() / old.matrix().square().sum()
        assert shares.get(name, 0.0) == pytest.approx(float(distance.detach()), abs=1e-12)
    assert float(TailEnergy(RANKS, STRENGTHS)(cut).detach()) == 0


def test_only_the_tail_is_pulled() -> None:
    model = network()
    TailEnergy(RANKS, STRENGTHS)(model).backward()
    for name, factors in named_factors(model):
        assert factors.U.grad is None
        if RANKS[name] >= factors.rank:
            assert factors.S.grad is None
            continue
        whole = factors.S.detach().square().sum()
        expected = 2 * STRENGTHS[name] * factors.S.detach() / whole
        expected[..., : RANKS[name]] = 0.0
        torch.testing.assert_close(factors.S.grad, expected, rtol=1e-12, atol=0.0)


def test_descent_drives_the_tail_to_zero_exponentially() -> None:
    """The law of the method card: gradient flow at rate eta multiplies the share of the tail by exp(-4 strength eta t / energy)."""
    S = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    before, rate, steps = float(tail_share(S, 1).detach()), 1e-3, 1000
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(2.0 * tail_share(S, 1), S)
        with torch.no_grad():
            S -= rate * gradient
    assert S.detach()[0] == 3.0
    tail = float(S.detach()[1:].square().sum())
    energy = (10.25 + 9 + tail) / 2  # it falls a little on the way
    assert tail / 1.25 == pytest.approx(np.exp(-4 * 2.0 * rate * steps / energy), rel=0.02)
    assert before == pytest.approx(1.25 / 10.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-36, 1e-30, 1.0, 1e30])
def test_finite_and_scale_free(scale: float, dtype: torch.dtype) -> None:
    model = network(dtype)
    expected = float(TailEnergy(RANKS, STRENGTHS)(model).detach())
    set_spectra(model, lambda S: S * scale)
    value = TailEnergy(RANKS, STRENGTHS)(model)
    value.backward()
    found = [factors.S.grad for _, factors in named_factors(model) if factors.S.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in found)
    if scale >= 1e-30:
        assert float(value.detach()) == pytest.approx(expected, rel=1e-5)
    if scale == 0:
        assert float(value.detach()) == 0
        assert not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_layers_are_judged_in_float32(dtype: torch.dtype) -> None:
    low = network(dtype)
    value = TailEnergy(RANKS, STRENGTHS)(low)
    assert value.dtype == torch.float32
    wide = network(torch.float64)
    for (_, a), (_, b) in zip(named_factors(low), named_factors(wide), strict=True):
        b.S.data.copy_(a.S.data)
    assert float(value.detach()) == pytest.approx(float(TailEnergy(RANKS, STRENGTHS)(wide).detach()), rel=1e-5)


def test_by_hand() -> None:
    S: Tensor = torch.tensor([[3.0, -1.0], [0.0, 2.0]])  # two blocks, one rank: 1 and 0 of 14
    assert float(tail_share(S, 1)) == pytest.approx(1 / 14)
    assert float(tail_share(S, 2)) == 0


def test_it_is_plain_data() -> None:
    penalty = TailEnergy(RANKS, STRENGTHS)
    assert TailEnergy(**json.loads(json.dumps(asdict(penalty)))) == penalty


def test_what_is_refused() -> None:
    with pytest.raises(SettingError, match=r"TailEnergy: ranks\['a'\] must be an integer >= 1, or one for each axis of a size, got 0"):
        TailEnergy({"a": 0}, {"a": 1.0})
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(SettingError, match=r"TailEnergy: strengths\['a'\] must be a finite number >= 0"):
            TailEnergy({"a": 1}, {"a": strength})
    with pytest.raises(SettingError, match=r"strengths must be for the weights in ranks, \['a'\], got \['b'\]"):
        TailEnergy({"a": 1}, {"b": 1.0})
    with pytest.raises(LayerError, match="layer 'a': is not a factorized weight of this model"):
        TailEnergy({"a": 1}, {"a": 1.0})(network())
    assert float(TailEnergy({}, {})(nn.Linear(2, 2))) == 0
