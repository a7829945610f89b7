"""`eliminate` and `refitted`: costs are those of the refit, exactly."""

import itertools

import pytest
import torch

from spectrim.errors import SettingError
from spectrim.linalg.elimination import STEPS, eliminate, refitted


def parts(out: int, units: int, taps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(units)
    weight = torch.randn(out, units * taps, generator=generator, dtype=torch.float64)
    rows = torch.randn(4 * units * taps, units * taps, generator=generator, dtype=torch.float64)
    mixed = rows + 0.2 * rows @ torch.randn(units * taps, units * taps, generator=generator, dtype=torch.float64)
    grads = torch.randn(3 * out, out, generator=generator, dtype=torch.float64)
    return weight, mixed.mT @ mixed / len(mixed), grads.mT @ grads / len(grads)


def change(weight: torch.Tensor, moment: torch.Tensor, metric: torch.Tensor, kept: torch.Tensor, taps: int) -> float:
    columns = (kept[:, None] * taps + torch.arange(taps)).flatten()
    difference = weight.clone()
    difference[:, columns] -= refitted(weight, moment, columns)
    return float(torch.trace(metric @ difference @ moment @ difference.mT))


@pytest.mark.parametrize("taps", [1, 4])
def test_errors_are_those_of_the_refitted_weight_at_each_width(taps: int) -> None:
    weight, moment, metric = parts(5, 9, taps)
    found = eliminate(weight, moment, metric, taps=taps)
    assert found.widths == tuple(range(9, 0, -1))
    assert sorted(found.order.tolist()) == list(range(9))
    for width, error in zip(found.widths, found.errors, strict=True):
        assert error == pytest.approx(change(weight, moment, metric, found.kept(width), taps), rel=2e-3, abs=1e-6)


def test_the_first_unit_is_the_one_whose_loss_changes_the_outputs_least() -> None:
    weight, moment, metric = parts(4, 7, 2)
    others = {gone: change(weight, moment, metric, torch.tensor([unit for unit in range(7) if unit != gone]), 2) for gone in range(7)}
    assert int(eliminate(weight, moment, metric, taps=2).order[0]) == min(others, key=others.__getitem__)


def test_units_that_repeat_others_or_never_fire_cost_nothing() -> None:
    rows = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([rows, rows[:, :2], torch.zeros(200, 1, dtype=torch.float64)], 1)
    weight = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = eliminate(weight, rows.mT @ rows)
    whole = float(((rows @ weight.mT) ** 2).sum())
    assert found.errors[3] < 1e-4 * whole < 1e-2 * whole < found.errors[4]


def test_many_units_go_several_at_a_time_and_the_error_is_still_that_of_the_refit() -> None:
    weight, moment, metric = parts(3, 2 * STEPS, 1)
    found = eliminate(weight, moment, metric, fewest=5)
    assert len(found.widths) <= STEPS + 1
    assert found.widths[-1] == 5
    assert all(large - small == 2 for large, small in itertools.pairwise(found.widths[:-1]))
    middle = len(found.widths) // 2
    assert found.errors[middle] == pytest.approx(change(weight, moment, metric, found.kept(found.widths[middle]), 1), rel=1e-3)


def test_what_is_no_unit_is_refused() -> None:
    with pytest.raises(SettingError, match="moment must be of 6 columns"):
        eliminate(torch.zeros(2, 6), torch.eye(5))
    with pytest.raises(SettingError, match="4 for each unit"):
        eliminate(torch.zeros(2, 6), torch.eye(6), taps=4)
    with pytest.raises(SettingError, match="width"):
        eliminate(torch.ones(2, 3), torch.eye(3)).kept(4)
