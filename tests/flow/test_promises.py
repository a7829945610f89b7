"""What a budget promises is what the merged network costs, whatever the model does with its layers; else it is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spectrim as sp
from spectrim.budget.ladder import ladder
from spectrim.budget.plan import plan
from spectrim.errors import LayerError, SettingError
from spectrim.metrics.macs import count_macs
from spectrim.surgery.same_function import same_function

EVERYTHING = sp.match("*")


class TiedDecoder(nn.Module):
    """Reads the weight of a layer that it also calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.a(x)), self.b.weight.t()) + self.b(x)


class FunctionalHead(nn.Module):
    """Never calls one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.a(x)), self.b.weight, self.b.bias)


class Upsampling(nn.Module):
    """Gives the size of an output at the call."""

    def __init__(self) -> None:
        super().__init__()
        self.d, self.u, self.o = nn.Conv2d(3, 32, 3, 2, 1), nn.ConvTranspose2d(32, 32, 3, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.relu(self.u(torch.relu(self.d(x)), output_size=x.shape[-2:])))  # type: ignore[no-any-return]


CASES: dict[str, tuple[Any, Any, Any]] = {
    "tied decoder": (TiedDecoder, lambda: torch.randn(4, 64), "auto"),
    "functional head": (FunctionalHead, lambda: torch.randn(4, 48), "auto"),
    "output size": (Upsampling, lambda: torch.randn(2, 3, 16, 16), "spatial"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("budget", [sp.Budget(macs=0.7), sp.Budget(macs=0.9, params=0.7)], ids=str)
def test_budgets_are_met_by_count(name: str, budget: sp.Budget) -> None:
    make, inputs, scheme = CASES[name]
    model, x = make(), inputs()
    limits = {"macs": count_macs(model, x), "params": sum(p.numel() for p in model.parameters())}

    def check(merged: nn.Module) -> None:
        assert count_macs(merged, x) <= budget.macs * limits["macs"]
        if budget.params:
            assert sum(p.numel() for p in merged.parameters()) <= budget.params * limits["params"]

    low = sp.factorize(model, scheme, EVERYTHING)
    check(sp.merge(sp.prune(low, sp.allocate(low, budget, x))))
    data = [(x, model(x).detach() + torch.randn_like(model(x)))]
    check(sp.compress(model, data, nn.MSELoss(), budget, example_inputs=x, scheme=scheme, where=EVERYTHING, progress=False).model)
    (row,) = plan(model, x, data, nn.MSELoss(), budgets=[budget], scheme=scheme, where=EVERYTHING).budgets
    assert row.totals is not None, row.problem
    merged = sp.merge(sp.prune(low, row.ranks))
    assert (row.totals.macs, row.totals.params) == (count_macs(merged, x), sum(p.numel() for p in merged.parameters()))
    check(merged)


@pytest.mark.parametrize("name", CASES)
def test_a_ladder_is_what_counting_says_at_every_rank(name: str) -> None:
    make, inputs, scheme = CASES[name]
    low, x = sp.factorize(make(), scheme, EVERYTHING), inputs()
    costs = ladder(low, x).unit("macs")
    full = {weight: factors.rank for weight, factors in sp.layers.named_factors(low)}
    assert costs.whole == count_macs(sp.merge(low), x)
    for weight, rank in full.items():
        for cut in {1, 2, rank // 4, rank - 1}:
            ranks = full | {weight: cut}
            told = costs.fixed + sum(costs.weights[each][r - 1] for each, r in ranks.items())
            assert told == pytest.approx(count_macs(sp.merge(sp.prune(low, ranks)), x), abs=1)  # each is rounded for one example


def test_weights_that_are_priced_by_counting_are_named() -> None:
    assert list(ladder(sp.factorize(TiedDecoder(), where=EVERYTHING), torch.randn(4, 64)).corrected) == ["b"]
    plain = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    assert not ladder(sp.factorize(plain, where=EVERYTHING), torch.randn(4, 16)).corrected


def test_the_dense_stand_in_costs_what_the_dense_network_costs_and_holds_no_values() -> None:
    model, x = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.LSTM(512, 64)), torch.randn(3, 512)
    low = sp.factorize(model, where=EVERYTHING)
    with_dense, without = ladder(low, x, dense_model=model), ladder(low, x)
    assert {name: unit.whole for name, unit in with_dense.units.items()} == {name: unit.whole for name, unit in without.units.items()}


class AsksForItsClass(nn.Module):
    """Skips layers that are not of the class that it expects."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if type(layer) in (nn.Linear, nn.ReLU):
                x = layer(x)
        return x


