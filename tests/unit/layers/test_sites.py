"""Sites: every use of a factorized weight, what it is called with, and what a cut of it moves into the bias."""

import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.budget.costs import calls
from spectrim.layers import factors_in, has_matrix, is_factorized, named_factors, sites
from spectrim.surgery.calibrate import calibrate
from spectrim.surgery.decompositions import Decompositions
from spectrim.surgery.states import cut_


def everything(name: str, module: nn.Module) -> bool:
    return True


class Tied(nn.Module):
    """Two layers with one weight, one layer under two names, and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.again = self.first
        self.rnn = nn.GRU(6, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.again(self.second(self.first(x))))[0]  # type: ignore[no-any-return]


def test_sites_are_uses_and_named_factors_are_weights() -> None:
    low = sp.factorize(Tied(), where=everything)
    found = {site.name: site for site in sites(low)}
    assert list(found) == ["first", "second", "rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert found["first"].factors is found["second"].factors
    assert found["rnn.weight_hh_l0"].layer_name == "rnn"
    assert list(dict(named_factors(low))) == ["first", "rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert all(site.layer.factors_of(site.key) is site.factors for site in found.values())


def test_a_layer_says_which_weight_met_which_input() -> None:
    low = sp.factorize(Tied(), where=everything)
    met = [(call.weight, call.shape) for call in calls(low, torch.zeros(2, 3, 6))]
    assert met == [("weight", (2, 3, 6))] * 3 + [("weight_ih_l0", (3, 2, 6)), ("weight_hh_l0", (3, 2, 6))]


def test_questions_about_any_module() -> None:
    low = sp.factorize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), where=["0"])
    assert [is_factorized(part) for part in low] == [True, False, False]
    assert [has_matrix(part) for part in low] == [True, False, True]
    assert [len(factors_in(part)) for part in low] == [1, 0, 0]


def test_a_cut_in_place_moves_the_same_into_the_bias_as_a_cut_copy_for_values_of_both_signs() -> None:
    torch.manual_seed(0)
    low = sp.factorize(nn.Sequential(nn.Linear(6, 5)).double(), where=everything)
    factors = dict(named_factors(low))["0"]
    U, S, Vh = factors.parts()
    factors.set_(U, S * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]).double(), Vh)
    calibration = calibrate(low, [torch.randn(64, 6, dtype=torch.float64) + 3])
    assert calibration.means
    expected = sp.prune(low, {"0": 2}, calibration=calibration)
    cut_(low, {"0": 2}, Decompositions(low, calibration), "inputs")
    torch.testing.assert_close(low[0].bias, expected[0].bias, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(low[0].weight.detach() * 1, expected[0].weight.detach() * 1, rtol=1e-9, atol=1e-9)
