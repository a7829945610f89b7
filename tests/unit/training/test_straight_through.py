"""Straight-through training against its definition, step by step; its end; and that it learns where rounding at once does not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.projections import Levels, LevelTable, TopK
from spectrim.training.magnitude import OneShot
from spectrim.training.straight_through import StraightThrough


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(count, 16, 12, generator=generator)
    return [(x, torch.tanh(x[:, :4] - x[:, 4:8])) for x in inputs]


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


def test_it_is_gradient_descent_by_the_gradient_at_the_projection() -> None:
    model, projection = nn.Linear(12, 4), LevelTable((-0.3, -0.1, 0.1, 0.3))
    learning, bias = model.weight.detach().clone(), model.bias.detach().clone()
    for step, (x, y) in enumerate(batches()):
        shown = (learning if step == 0 else projection(learning)).requires_grad_()
        free = bias.clone().requires_grad_()
        gradients = torch.autograd.grad(nn.functional.mse_loss(nn.functional.linear(x, shown, free), y), [shown, free])
        learning, bias = learning.detach() - 0.5 * gradients[0], bias - 0.5 * gradients[1]
    course = StraightThrough({"*": projection})
    sp.fit(model, batches(), nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.5), 1, courses=[course], progress=False)
    torch.testing.assert_close(model.weight.detach(), projection(learning))
    torch.testing.assert_close(model.bias.detach(), bias)


def trained(course: Any) -> tuple[nn.Module, float]:
    model = network()
    sp.fit(model, batches(), nn.MSELoss(), torch.optim.Adam(model.parameters(), 0.02), 20, progress=False)
    sp.fit(model, batches(), nn.MSELoss(), torch.optim.Adam(model.parameters(), 0.003), 20, courses=[course], progress=False)
    return model, sp.evaluate(model, batches(), nn.MSELoss())["loss"]


def test_it_learns_levels_better_than_rounding_at_once() -> None:
    patterns = {"*": Levels(2)}
    model, loss = trained(StraightThrough(patterns, end=0.8))
    assert all(len(p.unique()) <= 3 for p in model.parameters() if p.dim() > 1)
    assert loss < 0.8 * trained(OneShot(patterns))[1]


def test_pruned_weights_come_back_until_the_end_and_not_later() -> None:
    zeros = []
    note = lambda epoch, line, model: zeros.append(model[0].weight == 0)  # noqa: E731
    model = network()
    course = StraightThrough({"0": TopK(60)}, begin=0.1, end=0.5)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    sp.fit(model, batches(), nn.MSELoss(), optimizer, 10, courses=[course], callbacks=[note], progress=False)
    assert [int(mask.sum()) for mask in zeros] == [192 - 60] * 10
    assert not torch.equal(zeros[0], zeros[3])
    assert all(torch.equal(zeros[4], mask) for mask in zeros[5:])
    assert not optimizer.state[model[0].weight]["exp_avg"][zeros[-1]].any()


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(SettingError, match=r"^StraightThrough: begin and end"):
        StraightThrough({"*": TopK(1)}, begin=0.5, end=0.5)
    with pytest.raises(SettingError, match=r"^StraightThrough: patterns"):
        StraightThrough({"fc": TopK(1)}).start(network(), None, 3)
