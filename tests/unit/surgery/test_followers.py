"""A cut takes along what follows a model: averages in an optimizer, EMA and SWA copies; the rest starts again, and that is said."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import spectrim as sp
from spectrim.errors import LayerError
from spectrim.layers import named_factors

EVERYTHING = sp.match("*")


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    dense = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Tanh(), nn.Linear(6 * 4, 12), nn.Tanh(), nn.Linear(12, 5))
    return sp.factorize(dense.to(dtype), "channel", EVERYTHING)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = torch.randn(8, 4, 4, 4, dtype=torch.float64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: factors.matrix().detach() for name, factors in named_factors(model)}


def averages(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The weights that ASGD's average stands for."""
    averaged = copy.deepcopy(model)
    with torch.no_grad():
        for own, parameter in zip(averaged.parameters(), model.parameters(), strict=True):
            own.copy_(optimizer.state[parameter]["ax"])
    return weights(averaged)


def asgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.ASGD(model.parameters(), lr=0.05, t0=0, lambd=0)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a block matrix, each block of the rank."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]


@pytest.mark.parametrize("rank", [99, 4, 2])
def test_the_average_of_asgd_is_cut_as_a_weight(rank: int) -> None:
    model = net()
    optimizer = asgd(model)
    for _ in range(30):
        step(model, optimizer)
    before = averages(model, optimizer)
    sp.prune_(model, sp.budget.Fixed(rank), optimizer)
    after = averages(model, optimizer)
    for name, factors in named_factors(model):
        torch.testing.assert_close(after[name], truncated(before[name], factors.rank), rtol=1e-9, atol=1e-9)
        average = optimizer.state[factors.U]["ax"]
        assert ((average * factors.U.detach()).sum(-2) > 0).all(), "column by column along the factors' own: they can be averaged on"
    step(model, optimizer)
    assert all(torch.isfinite(value).all() for value in averages(model, optimizer).values())


def test_lbfgs_starts_again_and_goes_on() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    for _ in range(3):
        step(model, optimizer)
    with pytest.warns(UserWarning, match="LBFGS: a cut cannot carry its state"):
        sp.prune_(model, sp.budget.Fixed(2), optimizer)
    assert not optimizer.state
    before = weights(model)
    step(model, optimizer)
    assert all(not torch.equal(value, before[name]) for name, value in weights(model).items())


def test_state_of_an_unknown_meaning_starts_again_with_a_warning() -> None:
    class Mine(torch.optim.SGD):
        """Has an entry of the parameter's shape that nobody else knows."""

    model = net()
    optimizer = Mine(model.parameters(), 0.01, momentum=0.9)
    step(model, optimizer)
    for parameter in model.parameters():
        optimizer.state[parameter]["z"] = parameter.detach().clone()
    biases = {name: optimizer.state[p] for name, p in model.named_parameters() if name.endswith("bias")}
    with pytest.warns(UserWarning, match=r"Mine: a cut cannot carry its state 'z' \(9 parameters\); the optimizer starts it again"):
        sp.prune_(model, sp.budget.Fixed(2), optimizer)
    left = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    assert list(left) == list(biases)
    assert all(torch.equal(left[name]["z"], biases[name]["z"]) for name in left), "what no cut touches stays"
    step(model, optimizer)


@pytest.mark.parametrize("wrap", [copy.deepcopy, AveragedModel], ids=["copy", "AveragedModel"])
@pytest.mark.parametrize("rank", [99, 2])
def test_followers_are_cut_along_and_can_be_averaged_on(wrap: Any, rank: int) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    follower = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8)) if wrap is AveragedModel else wrap(model)
    for _ in range(5):
        step(model, optimizer)
        if wrap is AveragedModel:
            follower.update_parameters(model)
    inner = follower.module if wrap is AveragedModel else follower
    before = weights(inner)
    sp.prune_(model, sp.budget.Fixed(rank), optimizer, followers=[follower])
    after = weights(inner)
    for name, factors in named_factors(model):
        torch.testing.assert_close(after[name], truncated(before[name], factors.rank), rtol=1e-9, atol=1e-9)
    assert [p.shape for p in inner.parameters()] == [p.shape for p in model.parameters()]
    if wrap is AveragedModel:
        for _ in range(60):
            follower.update_parameters(model)
        for name, value in weights(model).items():
            torch.testing.assert_close(weights(inner)[name], value, rtol=1e-4, atol=1e-4)  # 0.8^60 = 1.5e-6 of the way is left


@pytest.mark.parametrize(
    ("follower", "message"),
    [
        (lambda: sp.prune(net(), {"3": 3}), r"layer '3.factors.weight': the follower Sequential has factors of rank 3; .* rank 12 here"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), r"is not in the follower, a Sequential; pass models with the same layers"),
        (lambda: [torch.zeros(2)], r"is not in the follower, a list"),
    ],
)
def test_other_followers_are_refused_and_nothing_changes(follower: Any, message: str) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    before, held = copy.deepcopy(model.state_dict()), list(model.parameters())
    with pytest.raises(LayerError, match=message):
        sp.prune_(model, sp.budget.Fixed(2), optimizer, followers=[follower()])
    assert [id(p) for p in model.parameters()] == [id(p) for p in held]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_calibrated_cut_shifts_the_biases_of_followers_too() -> None:
    torch.manual_seed(0)
    model = sp.factorize(nn.Sequential(nn.Linear(6, 6)).double(), where=EVERYTHING)
    data = [torch.randn(16, 6, dtype=torch.float64) + 2 for _ in range(3)]
    found = sp.calibrate(model, data)
    follower, expected = copy.deepcopy(model), sp.prune(model, sp.budget.Fixed(2), calibration=found)
    sp.prune_(model, sp.budget.Fixed(2), calibration=found, followers=[follower])
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    assert follower[0].rank == 2
