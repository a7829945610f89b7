"""Schemes that are chosen at the budget, together with all ranks."""

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.budget.costs import calls
from spectrim.budget.distortion import SpectralEnergy
from spectrim.budget.ladder import ladder
from spectrim.budget.schemes import AMONG, at_budget, schemes_at
from spectrim.forms import CP, derived
from spectrim.forms.derived import measure_cuts, measured_tail
from spectrim.layers import named_factors, named_layers
from spectrim.linalg.fold import FOLDS, MATRICES, to_matrix
from spectrim.surgery.decompositions import Decompositions
from spectrim.surgery.refold import refold_

BUDGETS = (sp.Budget(macs=0.6), sp.Budget(macs=0.3), sp.Budget(params=0.4), sp.Budget(macs=0.5, size=0.5))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 12, (3, 5), padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 6, 3))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    with torch.no_grad():  # inputs that share few patterns: the input fold holds them in few columns
        model[2].weight.copy_(torch.einsum("oa,aihw->oihw", torch.randn(16, 3), torch.randn(3, 12, 3, 3)))
        model[4].weight.copy_(torch.einsum("oahw,ai->oihw", torch.randn(6, 2, 3, 3), torch.randn(2, 16)))
    return model


def lost(low: nn.Module, budget: sp.Budget, x: torch.Tensor) -> float:
    """The energy that the least loss within the budget leaves."""
    sizes = sp.allocate(low, budget, x)
    distortions = SpectralEnergy()(low)
    held = dict(named_factors(low))
    return sum(float(distortions[name][held[name].rung_of(size)]) for name, size in sizes.items())


def test_it_loses_no_more_than_any_one_scheme_for_all() -> None:
    model, x = network(), torch.randn(2, 3, 12, 12)
    for budget in BUDGETS:
        low = sp.factorize(model, "auto")
        chosen, _ = at_budget(low, budget, x, ladder(low, x), model, calls(low, x))
        best = min(lost(sp.factorize(model, scheme), budget, x) for scheme in MATRICES)
        assert lost(chosen, budget, x) <= best + 1e-9


def test_low_rank_channels_are_found_on_their_side() -> None:
    model, x = network(), torch.randn(2, 3, 12, 12)
    low = sp.factorize(model, "spatial")
    chosen = schemes_at(low, sp.Budget(macs=0.3), x, ladder(low, x))
    assert chosen["2"] == "channel"
    assert chosen["4"] == "input"


def test_all_forms_compete_by_what_their_cuts_lose() -> None:
    model, x = network(), torch.randn(2, 3, 12, 12)
    low = sp.factorize(model, "all")
    assert {layer.scheme for _, layer in named_layers(low)} <= set(MATRICES)
    chosen, prices = at_budget(low, sp.Budget(macs=0.3), x, ladder(low, x), model, calls(low, x), among=AMONG["all"])
    assert chosen[0].scheme == "cp"
    torch.testing.assert_close(low(x), model(x), rtol=1e-4, atol=1e-4)
    form = dict(named_factors(chosen))["0"]
    tail, known = form.tail(), measured_tail(form, form.tail())  # leaving components out loses more than fitting those that stay
    middle = form.rank // 2
    assert float(known[middle]) < 0.8 * float(tail[middle])
    assert bool((known <= tail).all())
    assert bool((known.diff() <= 0).all())
    assert torch.equal(Decompositions(chosen).tail("0"), known)
    ranks = sp.allocate(chosen, sp.Budget(macs=0.3), x, prices=prices)
    assert sp.prune(chosen, ranks)(x).isfinite().all()


def test_a_form_whose_cuts_take_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), torch.randn(2, 3, 12, 12)
    monkeypatch.setattr(derived, "AFFORDABLE", 1e4)
    low = sp.factorize(model, "channel")
    assert "cp" not in schemes_at(low, sp.Budget(macs=0.3), x, ladder(low, x), among=FOLDS).values()
    form = CP.of(model[4].weight, to_matrix(model[4].weight.detach(), "cp"))
    measure_cuts(form)
    assert torch.equal(measured_tail(form, form.tail()), form.tail())


def test_cuts_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    low = sp.factorize(network(), "cp", where="*")
    decomposed, calls = Decompositions(low, keep=True), []
    monkeypatch.setattr(
        CP, "nearest", lambda self, kernel, size, held, old=CP.nearest: (calls.append(size), old(self, kernel, size, held))[1]
    )
    first, second = decomposed.cut("2", 3), decomposed.cut("2", 3)
    assert calls == [3]
    assert first is not second
    assert torch.equal(first.matrix(), second.matrix())


def test_what_it_cannot_price_stays() -> None:
    model, x = network(), torch.randn(2, 3, 12, 12)
    low = sp.factorize(model, "channel")
    prices = ladder(low, x)
    assert schemes_at(low, sp.Budget(latency=0.5), x, prices) == {}
    assert schemes_at(low, sp.Budget(macs=1e-6), x, prices) == {}


def test_refolding_keeps_the_layer_and_the_function() -> None:
    model, x = network(), torch.randn(2, 3, 12, 12)
    low = sp.factorize(model, "channel")
    layer, frozen = low[2], low[4]
    frozen.requires_grad_(False)
    assert refold_(low, {"2": "spatial", "4": "input", "0": "channel"}, model) == ["2", "4"]
    assert low[2] is layer
    assert [named.scheme for _, named in named_layers(low)] == ["channel", "spatial", "input"]
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    torch.testing.assert_close(low(x), model(x), rtol=1e-4, atol=1e-4)


def test_compress_and_plan_choose_at_the_budget() -> None:
    model, x = network(), torch.randn(16, 3, 12, 12)
    data = [(x, torch.arange(16) % 4)]
    made = sp.compress(model, data, nn.CrossEntropyLoss(), 0.3, cut="plain", progress=False)
    assert {line.name: line.scheme for line in made.coverage if line.scheme}["4"] == "input"
    found = sp.plan(model, x, budgets=[0.3])
    assert {weight.name: weight.scheme for weight in found.weights}["4"] == "input"
