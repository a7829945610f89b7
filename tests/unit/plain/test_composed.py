"""Weights that are composed when they are read: no change of a copy is lost in silence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp

CHANGES: dict[str, Callable[[Any], Any]] = {
    "init": nn.init.normal_,
    "foreach": lambda weight: torch._foreach_zero_([weight]),
    "view": lambda weight: weight.view(-1).zero_(),
    "transposed": lambda weight: weight.T.zero_(),
    "row": lambda weight: weight[0].zero_(),
    "unbind": lambda weight: weight.unbind()[0].zero_(),
    "chunk": lambda weight: weight.chunk(2)[1].mul_(2),
    "out": lambda weight: torch.add(weight, 1, out=weight),
    "iadd": lambda weight: weight.__iadd__(1),
    "data": lambda weight: weight.data.clamp_(-1, 1),
    "detached view": lambda weight: weight.detach().flatten()[0].fill_(1),
    "set": lambda weight: weight.set_(torch.zeros(4)),
    "hook": lambda weight: weight.register_hook(lambda grad: grad),
    "retained": lambda weight: weight.retain_grad(),
}


def weights() -> dict[str, Tensor]:
    lstm = sp.factorize(nn.Sequential(nn.LSTM(8, 8)), where="0", rank=2)[0]
    attention = sp.factorize(nn.Sequential(nn.MultiheadAttention(8, 2)), where="0", rank=2)[0]
    linear = sp.factorize(nn.Sequential(nn.Linear(8, 8)), where="0", rank=2)
    return {
        "factorized": linear[0].weight,
        "merged": sp.merge(linear)[0].weight,
        "recurrent": lstm.weight_hh_l0,
        "attention": attention.in_proj_weight,
    }


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_changes_are_refused_by_whatever_name(change: str) -> None:
    for weight in weights().values():
        with pytest.raises(RuntimeError, match="its weight is composed of the"), torch.no_grad():
            CHANGES[change](weight)


def test_reading_is_as_reading_a_tensor() -> None:
    for weight in weights().values():
        plain = weight + 0
        assert torch.equal(weight.T @ weight, plain.T @ plain)
        assert torch.equal(torch.stack(list(weight)), plain)
        assert weight.T.stride() == plain.T.stride()
        assert weight[1, 2].item() == plain[1, 2].item()
        array = weight.detach().numpy()
        assert (array == plain.detach().numpy()).all()
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
        grads = torch.func.grad(lambda x, held=weight: (x @ held.T).square().sum())(torch.ones(weight.shape[1]))
        assert grads.shape == (weight.shape[1],)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.LSTM(4, 4), nn.GRU(4, 4), nn.MultiheadAttention(4, 2)])
def test_factors_are_not_drawn_again(layer: Any) -> None:
    low = sp.factorize(nn.Sequential(layer), where="0")[0]
    before = {name: value.clone() for name, value in low.state_dict().items() if "factors" in name}
    draw = getattr(low, "reset_parameters", None) or low._reset_parameters
    with pytest.raises((RuntimeError, ValueError), match=r"composed of the factors|are factors, which are not drawn again"):
        draw()
    assert all(torch.equal(low.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("layer", [nn.LSTM(16, 64), nn.GRU(16, 64), nn.MultiheadAttention(16, 2), nn.Linear(16, 64)])
def test_a_merged_layer_does_not_pass_over_a_dense_weight(layer: nn.Module) -> None:
    small = sp.merge(sp.factorize(nn.Sequential(layer), where="0", rank=2))
    with pytest.raises(RuntimeError, match="a dense weight for what is two layers here"):
        small.load_state_dict(nn.Sequential(layer).state_dict(), strict=False)
