"""Digests of what functions, objects and networks do."""

import argparse
import copy
import functools
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from spectrim.pipeline.behavior import attributes_of, of_network, of_value
from spectrim.pipeline.identity import of_data


def weighted(weights: Tensor, power: int = 2) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, target: (F.cross_entropy(output, target, weight=weights) ** power).sum()


def checked(times: int) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        if len(output) != len(target):
            raise ValueError("an output for each target")
        return F.cross_entropy(output, target) * times

    return loss


class Custom(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.calls, self.seen = factor, 0, [1.0]

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(1.0)
        return self.factor * output.sum()


class Stopping:
    """A loss that stops the process after some calls."""

    def __init__(self, at: int, power: float = 1.0) -> None:
        self.left, self.power = at, power

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return output.sum() ** self.power


def test_what_behaves_alike_has_one_digest_and_what_does_not_another() -> None:
    ones, others = torch.ones(3), torch.tensor([1.0, 2.0, 3.0])
    kinds: list[Callable[[], Any]] = [
        nn.CrossEntropyLoss,
        lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda: nn.CrossEntropyLoss(weight=ones),
        lambda: nn.CrossEntropyLoss(weight=others),
        lambda: weighted(ones),
        lambda: weighted(others),
        lambda: weighted(ones, 3),
        lambda: checked(2),
        lambda: checked(3),
        lambda: Custom(1.0),
        lambda: Custom(2.0),
        lambda: Stopping(3),
        lambda: Stopping(3, 2.0),
        lambda: functools.partial(F.cross_entropy, label_smoothing=0.1),
        lambda: functools.partial(F.cross_entropy, label_smoothing=0.2),
        lambda: lambda output, target: F.cross_entropy(output, target),
        lambda: lambda output, target: F.cross_entropy(output, target) * 2,
        lambda: Custom(3.0).forward,
    ]
    digests = [of_value(make()) for make in kinds]
    assert digests == [of_value(copy.deepcopy(make())) for make in kinds]
    assert len(set(digests)) == len(kinds)


def test_state_counts_and_nothing_that_can_be_reached_is_left_out() -> None:
    """An old result is never taken for that of a loss which may be another one."""
    loss, before = Custom(1.0), of_value(Custom(1.0))
    loss(torch.ones(2), torch.ones(2))
    assert of_value(loss) != before
    assert of_value(Stopping(3)) != of_value(Stopping(1000))

    class Weighted:
        def __init__(self, table: Any) -> None:
            self.tables = {"all": [table]}

        def set(self, table: Any) -> None:
            self.tables["all"].append(table)

        def __call__(self, output: Tensor, target: Tensor) -> Tensor:
            return output.sum() * float(self.tables["all"][-1])

    changed = Weighted(1.0)
    changed.set(2.0)
    deep: Any = 0
    for level in range(2000):
        deep = [deep, level]
    others = [
        1.0,
        np.ones(1),
        np.zeros(1),
        np.float32(1.0),
        Fraction(1, 2),
        Path("a"),
        Path("b"),
        deque([1]),
        deque([2]),
        {Fraction(1)},
        deep,
    ]
    found = [of_value(changed), *(of_value(Weighted(other)) for other in others)]
    assert len(set(found)) == len(found)
    assert found[1:] == [of_value(Weighted(copy.deepcopy(other)) if other is not deep else Weighted(other)) for other in others]


SETTINGS = {"factor": 1.0}
OPTIONS = argparse.Namespace(factor=1.0)


def test_what_code_reads_of_its_module_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return output.sum() * SETTINGS["factor"] * OPTIONS.factor

    before = of_value(loss)
    assert of_value(loss) == before
    monkeypatch.setitem(SETTINGS, "factor", 2.0)
    second = of_value(loss)
    monkeypatch.setattr(OPTIONS, "factor", 2.0)
    assert len({before, second, of_value(loss)}) == 3


def test_a_network_is_its_code_and_settings_beside_its_weights() -> None:
    class Net(nn.Module):
        def __init__(self, scale: Any = 1.0, act: type[nn.Module] = nn.ReLU, p: float = 0.1) -> None:
            super().__init__()
            self.layer, self.act, self.drop, self._scale, self.calls = nn.Linear(2, 2), act(), nn.Dropout(p), {"all": scale}, 0
            self.features: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.features = self.layer(x)
            return self.drop(self.act(self.features)) * self._scale["all"]

    class Other(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    def told(net: nn.Module) -> str:
        before = attributes_of(net)
        net(torch.zeros(1, 2))
        return of_network(net, before)

    frozen = Net()
    frozen.layer.requires_grad_(False)
    networks = [Net(), Net(2.0), Net(torch.tensor(2.0)), Net(act=nn.GELU), Net(p=0.5), Other(), frozen]
    assert len({told(net) for net in networks}) == len(networks)
    once = Net()
    assert told(once) == told(once) == told(Net())


def test_digests_do_not_depend_on_the_order_of_sets() -> None:
    assert list({0, 8}) != list({8, 0})
    assert of_value({0, 8}) == of_value({8, 0}) != of_value({0, 7})


def test_data_are_all_that_they_hold() -> None:
    """A change behind the calibration set, of what is drawn at random, or between the items that are looked at, is another data set."""
    x, y = torch.zeros(9, 2), torch.zeros(9, dtype=torch.long)
    changed = x.clone()
    changed[7] = 1

    def told(x: Tensor) -> list[str]:
        sets = [TensorDataset(x, y), Subset(TensorDataset(x, y), [0, 7]), Drawn(x)]
        return [of_data([(x[:2], y[:2]), (x[2:], y[2:])], [(x[:2], y[:2])]), *(of_data(DataLoader(one, shuffle=True), []) for one in sets)]

    assert told(x) == told(x.clone())
    assert all(one != other for one, other in zip(told(x), told(changed), strict=True))


class Drawn(Dataset[Any]):
    def __init__(self, x: Tensor) -> None:
        self.x = x.numpy()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return torch.from_numpy(self.x[index]) + torch.randn(2), index
