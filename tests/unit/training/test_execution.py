"""Composing the weight and running two operations are the same function, and the faster one is chosen by a clock."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.forms.compose import Compose
from spectrim.forms.svd import Factors
from spectrim.layers import FactorizedLayer, base, named_layers
from spectrim.training import execution

LAYERS = {
    "linear": (lambda: nn.Linear(24, 20), (6, 24), "channel"),
    "channel": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2), (3, 8, 9, 7), "channel"),
    "spatial": (lambda: nn.Conv2d(8, 12, (3, 5), padding="same", dilation=2, bias=False), (3, 8, 9, 7), "spatial"),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1), (2, 6, 5, 4), "spatial"),
}


def forced(layer: Any, shape: tuple[int, ...], composes: bool) -> nn.Module:
    layer = copy.deepcopy(layer)
    layer.execution[("weight", layer.rank, shape[1:])] = composes
    return layer


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rank", [1, 3, None])
def test_both_forms_agree_in_double_precision(name: str, rank: int | None) -> None:
    make, shape, scheme = LAYERS[name]
    low = sp.factorize(make().double(), scheme, rank=rank, where=sp.match("*"))
    x = torch.randn(shape, dtype=torch.float64)
    found = []
    for composes in (True, False):
        layer, own = forced(low, shape, composes), x.clone().requires_grad_()
        output = layer(own)
        (output.square().sum() + output.sin().sum()).backward()
        found.append([output, own.grad, *(p.grad for p in layer.parameters())])
    for composed, factored in zip(*found, strict=True):
        torch.testing.assert_close(composed, factored, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("blocks", [(), (3,)])
def test_the_gradient_of_composing(blocks: tuple[int, ...]) -> None:
    parts = [torch.randn(*blocks, *shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4), (4,), (4, 6))]
    assert torch.autograd.gradcheck(Compose.apply, parts)
    assert torch.autograd.gradgradcheck(Compose.apply, parts)
    U, S, Vh = parts
    plain = torch.autograd.grad(((U * S.unsqueeze(-2)) @ Vh).sin().sum(), parts)
    torch.testing.assert_close(torch.autograd.grad(Compose.apply(U, S, Vh).sin().sum(), parts), plain)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_composed_weight_is_composed_again_for_the_gradient(name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape, scheme = LAYERS[name]
    low = sp.factorize(make(), scheme, where=sp.match("*"))
    x = torch.randn(shape)
    calls: list[torch.dtype] = []
    product = Factors.product

    def counted(self: Factors) -> torch.Tensor:
        calls.append(result.dtype if (result := product(self)) is not None else None)
        return result

    monkeypatch.setattr(Factors, "product", counted)
    found = []
    for share in (0.0, 1e9):
        monkeypatch.setattr(base, "RECOMPUTE_SHARE", share)
        monkeypatch.setattr(base, "RECOMPUTE_SIZE", 0)
        layer, own = forced(low, shape, True), x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = layer(own)
        forward = len(calls)
        output.float().square().sum().backward()
        assert len(calls) - forward == (1 if share else 0)
        assert len(set(calls)) == 1
        found.append([output, own.grad, *(p.grad for p in layer.parameters())])
    for kept, anew in zip(*found, strict=True):
        assert torch.equal(kept, anew)


def network() -> nn.Module:
    return sp.factorize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 10)), where=sp.match("*"))


def test_choices_are_made_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    low = network()
    low[0].weight_frozen = None
    low[0].requires_grad_(False)
    before, random = copy.deepcopy(low.state_dict()), torch.get_rng_state()
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    chosen = sp.training.choose_execution(low, x, min_time=1e-4)
    assert set(chosen) == {"0", "3"}
    shapes = {"0": x.shape, "3": (2, 64)}
    assert {name: layer.composes("weight", shapes[name]) for name, layer in named_layers(low)} == chosen
    assert all(torch.equal(value, before[key]) for key, value in low.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert low.training
    assert all(parameter.grad is None for parameter in low.parameters())

    monkeypatch.setattr(execution, "_composing_is_faster", lambda *_: pytest.fail("timed again"))
    assert sp.training.choose_execution(low, x) == chosen


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_form_wins(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    run_dense = FactorizedLayer.run_dense

    class Timer:
        def __init__(self, statement: str, globals: dict[str, Any], num_threads: int) -> None:
            self.run = globals["run"]

        def blocked_autorange(self, min_run_time: float) -> Any:
            clock[0] = 2.0
            self.run()
            return type("Measured", (), {"times": [clock[0]]})

    def dense(self: Any, *arguments: Any) -> Any:
        clock[0] = 1.0 if faster else 3.0
        return run_dense(self, *arguments)

    monkeypatch.setattr(execution, "Timer", Timer)
    monkeypatch.setattr(FactorizedLayer, "run_dense", dense)
    low = network()
    assert sp.training.choose_execution(low, torch.randn(2, 3, 6, 6)) == {"0": faster, "3": faster}


def test_a_choice_holds_for_its_rank_and_size_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "_composing_is_faster", lambda *_: False)
    low = sp.factorize(nn.Sequential(nn.Linear(16, 16)), where=sp.match("*"))
    sp.training.choose_execution(low, torch.randn(4, 16))
    layer = low[0]
    assert not layer.composes("weight", (4, 16))
    assert not layer.composes("weight", (99, 16))
    assert layer.composes("weight", (99, 5, 16)) == (99 * 5 * 256 + 16**3 <= 99 * 5 * 512)
    sp.prune_(low, {"0": 15})
    assert layer.composes("weight", (99, 16))
    assert not hasattr(sp.merge(low)[0], "execution")
