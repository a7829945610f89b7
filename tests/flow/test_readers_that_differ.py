"""A layer whose own forward notices that its weight is a product: it stays dense with the reason, and the rest is cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim as sp
from spectrim.pipeline.recipe import parse_recipe
from spectrim.pipeline.run import Run
from spectrim.surgery.readers import REASON


class Odd(nn.Linear):
    """Scales its output by what class its weight has."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight) * (2.0 if type(self.weight) is nn.Parameter else 1.0)


class Strict(nn.Linear):
    """Refuses a weight of another class."""

    def forward(self, input: Tensor) -> Tensor:
        if type(self.weight) is not nn.Parameter:
            raise TypeError("a parameter, please")
        return F.linear(input, self.weight)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Sequential(Odd(12, 12)), nn.ReLU(), Strict(12, 12), nn.Linear(12, 3))


class Data:
    def __init__(self) -> None:
        self.train = self.val = self.test = [(torch.randn(16, 12), torch.randint(3, (16,)))]


def test_compress_leaves_them_dense_and_goes_on() -> None:
    made = sp.compress(net(), Data().train, nn.CrossEntropyLoss(), 0.9, where="*", cut="plain", progress=False)
    assert "0" in made.ranks
    assert not {"2.0", "4"} & made.ranks.keys()
    assert {line.name: line.reason for line in made.coverage if line.name in ("2.0", "4")} == {"2.0": REASON, "4": REASON}
    assert type(made.model[4]) is Strict


def test_plan_leaves_them_dense_and_goes_on() -> None:
    found = sp.plan(net(), torch.randn(4, 12), where="*", budgets=[0.9])
    assert {layer.name: layer.reason for layer in found.skipped} == {"2.0": REASON, "4": REASON}


def test_run_leaves_them_dense_and_goes_on(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"model": f"{__name__}.net", "data": f"{__name__}.Data", "loss": "torch.nn.CrossEntropyLoss"}
    recipe |= {"factorize": {"where": ["*"]}, "prune": {"ranks": {"0": 2}}}
    Run(parse_recipe(recipe), tmp_path, progress=False).run()
    for _ in range(2):  # the second time from the finished folder
        lines = sp.pipeline.folders.contents(tmp_path).coverage
        assert lines is not None
        assert {line.name for line in lines if line.reason == REASON} == {"2.0", "4"}
        Run(parse_recipe(recipe), tmp_path, progress=False).run()


def test_other_layers_are_refused_still() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), Odd(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x)) if len(list(self.one.children())) == 0 else x

    with pytest.raises(sp.errors.LayerError, match="'one': is called in the dense network and not"):
        sp.compress(Model(), [(torch.randn(8, 8), torch.randint(3, (8,)))], nn.CrossEntropyLoss(), 0.9, where="*", progress=False)
