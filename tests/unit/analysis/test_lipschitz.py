"""Bounds are above what networks do, exact where they are linear, and refuse what they do not know."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim as sp
from spectrim.analysis.lipschitz import lipschitz_bound, lipschitz_lower
from spectrim.errors import LayerError


def normalized(model: nn.Module, x: Tensor) -> nn.Module:
    """Give BatchNorm statistics and parameters of their own."""
    model.train()(x)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
    return model.eval()


class Block(nn.Module):
    """A residual block with a strided shortcut that adds channels, as ResNets for CIFAR have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Any) -> Any:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3, padding=1), Block(), nn.Linear(16, 5)

    def forward(self, x: Any) -> Any:
        return self.head(self.block(F.relu(self.stem(x))).mean((2, 3)))


def convolutional() -> nn.Module:
    first, second = nn.Conv2d(3, 8, 5, padding=2), nn.Conv2d(8, 12, 3, padding=1, groups=2)
    layers = [first, nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), second, nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(48, 24), nn.LeakyReLU(), nn.Dropout(), nn.Linear(24, 5))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"convolutional": convolutional, "residual": Classifier}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_bound_is_above_every_slope_also_after_compression(name: str) -> None:
    shape = (4, 3, 8, 8)
    x = torch.randn(shape)
    model = normalized(NETWORKS[name](), x)
    low = sp.factorize(model)
    cut = sp.prune(low, sp.allocate(low, sp.Budget(macs=0.5), x[:1]))
    bounds = {}
    for label, network in {"dense": model, "factorized": low, "cut": cut, "merged": sp.merge(cut)}.items():
        made = lipschitz_bound(network, x, grid=8)
        y = x + 0.1 * torch.randn(shape)
        with torch.no_grad():
            slopes = (network(x) - network(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
        assert max(float(slopes.max()), lipschitz_lower(network, x[:1])) <= made.bound
        assert made.layers[-1].path <= made.bound * (1 + 1e-9)
        bounds[label] = made.bound
    assert bounds["dense"] == pytest.approx(bounds["factorized"], rel=1e-5)
    assert bounds["cut"] == pytest.approx(bounds["merged"], rel=1e-5)


def test_of_a_linear_network_of_one_layer_the_bound_is_the_norm() -> None:
    layer = nn.Linear(5, 4)
    norm = float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
    assert lipschitz_bound(layer, torch.zeros(1, 5)).bound == pytest.approx(norm)
    assert lipschitz_lower(layer, torch.zeros(1, 5)) == pytest.approx(norm)


class Joined(nn.Module):
    """Two branches that are added and concatenated, then averaged: constants 2 and 3 by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.three = (nn.Conv2d(1, 1, 1, bias=False) for _ in range(2))
        for layer, value in ((self.two, 2.0), (self.three, 3.0)):
            nn.init.constant_(layer.weight, value)

    def forward(self, x: Any) -> Any:
        a, b = F.relu(self.two(x)), self.three(x)
        return torch.cat([a + b, 0.5 * F.max_pool2d(F.pad(b, (0, 0)), 1)], 1).mean((2, 3))


def test_joined_branches_by_hand() -> None:
    """Added 2 + 3 = 5, concatenated with 1.5: ``sqrt(25 + 2.25)``, mean over 4 pixels: half of it."""
    made = lipschitz_bound(Joined(), torch.zeros(1, 1, 2, 2))
    assert made.bound == pytest.approx(math.sqrt(25 + 2.25) / 2)
    assert [layer.name for layer in made.layers] == ["two", "three"]


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 1, 1),
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, 2, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.AdaptiveAvgPool2d((1, None)),
        nn.GELU(),
        nn.SiLU(),
    ],
)
def test_modules_without_weights_are_bounded(pool: nn.Module) -> None:
    pool.double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(pool, x)
    norm = float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2))  # type: ignore[union-attr]
    assert norm <= lipschitz_bound(nn.Sequential(pool), x.detach()).bound * (1 + 1e-12)


def test_a_batchnorm_is_multiplied_into_the_layer_before_it() -> None:
    """Scales 1/2 and 4 on channels of norm 4 and 1/2: the product has norm 2, the two bounds alone 16."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, eps=0.0)).double().eval()
    model[0].weight.data = torch.diag(torch.tensor([4.0, 0.5])).double()
    model[1].weight.data = torch.tensor([0.5, 4.0]).double()
    assert lipschitz_bound(model, torch.zeros(1, 2).double()).bound == pytest.approx(2.0)
    assert lipschitz_bound(model[1], torch.zeros(1, 2).double()).bound == pytest.approx(4.0)


def test_radii_are_margins_over_the_bound() -> None:
    made = lipschitz_bound(nn.Identity(), torch.zeros(1, 3))
    output, target = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 0.0], [5.0, 1.0, 9.0]]), torch.tensor([0, 1, 0])
    torch.testing.assert_close(made.radius(output, target), torch.tensor([2.0, 1.0, 0.0]) / math.sqrt(2))
    assert "network" in lipschitz_bound(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3)).table()


def test_no_image_within_the_radius_changes_its_class() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).eval()
    x = torch.randn(64, 1, 4, 4)
    with torch.no_grad():
        target = model(x).argmax(1)
        radius = lipschitz_bound(model, x).radius(model(x), target)
    moved = x.clone().requires_grad_()
    F.cross_entropy(model(moved), target).backward()
    direction = moved.grad / moved.grad.flatten(1).norm(dim=1)[:, None, None, None]
    assert torch.equal(model(x + 0.999 * radius[:, None, None, None] * direction).argmax(1), target)


class Repeated(nn.Module):
    def __init__(self, forward: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = forward

    def forward(self, x: Any) -> Any:
        return self.function(x)


def test_a_tensor_that_is_used_twice_counts_twice() -> None:
    x = torch.zeros(1, 2)
    assert lipschitz_bound(Repeated(lambda x: x + x), x).bound == 2
    assert lipschitz_bound(Repeated(lambda x: x - x), x).bound == 2
    assert lipschitz_bound(Repeated(lambda x: torch.cat([x, x], 1)), x).bound == pytest.approx(math.sqrt(2))
    for refused in (
        lambda x: x[:, [0, 0]],
        lambda x: torch.add(x, x, alpha=3),
        lambda x: F.dropout(x, 0.5),
        lambda x: F.dropout(x, 0.5, True),
    ):
        with pytest.raises(LayerError):
            lipschitz_bound(Repeated(refused), x)
    assert lipschitz_bound(Repeated(lambda x: F.dropout(x, 0.5, False)), x).bound == 1


def test_what_is_not_known_is_refused_by_name() -> None:
    class Squared(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * x

    with pytest.raises(LayerError, match="layer 'mul': calls mul"):
        lipschitz_bound(Squared(), torch.zeros(1, 2))
    with pytest.raises(LayerError, match="layer '1': is a LayerNorm"):
        lipschitz_bound(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), torch.zeros(1, 2))
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    lipschitz_bound(model, torch.zeros(1, 2))
    assert model.training
