"""Digests of what functions, objects and networks do."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectrim.pipeline.behavior import attributes_of, of_network, of_value


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


def test_state_of_earlier_calls_is_no_setting() -> None:
    loss, before = Custom(1.0), of_value(Custom(1.0))
    loss(torch.ones(2), torch.ones(2))
    assert of_value(loss) == before
    assert of_value(Stopping(3)) == of_value(Stopping(1000))


def test_a_network_is_its_code_and_settings_beside_its_weights() -> None:
    class Net(nn.Module):
        def __init__(self, scale: float = 1.0, act: type[nn.Module] = nn.ReLU, p: float = 0.1) -> None:
            super().__init__()
            self.layer, self.act, self.drop, self.scale, self.calls = nn.Linear(2, 2), act(), nn.Dropout(p), scale, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.drop(self.act(self.layer(x))) * self.scale

    class Other(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    def told(net: nn.Module) -> str:
        before = attributes_of(net)
        net(torch.zeros(1, 2))
        return of_network(net, before)

    frozen = Net()
    frozen.layer.requires_grad_(False)
    networks = [Net(), Net(2.0), Net(act=nn.GELU), Net(p=0.5), Other(), frozen]
    assert len({told(net) for net in networks}) == len(networks)
    once = Net()
    assert told(once) == told(once) == told(Net())


def test_digests_do_not_depend_on_the_order_of_sets() -> None:
    assert list({0, 8}) != list({8, 0})
    assert of_value({0, 8}) == of_value({8, 0}) != of_value({0, 7})
