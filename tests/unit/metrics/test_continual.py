"""Measures of continual learning, by hand."""

import pytest
import torch

from spectrim.errors import SettingError
from spectrim.metrics.continual import average_accuracy, backward_transfer, forgetting, forward_transfer

R = torch.tensor([[0.9, 0.2, 0.1], [0.8, 0.7, 0.4], [0.5, 0.6, 0.95]], dtype=torch.float64)
NAN = float("nan")


def test_by_hand() -> None:
    assert average_accuracy(R) == pytest.approx((0.5 + 0.6 + 0.95) / 3)
    assert forgetting(R) == pytest.approx(((0.9 - 0.5) + (0.7 - 0.6)) / 2)
    assert backward_transfer(R) == -forgetting(R)
    assert forward_transfer(R, torch.tensor([0.5, 0.1, 0.1])) == pytest.approx(((0.2 - 0.1) + (0.4 - 0.1)) / 2)


def test_what_is_not_read_may_be_unknown() -> None:
    known = torch.tensor([[0.9, NAN], [0.8, 0.7]])
    assert forgetting(known) == pytest.approx(0.1)
    with pytest.raises(SettingError, match="forward_transfer: R must be known wherever the measure reads it"):
        forward_transfer(known, torch.zeros(2))


@pytest.mark.parametrize("measure", [forgetting, backward_transfer])
def test_one_task_is_too_few(measure: object) -> None:
    with pytest.raises(SettingError, match="at least two tasks"):
        measure(torch.ones(1, 1))  # type: ignore[operator]
    with pytest.raises(SettingError, match="at least one task"):
        average_accuracy(torch.ones(0, 0))
