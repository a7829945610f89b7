"""`tap`: what a layer meets is seen inside a forward of its own, and inside the hooks of others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spectrim as sp
from spectrim.budget.costs import calls
from spectrim.layers.taps import tap
from spectrim.surgery.correct import correct

LOSS = nn.CrossEntropyLoss()
Step = Callable[[Any], Any]
BOTH: dict[str, tuple[Step, Step]] = {
    "prepares": (lambda x: 3 * x, lambda y: y),
    "changes its output": (lambda x: x, lambda y: 5 * y.relu()),
    "turns axes": (lambda x: x.flip(1), lambda y: y.transpose(1, 2)),
    "returns several": (lambda x: x, lambda y: {"y": y}),
}


def own_linear(before: Step, after: Step) -> type[nn.Linear]:
    class Own(nn.Linear):
        def forward(self, input: dict[str, Tensor]) -> Any:  # type: ignore[override]
            return after(super().forward(before(input["x"])))

    return Own


class Around(nn.Module):
    """Calls a plain layer as `own_linear` does."""

    def __init__(self, layer: nn.Module, before: Step, after: Step) -> None:
        super().__init__()
        self.layer, self.steps = layer, (before, after)

    def forward(self, input: dict[str, Tensor]) -> Any:
        return self.steps[1](self.layer(self.steps[0](input["x"])))


class Net(nn.Module):
    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.first, self.own, self.head = nn.Linear(8, 8), own, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.own({"x": self.first(x).relu()})
        y = y["y"] if isinstance(y, dict) else y
        return self.head(y if y.shape[-1] == 8 else y.transpose(1, 2)).mean(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", BOTH)
def test_a_forward_around_that_of_torch_changes_nothing_that_is_measured(case: str) -> None:
    before, after = BOTH[case]
    torch.manual_seed(0)
    own = Net(own_linear(before, after)(8, 8))
    plain = Net(Around(nn.Linear(8, 8), before, after))
    plain.load_state_dict({name.replace("own.", "own.layer."): value for name, value in own.state_dict().items()})
    data = [(torch.randn(4, 5, 8), torch.randint(3, (4,))) for _ in range(2)]
    assert torch.equal(own(data[0][0]), plain(data[0][0]))
    lows = [sp.factorize(net, where=["own"]) for net in (own, plain)]
    found, wanted = (sp.calibrate(low, data, LOSS) for low in lows)
    for mine, its in ((found.inputs, wanted.inputs), (found.outputs, wanted.outputs), (found.slopes, wanted.slopes)):
        torch.testing.assert_close(mine["own"], its["own.layer"])
    shapes = [[call.shape for call in calls(low, data[0][0])] for low in lows]
    assert shapes[0] == shapes[1] == [(4, 5, 8)]
    cuts = [sp.prune(low, sp.budget.Fixed(3)) for low in lows]
    fitted, same = (correct(cut, dense, data)(data[0][0]) for cut, dense in zip(cuts, (own, plain), strict=True))
    torch.testing.assert_close(fitted, same)
    assert not torch.allclose(fitted, cuts[0](data[0][0]))


@pytest.mark.parametrize("merged", [False, True])
def test_hooks_of_others_run_outside(merged: bool) -> None:
    low: Any = sp.factorize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), where=["0"])
    net: Any = sp.merge(sp.prune(low, sp.budget.Fixed(1))) if merged else low
    net[0].register_forward_pre_hook(lambda layer, args: (2 * args[0],))
    net[0].register_forward_hook(lambda layer, args, output: output + 1)
    kind, seen = type(net[0]), list[Tensor]()
    taps = [tap(net[0], after=lambda layer, args, kwargs, output: seen.extend((args[0], output))) for _ in range(2)]
    y = net(torch.ones(4))
    for each in taps:
        each.remove()
    assert type(net[0]) is kind
    assert len(seen) == 4
    assert torch.equal(seen[0], torch.full((4,), 2.0))
    torch.testing.assert_close(net[1](seen[1] + 1), y)


def test_padding_in_a_forward_of_its_own_is_what_the_kernel_meets() -> None:
    class Same(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(F.pad(input, (1, 1, 1, 1)))

    torch.manual_seed(0)
    own, plain = nn.Sequential(Same(4, 6, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
    plain.load_state_dict(own.state_dict())
    data = [torch.randn(2, 4, 3, 2)]
    found, wanted = (sp.calibrate(sp.factorize(net, scheme="channel", where=["0"]), data) for net in (own, plain))
    torch.testing.assert_close(found.inputs["0"], wanted.inputs["0"])
