"""ADMM on a convex problem with a known solution, its memory, its warning; the live weights stay until the projection."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import LayerError, SettingError
from spectrim.layers import named_factors
from spectrim.projections import Levels, RankAtMost, Structured, Then, TopK
from spectrim.training.admm import ADMM, Pull
from spectrim.training.magnitude import Hold


class Nonnegative:
    """The projection on a convex cone, for a problem with one solution."""

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.clamp(min=0)

    def stored_bits(self, tensor: Tensor) -> Any:
        raise NotImplementedError


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 12, generator=generator), torch.randn(8, 4, generator=generator)) for _ in range(count)]


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 0.01)


def solve(growth: float, most: float) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Minimize ``1/2 (w - b)^T Q (w - b)`` over non-negative ``w`` by ADMM's steps; return that, the solution, and the memory."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    Q, b = root @ root.mT / 6 + torch.eye(6, dtype=torch.float64), torch.randn(6, generator=generator, dtype=torch.float64)
    model = nn.Linear(6, 1, bias=False).double()
    course = ADMM({"*": Nonnegative()}, rho=0.5, growth=growth, most=most, rounds=300, end=1.0, residual=1e-9)  # type: ignore[dict-item]
    steps = 300
    memory = course.start(model, None, steps)
    for step in range(steps):
        change = course.before(model, None, step, steps, memory)
        if change.penalty is not None:  # the exact minimum of the quadratic with the pull
            rho, (goal,) = memory["rho"], [memory["copies"][name] - memory["duals"][name] for name in memory["copies"]]
            system = Q + rho * torch.eye(6, dtype=torch.float64)
            model.weight.data = torch.linalg.solve(system, Q @ b + rho * goal[0])[None]
            (gradient,) = torch.autograd.grad(change.penalty(model), model.weight)
            torch.testing.assert_close(gradient[0], -Q @ (model.weight[0] - b))
        course.after(model, step, steps, memory)
    known = torch.zeros(6, dtype=torch.float64)
    for _ in range(3000):  # projected gradient
        known = (known - 0.1 * Q @ (known - b)).clamp(min=0)
    assert 0 < int((known > 0).sum()) < 6, "the constraint matters"
    return model.weight.detach()[0], known, memory


@pytest.mark.parametrize(("growth", "most"), [(1.0, 0.5), (1.05, 20.0)])
def test_a_convex_quadratic_converges_to_its_solution(growth: float, most: float) -> None:
    found, known, memory = solve(growth, most)
    torch.testing.assert_close(found, known, rtol=1e-7, atol=1e-8)  # the residual at which it stops is 1e-9
    assert memory["done"]
    assert memory["round"] < 300
    assert max(memory["residuals"].values()) <= 1e-9


def test_the_pull_by_hand() -> None:
    model = nn.Linear(2, 1)
    model.weight.data = torch.tensor([[1.0, -2.0]])
    pull = Pull(0.5, {"weight": torch.tensor([[0.0, -2.0]])}, {"weight": torch.tensor([[0.5, 1.0]])})
    assert float(pull(model).detach()) == 0.25 * (1.5**2 + 1)


def test_a_round_by_hand_leaves_the_live_weights_alone() -> None:
    """On a CPU a view of the weights that is changed in place would prune them: the copies are copies."""
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[4.0, 3.0, -2.0, 1.0]])
    course = ADMM({"*": TopK(1)}, rho=0.1, growth=2.0, rounds=2, end=1.0)
    memory = course.start(model, None, 4)
    assert memory["copies"]["weight"].tolist() == [[4, 0, 0, 0]]
    live = model.weight.clone()
    for step in range(2):
        assert isinstance(course.before(model, None, step, 4, memory).penalty, Pull)
        course.after(model, step, 4, memory)
    assert torch.equal(model.weight, live)
    assert memory["duals"]["weight"].tolist() == [[0, 1.5, -1, 0.5]], "W + U - Z, halved as rho was doubled"
    assert memory["rho"] == 0.2
    assert memory["residuals"]["weight"] == pytest.approx((14 / 30) ** 0.5)
    memory["copies"]["weight"].add_(1)
    assert torch.equal(model.weight, live)


def test_the_residual_falls_and_the_projection_then_changes_nothing_much() -> None:
    model = network()
    before = sp.evaluate(model, batches(), nn.MSELoss())["loss"]
    course = ADMM({"0": TopK(40), "2": Structured(4, along="columns")}, rho=0.05, growth=1.6, most=10.0, rounds=20, end=0.8, residual=0.05)
    history = sp.fit(model, batches(), nn.MSELoss(), adam(model), 60, courses=[course], progress=False)
    assert history.epochs[2]["ADMM residual"] > 0.1
    assert history.last["ADMM residual"] <= 0.05
    assert history.epochs[2]["ADMM"] > 0 == history.last["ADMM"]
    assert (int(model[0].weight.count_nonzero()), int(model[2].weight.any(0).sum())) == (40, 4)
    assert history.last["loss"] < before


def test_counts_fall_along_a_ramp_and_it_does_not_end_within() -> None:
    model = network()
    course = ADMM({"0": TopK(12), "2": Then(TopK(4), Levels(3, zero=False))}, rounds=8, ramp=0.5, end=1.0, residual=0.99)
    memory, counts, ends = course.start(model, None, 8), [], []
    for step in range(8):
        counts.append(int(memory["copies"]["0.weight"].count_nonzero()) if memory["copies"] else 0)
        for name, weight in memory["copies"].items():  # a training that reaches them
            dict(model.named_parameters())[name].data.copy_(weight)
        course.after(model, step, 8, memory)
        ends.append(memory["done"])
    assert counts[:4] == [12 + round(180 * (1 - k / 4) ** 3) for k in range(1, 5)]
    assert ends == [False] * 3 + [True] * 5
    assert (int(model[0].weight.count_nonzero()), int(model[2].weight.count_nonzero())) == (12, 4)


def test_what_does_not_converge_is_told() -> None:
    model = network()
    course = ADMM({"*": TopK(5)}, rho=1e-6, growth=1.0, rounds=2, end=0.5)
    with pytest.warns(UserWarning, match=r"after 2 rounds the relative primal residual is above 0.02: {'0.weight': 0.*more rounds"):
        sp.fit(model, batches(), nn.MSELoss(), adam(model), 2, courses=[course], progress=False)
    assert int(model[0].weight.count_nonzero()) == int(model[2].weight.count_nonzero()) == 5


COURSE = ADMM(
    {"0": Then(TopK(60), Levels(3, zero=False)), "2.weight": TopK(20), "2.bias": TopK(2)},
    rho=0.5,
    rounds=4,
    most=50.0,
    end=0.5,
    residual=0.9,
)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    def train(folder: Path | None, until: int = 99) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        def stop(epoch: int, line: dict[str, float], model: nn.Module) -> None:
            if epoch == until:
                raise InterruptedError

        model = network()
        optimizer, parts = adam(model), {"checkpoint": folder, "callbacks": [stop], "courses": [COURSE], "progress": False}
        return model, optimizer, sp.fit(model, batches(), nn.MSELoss(), optimizer, 8, **parts)

    whole, optimizer, history = train(None)
    for until in (1, 3, 6):
        with pytest.raises(InterruptedError):
            train(tmp_path, until)
    resumed, again, found = train(tmp_path)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(optimizer.state[a][key], again.state[b][key]) for key in ("exp_avg", "exp_avg_sq"))
    columns = ("loss", "ADMM", "ADMM residual", "ADMM rho")
    assert [[line[name] for name in columns] for line in history.epochs[1:]] == [
        [line[name] for name in columns] for line in found.epochs[1:]
    ]
    assert len(whole[0].weight[whole[0].weight != 0].unique()) <= 8
    assert [int(whole[2].weight.count_nonzero()), int(whole[2].bias.count_nonzero())] == [20, 2]


def test_levels_stay_on_their_levels_and_pruned_weights_pruned() -> None:
    """Prune, then round what is left in a second training: zeros are held in it."""
    model = network()
    with torch.no_grad():
        model[0].weight.copy_(TopK(30)(model[0].weight))
    holes = model[0].weight == 0
    courses = [Hold("0"), ADMM({"0": Levels(2, zero=False)}, rho=1.0, rounds=6, most=100.0, end=0.5, residual=0.9)]
    sp.fit(model, batches(), nn.MSELoss(), adam(model), 4, courses=courses, progress=False)
    assert torch.equal(model[0].weight == 0, holes)
    assert len(model[0].weight[~holes].unique()) <= 4


def test_singular_values_are_pruned_by_admm() -> None:
    low = sp.factorize(network(), where=sp.match("*"))
    course = ADMM({"*.S": TopK(3)}, rho=0.5, most=100.0, end=0.8, residual=0.2)
    sp.fit(low, batches(), nn.MSELoss(), torch.optim.Adam(low.parameters(), 0.05), 20, courses=[course], progress=False)
    cut = sp.prune(low, sp.Energy(1.0))
    assert {factors.rank for _, factors in named_factors(cut)} == {3}


def test_patterns_choose_weights_and_wrong_ones_are_refused() -> None:
    model = network()
    memory = ADMM({"2": Levels(3), "*": TopK(5)}).start(model, None, 10)
    assert {name: len(copy.unique()) for name, copy in memory["copies"].items()} == {"0.weight": 6, "2.weight": 7}
    for patterns, named in (({"*": TopK(1), "2": TopK(2)}, "'2'"), ({"fc1": TopK(2)}, "'fc1'"), ({"*.S": TopK(1)}, "'*.S'")):
        with pytest.raises(SettingError, match=rf"ADMM: patterns must be .*got {named.replace('*', '.')}; weights of this model: 0.weight"):
            ADMM(patterns).start(model, None, 10)
    wrong = ({"rho": 0.0}, {"rho": 2.0}, {"growth": 0.5}, {"rounds": 0}, {"begin": 0.7}, {"end": 1.5}, {"ramp": 2.0}, {"residual": 0.0})
    for knobs in wrong:
        with pytest.raises(SettingError, match=r"^ADMM: "):
            ADMM({"*": TopK(1)}, **knobs)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"^ADMM: projections"):
        ADMM({})


def test_a_weight_that_was_exchanged_is_an_error() -> None:
    model, course = network(), ADMM({"*": RankAtMost(2)})
    memory = course.start(model, None, 10)
    pull = course.before(model, None, 0, 10, memory)
    other = copy.deepcopy(model)
    other[2] = nn.Linear(16, 5)
    with pytest.raises(LayerError, match=r"2.weight.*was cut or exchanged while a course held its entries; cut ranks before it"):
        pull.penalty(other)  # type: ignore[misc]
