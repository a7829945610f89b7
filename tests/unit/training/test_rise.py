"""A penalty whose strength rises."""

from typing import Any

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.penalties import L1
from spectrim.training.rise import Rise


def test_the_penalty_rises_from_zero_and_stays() -> None:
    torch.manual_seed(0)
    low, x = sp.factorize(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))), torch.randn(4, 6)
    optimizer = torch.optim.SGD(low.parameters(), 0.0)
    data = [(x, torch.zeros(4, 2))]
    history = sp.fit(low, data, nn.MSELoss(), optimizer, 8, courses=[Rise(L1(0.1), end=0.5)], progress=False)
    full = float(L1(0.1)(low).detach())
    assert [line["Rise"] / full for line in history.epochs] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1, 1])


def test_settings_are_checked() -> None:
    assert Rise(L1(0.1)) == Rise(L1(0.1), 0.5)
    wrong: Any
    for wrong in (0.0, 1.5):
        with pytest.raises(SettingError, match=r"Rise: end must be a share in \(0, 1\]"):
            Rise(L1(0.1), end=wrong)