def test_a_function_that_changed_is_an_error_that_names_the_layer() -> None:
    model, x = AsksForItsClass(), torch.randn(4, 16)
    for work in (
        lambda: sp.compress(model, [(x, x)], nn.MSELoss(), sp.Budget(macs=0.5), where=EVERYTHING, progress=False),
        lambda: plan(model, x, budgets=[0.5], where=EVERYTHING),
    ):
        with pytest.raises(LayerError, match=r"layer 'layers\.0': is called in the dense network and not in the factorized"):
            work()


class Scaled(nn.Linear):
    """Doubles its output while it is trained."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (2 if self.training else 1)


def test_the_first_layer_that_differs_is_named_in_either_mode() -> None:
    torch.manual_seed(1)
    one = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout(0.5))
    other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Scaled(4, 4), nn.Dropout(0.5))
    other.load_state_dict(one.state_dict())
    x, state = torch.randn(8, 4), torch.random.get_rng_state()
    with pytest.raises(LayerError, match=r"layer '2': its output in the second network .*in training mode"):
        same_function(one, other, x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one[1].num_batches_tracked == 0, "statistics are as before"
    assert one[3].p == 0.5
    assert one.training
    same_function(one, one, x)


def test_a_loss_without_gradients_is_replaced_by_the_distance_of_the_outputs() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    x = torch.randn(32, 16)
    data = [(x, model(x).detach())]
    made = sp.compress(model, data, nn.MSELoss(), sp.Budget(macs=0.6), where=EVERYTHING, progress=False)
    assert "the gradient of the loss vanishes" in made.stages()
    assert "LossSensitivity" not in plan(model, x, data, nn.MSELoss(), budgets=[0.6], where=EVERYTHING).weights[0].distortions
    asked = sp.compress(model, data, nn.MSELoss(), sp.Budget(macs=0.6), where=EVERYTHING, cut="sensitive", progress=False)
    assert asked.cut == "sensitive"
    assert asked.measured["final"].macs <= 0.6 * asked.measured["dense"].macs


def test_statistics_that_hurt_are_not_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3)
    )
    x = torch.randn(512, 8)
    target = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    sp.fit(model, [(x, target)] * 60, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), 0.01), 1, progress=False)
    few = [(5 + 0.01 * x[:4], target[:4])]  # nothing like what the network is used for
    made = sp.compress(model, few, nn.CrossEntropyLoss(), sp.Budget(macs=0.9), eval_data=[(x, target)], cut="plain", progress=False)
    assert "recalibrated" in made.dropped
    assert "recalibrated" not in made.scores
    assert "not kept" in made.stages()
    assert made.measured["final"].loss == pytest.approx(list(made.scores.values())[-1]["loss"], rel=1e-4)  # merged: other rounding


def test_a_floor_is_told_before_any_calibration_and_names_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules["spectrim.pipeline.cutter"], "calibrate", None)
    model, data = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), [(torch.randn(4, 16), torch.randint(4, (4,)))]
    with pytest.raises(SettingError, match=r"at least 0\.\d+ for this network.*% of that stay dense, '0' has \d+ %"):
        sp.compress(model, data, nn.CrossEntropyLoss(), sp.Budget(macs=0.05), progress=False)


def test_a_difference_that_cannot_be_measured_is_no_rounding() -> None:
    """A network of zeros beside one of values: infinitely far by its own scale, in double precision as well."""
    zeros, values = nn.Linear(3, 2), nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in zeros.parameters():
            parameter.zero_()
    with pytest.raises(LayerError, match="by inf of it"):
        same_function(nn.Sequential(zeros), nn.Sequential(values), torch.ones(1, 3))
