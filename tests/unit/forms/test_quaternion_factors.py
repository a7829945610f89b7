"""Quaternion layers multiply as quaternions do; their form is cut to what is nearest, also in metrics; networks of them go through."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.forms import QuaternionFactors
from spectrim.linalg.quaternion import Quaternions
from spectrim.linalg.spectral import orthogonality_defect
from spectrim.plain.chain import PlainPair
from spectrim.plain.quaternion import QConv2d, QLinear, hamilton

EVERYTHING = sp.match("*")


def held(m: int, n: int) -> QuaternionFactors:
    weight = torch.randn(4 * m, n).double()
    return QuaternionFactors.of(weight, weight)


def test_a_linear_layer_multiplies_quaternions() -> None:
    """Features are all real parts first, then those of i, j and k."""
    layer, x = QLinear(8, 12).double(), torch.randn(8).double()
    W, q = Quaternions.of_column(layer.weight.detach()), Quaternions.of_column(x[:, None])
    assert layer.bias is not None
    torch.testing.assert_close(layer(x), (W @ q).column()[:, 0] + layer.bias)


def test_one_product_by_hand() -> None:
    """``(1 + 2 i) (3 j + k) = 3 j + k + 6 k - 2 j = j + 7 k``."""
    layer = QLinear(4, 4, bias=False)
    layer.weight.data = torch.tensor([[1.0], [2.0], [0.0], [0.0]])
    assert layer(torch.tensor([0.0, 0.0, 3.0, 1.0])).tolist() == [0.0, 0.0, 1.0, 7.0]


def error_in(form: QuaternionFactors, cut: QuaternionFactors, left: Tensor | None, right: Tensor | None) -> float:
    D = hamilton((form.matrix() - cut.matrix()).detach())
    D = D if left is None else torch.linalg.cholesky(left).mT @ D
    return float((D if right is None else D @ torch.linalg.cholesky(right)).square().sum())


@pytest.mark.parametrize("side", ["outputs", "inputs"])
def test_a_cut_in_a_metric_of_real_features_is_the_best_of_quaternions(side: str) -> None:
    """Descent on both factors from several starts finds nothing nearer, and the distortion is what the real layer loses."""
    form, width = held(5, 6), 20 if side == "outputs" else 24
    spread = torch.randn(width, width).double() * torch.linspace(0.1, 3, width).double()
    metric = spread @ spread.mT + 0.01 * torch.eye(width).double()
    metrics = (metric, None) if side == "outputs" else (None, metric)
    cut = form.cut_to(2, *metrics)
    own = error_in(form, cut, *metrics)
    assert own == pytest.approx(float(form.tail(*metrics)[2]), rel=1e-9)
    assert own < 0.99 * error_in(form, form.cut_to(2), *metrics)
    root = torch.linalg.cholesky(metric)
    target = hamilton(form.matrix().detach())
    for seed in range(2):
        torch.manual_seed(seed)
        A, B = torch.randn(20, 2).double().requires_grad_(), torch.randn(8, 6).double().requires_grad_()
        optimizer = torch.optim.LBFGS([A, B], max_iter=300, line_search_fn="strong_wolfe")

        def loss(A: Tensor = A, B: Tensor = B, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            D = hamilton(hamilton(A) @ B) - target
            value = (root.mT @ D if side == "outputs" else D @ root).square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        assert own <= float(loss().detach()) * (1 + 1e-6)


def test_retraction_keeps_quaternions_and_the_weight() -> None:
    form = held(6, 7).cut_to(3)
    with torch.no_grad():
        for part in form.parameters():
            part.mul_(1.01).add_(torch.randn_like(part), alpha=1e-3)
    before, defects = form.matrix().detach(), [orthogonality_defect(side) for side in form.sides()]
    form.retract_()
    for side, defect in zip(form.sides(), defects, strict=True):
        assert orthogonality_defect(side) <= defect**2
    assert float((form.matrix() - before).detach().norm()) < 0.02 * float(before.norm())


def test_moments_of_gradients_follow_a_cut() -> None:
    """Columns and rows times a unit quaternion each hold the same weight, and the turns take them to those of the decomposition."""
    form = held(5, 6)
    units = torch.randn(4, 5).double()
    units = Quaternions.of(*(torch.diag(part) for part in units / units.norm(dim=0)))
    U, S, Vh = form.parts()
    turned = form.like(U @ hamilton(units.column()), S, hamilton(units.column()).mT @ Vh)
    torch.testing.assert_close(turned.matrix(), form.matrix())
    new = turned.cut_to(3)
    turns = turned.turns(new)
    torch.testing.assert_close(turned.parts()[0] @ turns["U"][1], new.parts()[0])
    torch.testing.assert_close(turns["Vh"][0].mT @ turned.parts()[2], new.parts()[2])
    torch.testing.assert_close(turns["S"][0], torch.eye(5).double()[:, :3])


def network() -> nn.Sequential:
    pooled = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), QLinear(64, 32), nn.ReLU(), nn.Linear(32, 4)]
    return nn.Sequential(QConv2d(4, 16, 3, padding=1), nn.ReLU(), QConv2d(16, 16, 3, 2, 1), nn.ReLU(), *pooled)


def test_a_network_goes_through_every_verb(tmp_path: Path) -> None:
    dense, loss = network(), nn.CrossEntropyLoss()
    data = [(torch.randn(16, 4, 8, 8), torch.arange(16) % 4) for _ in range(2)]
    x = data[0][0]
    low = sp.factorize(dense, rank=4)
    optimizer = torch.optim.Adam(low.parameters(), 1e-3)
    penalties = [sp.Orthogonality(1.0), sp.Hoyer(0.01)]
    history = sp.fit(low, data, loss, optimizer, epochs=2, penalties=penalties, progress=False)
    assert history.last["loss"] > 0
    sp.prune_(low, {"2": 3}, optimizer)
    sp.fit(low, data, loss, optimizer, epochs=1, progress=False)
    full, budget = sp.factorize(dense), sp.Budget(params=0.7)
    cut = sp.prune(full, sp.allocate(full, budget, x), calibration=sp.calibrate(full, data, loss))
    merged = sp.merge(cut)
    torch.testing.assert_close(merged(x), cut(x))
    numbers = [sum(parameter.numel() for parameter in model.parameters()) for model in (merged, dense)]
    assert 0.5 < numbers[0] / numbers[1] <= 0.7
    assert any(isinstance(layer, PlainPair) for layer in merged.modules())
    for model, name in ((low, "low"), (merged, "merged")):
        sp.save(model, tmp_path / name)
        assert torch.equal(sp.load(tmp_path / name, dense)(x), model(x))


def test_a_merged_pair_has_the_attributes_of_its_layer() -> None:
    low = sp.factorize(QConv2d(8, 16, 3, 2, 1), where=EVERYTHING, rank=1)
    pair = sp.merge(low)
    assert isinstance(pair, PlainPair)
    assert isinstance(pair, QConv2d)
    assert (pair.in_channels, pair.out_channels, pair.kernel_size, pair.stride) == (8, 16, (3, 3), (2, 2))
    torch.testing.assert_close(pair.weight + 0, low.weight + 0)  # composed
    torch.testing.assert_close(pair.real_weight(), hamilton(low.weight + 0))


def test_sizes_that_are_no_quaternions_are_refused() -> None:
    for make in (lambda: QLinear(6, 8), lambda: QConv2d(4, 6, 3), lambda: QLinear(0, 4)):
        with pytest.raises(ValueError, match="must be a positive multiple of 4"):
            make()
    with pytest.raises(ValueError, match="one number, or 2 of them"):
        QConv2d(4, 4, (3, 3, 3))
