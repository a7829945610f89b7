"""Training in a subspace: the projected gradient, SGD where the subspace is everything, BFGS on quadratics, states, schedules, refusals."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small import batches, flat, network
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import FormatError, LayerError, SettingError
from spectrim.layers import named_factors
from spectrim.training import BFGS, Basis, Subspace, Trajectory


def directions(model: nn.Module, size: int) -> Tensor:
    return torch.randn(size, len(flat(model)), generator=torch.Generator().manual_seed(3), dtype=flat(model).dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 12, scheduler: Any = None) -> None:
    for step in range(steps):
        x, y = batches()[step % 6]
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x.to(flat(model))), y.to(flat(model))).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


# P-SGD


def test_a_step_is_along_the_projected_gradient() -> None:
    model = network().double()
    basis = Basis.of(model, directions(model, 5))
    before = flat(model)
    optimizer = Subspace(model.parameters(), basis, lr=0.3)
    train(model, optimizer, 1)
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])  # type: ignore[union-attr]
    P = basis.directions
    torch.testing.assert_close(flat(model) - before, -0.3 * P.mT @ (P @ gradient), rtol=1e-9, atol=1e-12)


def test_training_stays_in_the_subspace_and_moves_in_all_of_it() -> None:
    model = network().double()
    basis, before = Basis.of(model, directions(model, 5)), flat(model)
    train(model, Subspace(model.parameters(), basis, lr=0.3))
    moved, P = flat(model) - before, basis.directions
    torch.testing.assert_close(P.mT @ (P @ moved), moved, rtol=0, atol=1e-12)
    assert float((P @ moved).abs().min()) > 0


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.5, "weight_decay": 0.1}])
def test_where_the_subspace_is_everything_it_is_sgd(settings: dict[str, float]) -> None:
    model, other = network().double(), network().double()
    basis = Basis.of(model, directions(model, len(flat(model))))
    mine = Subspace(model.parameters(), basis, **{"lr": 0.1, "momentum": 0.0, **settings})
    sgd = torch.optim.SGD(other.parameters(), 0.1, **settings)
    one_cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=12, cycle_momentum=bool(settings))
    train(model, mine, scheduler=one_cycle(mine))
    train(other, sgd, scheduler=one_cycle(sgd))
    torch.testing.assert_close(flat(model), flat(other), rtol=1e-9, atol=1e-9)


def test_with_the_residual_at_the_same_rate_it_is_sgd_in_any_subspace() -> None:
    model, other = network().double(), network().double()
    mine = Subspace(model.parameters(), Basis.of(model, directions(model, 3)), lr=0.1, residual=1.0)
    train(model, mine)
    train(other, torch.optim.SGD(other.parameters(), 0.1, momentum=0.9))
    torch.testing.assert_close(flat(model), flat(other), rtol=1e-9, atol=1e-9)


def test_the_momentum_is_small_and_so_is_the_state() -> None:
    model = network()
    optimizer = Subspace(model.parameters(), Basis.of(model, directions(model, 5)))
    train(model, optimizer, 2)
    assert {key: tuple(value.shape) for key, value in optimizer.memory.items()} == {"momentum": (5,)}
    assert sum(tensor.numel() for state in optimizer.state_dict()["state"].values() for tensor in state.values()) == 5


def test_a_parameter_without_a_gradient_does_not_matter_and_without_any_nothing_moves() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2)).double()
    optimizer = Subspace(model.parameters(), Basis.of(model, directions(model, 4)), lr=0.1)
    before = flat(model)
    optimizer.step()
    assert torch.equal(flat(model), before)
    model[0](torch.ones(1, 3).double()).sum().backward()
    optimizer.step()
    gradient = torch.cat([flat_of(p.grad, p) for p in model.parameters()])
    P = optimizer.directions
    torch.testing.assert_close(flat(model), before - 0.1 * P.mT @ (P @ gradient), rtol=1e-9, atol=1e-12)


def flat_of(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return (torch.zeros_like(parameter) if gradient is None else gradient).reshape(-1)


# With fit


def test_fit_trains_in_the_subspace_of_a_trajectory_and_batchnorm_keeps_its_statistics() -> None:
    model, trajectory = network(), Trajectory()
    trajectory.record(model)
    sp.fit(model, batches(), nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.05), 6, callbacks=[trajectory], progress=False)
    end = sp.evaluate(model, batches(), nn.MSELoss())["loss"]
    trajectory.restore(model)
    start, norm = sp.evaluate(model, batches(), nn.MSELoss())["loss"], copy.deepcopy(model[1].state_dict())  # type: ignore[index]
    make = partial(Subspace, basis=trajectory.basis(4), lr=0.05)
    tuning = sp.Tuning(optimizer=make, scheduler=sp.training.tuning.one_cycle, scheduler_steps="batch")
    history = sp.fit(model, batches(), nn.MSELoss(), epochs=6, tuning=tuning, progress=False)
    found = sp.evaluate(model, batches(), nn.MSELoss())["loss"]
    assert found < start - 0.5 * (start - end)
    assert history.last["learning_rate"] < 0.05
    assert not torch.equal(model[1].running_mean, norm["running_mean"])  # type: ignore[index, union-attr]
    assert int(model[1].num_batches_tracked) == int(norm["num_batches_tracked"]) + 36  # type: ignore[index, union-attr]


def test_a_run_that_resumes_ends_with_the_same_bits(tmp_path: Path) -> None:
    def run(epochs: int, folder: str) -> Tensor:
        model = network()
        optimizer = Subspace(model.parameters(), Basis.of(model, directions(model, 5)), lr=0.1, residual=0.1)
        sp.fit(model, batches(), nn.MSELoss(), optimizer, epochs, checkpoint=tmp_path / folder, progress=False)
        return flat(model)

    run(2, "a")
    assert torch.equal(run(4, "a"), run(4, "b"))
    model = network()
    other = Subspace(model.parameters(), Basis.of(model, directions(model, 4)))
    with pytest.raises(FormatError, match="state must be that of basis"):
        sp.fit(model, batches(), nn.MSELoss(), other, 6, checkpoint=tmp_path / "a", progress=False)


def test_factors_train_in_the_subspace_with_their_penalty_and_are_cut_afterwards() -> None:
    torch.manual_seed(0)
    low, trajectory = sp.factorize(network()), Trajectory()
    trajectory.record(low)
    penalties, sgd = [sp.Orthogonality(1.0)], torch.optim.SGD(low.parameters(), 0.05)
    sp.fit(low, batches(), nn.MSELoss(), sgd, 6, penalties=penalties, callbacks=[trajectory], progress=False)
    trajectory.restore(low)
    optimizer = Subspace(low.parameters(), trajectory.basis(4), lr=0.05)
    history = sp.fit(low, batches(), nn.MSELoss(), optimizer, 4, penalties=penalties, progress=False)
    assert history.last["loss"] < history.epochs[0]["loss"]
    cut = sp.prune(low, {name: 3 for name, _ in named_factors(low)})
    assert max(history_defect(cut)) < 1e-5, "a cut makes the factors orthonormal"
    sp.prune_(low, {name: 3 for name, _ in named_factors(low)}, optimizer)
    with pytest.raises(LayerError, match="cut ranks before the first sample, and not while training in the subspace"):
        optimizer.step()


def history_defect(model: nn.Module) -> list[float]:
    return [sp.linalg.orthogonality_defect(side.detach()) for _, form in named_factors(model) for side in form.sides()]


# P-BFGS


def quadratic(size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return root @ root.mT + torch.eye(size, dtype=torch.float64), torch.randn(size, generator=generator, dtype=torch.float64)


def test_with_exact_steps_a_quadratic_is_solved_in_as_many_as_its_dimensions_and_the_inverse_is_known() -> None:
    Q, b = quadratic()
    w, inverse = torch.zeros_like(b), torch.eye(len(b), dtype=torch.float64)
    for _ in range(len(b)):
        gradient = Q @ w - b
        direction = -inverse @ gradient
        step = -(gradient @ direction) / (direction @ Q @ direction) * direction
        w, inverse = w + step, BFGS().updated(inverse, step, Q @ step)
        torch.testing.assert_close(inverse @ (Q @ step), step, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(Q @ w, b, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse, torch.linalg.inv(Q), rtol=1e-7, atol=1e-9)  # six updates in sequence


def test_an_update_without_curvature_is_skipped() -> None:
    H = torch.eye(2, dtype=torch.float64)
    s = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert BFGS().updated(H, s, -s) is H
    assert BFGS().updated(H, s, 0 * s) is H
    assert BFGS(least=5.0).updated(H, s, 5 * s) is H
    assert BFGS(least=4.9).updated(H, s, 5 * s) is not H


def bowl(size: int = 20, inside: int = 6) -> tuple[nn.Module, Subspace, Callable[[], Tensor], Tensor]:
    """Return a quadratic of many parameters, in a subspace that holds its minimum."""
    Q, b = quadratic(size)
    model = nn.Linear(size, 1, bias=False).double()
    generator = torch.Generator().manual_seed(1)
    model.weight.data = torch.randn(1, size, generator=generator, dtype=torch.float64)
    solution = torch.linalg.solve(Q, b)
    ways = torch.randn(inside, size, generator=generator, dtype=torch.float64)
    ways[0] = solution - model.weight.data[0]
    optimizer = Subspace(model.parameters(), Basis.of(model, ways), bfgs=BFGS())

    def closure() -> Tensor:
        optimizer.zero_grad()
        w = model.weight[0]
        loss = 0.5 * w @ Q @ w - b @ w
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return model, optimizer, closure, solution


@pytest.mark.parametrize("curvature", ["batch", "steps"])
def test_bfgs_finds_the_minimum_of_a_quadratic_and_every_step_descends(curvature: Any) -> None:
    model, optimizer, closure, solution = bowl()
    optimizer.bfgs = BFGS(curvature=curvature)
    losses = []
    while not losses or float(model.weight.grad.norm()) > 1e-6:  # rounding leaves 6e-8  # type: ignore[union-attr]
        losses.append(optimizer.step(closure).item())
        assert len(losses) < 30
    torch.testing.assert_close(model.weight.detach()[0], solution, rtol=0, atol=1e-7)
    assert losses == sorted(losses, reverse=True)
    assert optimizer.memory["calls"] < 4 * len(losses), "most steps need one trial or a few"


def test_the_line_search_by_hand() -> None:
    """``f(w) = 8 w^2`` from 1 along its gradient of 16: lengths 1, 0.4 and 0.16 rise, 0.064 falls enough (Armijo)."""
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(1.0)
    optimizer = Subspace(model.parameters(), Basis.of(model, torch.ones(1, 1, dtype=torch.float64)), bfgs=BFGS(curvature="batch"))
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(model.weight.item())
        loss = 8 * model.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    assert optimizer.step(closure).item() == 8
    assert seen == pytest.approx([1, 1 - 16, 1 - 0.4 * 16, 1 - 0.16 * 16, 1 - 0.064 * 16])
    assert optimizer.memory["calls"] == 5
    assert float(optimizer.memory["inverse"]) == pytest.approx(1 / 16), "a quadratic of one dimension is known after one step"
    optimizer.step(closure)
    assert model.weight.item() == pytest.approx(0, abs=1e-9)


def test_a_line_search_without_success_moves_nothing_and_begins_again() -> None:
    model, optimizer, closure, _ = bowl()
    for _ in range(3):
        optimizer.step(closure)
    before, size = model.weight.detach().clone(), optimizer.directions.shape[0]
    rising = iter(range(100))

    def worse() -> Tensor:
        return closure().detach() + next(rising)

    optimizer.step(worse)
    assert torch.equal(model.weight.detach(), before)
    assert torch.equal(optimizer.memory["inverse"], torch.eye(size, dtype=torch.float64))


def test_decay_is_part_of_what_the_line_search_sees() -> None:
    model, optimizer, closure, _ = bowl(6, 6)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    for _ in range(30):
        optimizer.step(closure)
    Q, b = quadratic(6)
    ridge = torch.linalg.solve(Q + 0.5 * torch.eye(6, dtype=torch.float64), b)
    torch.testing.assert_close(model.weight.detach()[0], ridge, rtol=0, atol=1e-7)


@pytest.mark.parametrize("curvature", ["batch", "steps"])
def test_bfgs_resumes_from_its_state_bit_for_bit(curvature: Any) -> None:
    model, optimizer, closure, _ = bowl()
    optimizer.bfgs = BFGS(curvature=curvature)
    for _ in range(3):
        optimizer.step(closure)
    state, weights = copy.deepcopy(optimizer.state_dict()), model.weight.detach().clone()
    for _ in range(3):
        optimizer.step(closure)
    again, other, its_closure, _ = bowl()
    other.bfgs = BFGS(curvature=curvature)
    again.weight.data.copy_(weights)
    other.load_state_dict(state)
    for _ in range(3):
        other.step(its_closure)
    assert torch.equal(again.weight, model.weight)
    assert other.memory["calls"] == optimizer.memory["calls"]


def test_a_state_keeps_double_precision_beside_single_precision_parameters() -> None:
    model = network()
    basis = Basis.of(model, directions(model, 5))

    def stepped(optimizer: Subspace) -> Subspace:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(batches()[0][0]), batches()[0][1])
            loss.backward()
            return loss

        optimizer.step(closure)
        return optimizer

    first = stepped(Subspace(model.parameters(), basis, bfgs=BFGS()))
    second = Subspace(model.parameters(), basis, bfgs=BFGS())
    second.load_state_dict(first.state_dict())
    assert second.memory["inverse"].dtype == torch.float64
    assert torch.equal(second.memory["inverse"], first.memory["inverse"])
    copied = copy.deepcopy(first)
    assert torch.equal(copied.directions, first.directions)


# Refusals


def test_what_it_refuses() -> None:
    model = network()
    basis = Basis.of(model, directions(model, 5))
    for settings, message in (
        ({"lr": -1.0}, "lr must be a number >= 0, got -1.0"),
        ({"momentum": 1.0}, r"momentum must be a number in \[0, 1\), got 1.0"),
        ({"residual_momentum": -0.1}, r"residual_momentum must be a number in \[0, 1\)"),
        ({"residual": -0.1}, "residual must be a number >= 0"),
    ):
        with pytest.raises(SettingError, match=message):
            Subspace(model.parameters(), basis, **settings)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="params must be one group"):
        Subspace([{"params": [p]} for p in model.parameters()], basis)
    with pytest.raises(SettingError, match="parameters must be the 6 of the trajectory"):
        Subspace(model[0].parameters(), basis)  # type: ignore[index]
    with pytest.raises(LayerError, match="in the trajectory"):
        Subspace(reversed(list(model.parameters())), basis)
    with pytest.raises(SettingError, match="closure must be given for P-BFGS"):
        Subspace(model.parameters(), basis, bfgs=BFGS()).step()
    with pytest.raises(SettingError, match="fit: optimizer must be one whose step needs no closure, got 'Subspace'"):
        sp.fit(model, batches(), nn.MSELoss(), Subspace(model.parameters(), basis, bfgs=BFGS()), progress=False)


@pytest.mark.parametrize("settings", [{"armijo": 0.6}, {"shrink": 1.0}, {"trials": 0}, {"least": -1.0}])
def test_settings_of_bfgs_outside_their_range(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=f"BFGS: {next(iter(settings))} must be"):
        BFGS(**settings)
