"""The metrics are those of the definitions, whatever the batches; a simplex has collapsed; compression to C - 1 directions keeps it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.analysis.collapse import ClassMoments, LogCollapse, from_simplex, geometry, neural_collapse
from spectrim.errors import LayerError, SettingError

CLASSES, WIDTH = 4, 7


def simplex(classes: int = CLASSES, width: int = WIDTH) -> Tensor:
    """Return the corners of a simplex in some subspace, ``(classes, width)``."""
    basis = torch.linalg.qr(torch.randn(width, classes).double()).Q
    return (torch.eye(classes).double() - 1 / classes) @ basis.mT


def data(batches: int = 3, each: int = 40) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    x, y = torch.randn(batches * each, WIDTH).double(), torch.arange(batches * each) % CLASSES
    return list(zip((x + y[:, None]).split(each), y.split(each), strict=True))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)).double()


def by_definition(features: Tensor, target: Tensor, weight: Tensor) -> dict[str, float]:
    """Return NC1 to NC3 by loops over classes and a pseudo-inverse."""
    means = torch.stack([features[target == c].mean(0) for c in range(CLASSES)])
    centered = means - means.mean(0)
    between = sum(torch.outer(m, m) for m in centered) / CLASSES
    deviations = features - means[target]
    within = deviations.mT @ deviations / len(features)
    ideal = (torch.eye(CLASSES) - 1 / CLASSES).double() / math.sqrt(CLASSES - 1)
    product = weight @ centered.mT
    gram = centered @ centered.mT
    return {
        "nc1": float(torch.trace(within @ torch.linalg.pinv(between, rtol=1e-9))) / CLASSES,
        "nc2": float((gram / gram.norm() - ideal).norm()),
        "nc3": float((product / product.norm() - ideal).norm()),
    }


def test_metrics_are_those_of_the_definitions_whatever_the_batches() -> None:
    model, batches = network(), data()
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    with torch.no_grad():
        features, output = model[:2](x), model(x)
    expected = by_definition(features, y, model[2].weight.detach())
    means = torch.stack([features[y == c].mean(0) for c in range(CLASSES)])
    nearest = (features[:, None] - means).square().sum(2).argmin(1)
    for split in (batches, [(x, y)], list(zip(x.split(7), y.split(7), strict=True))):
        measured = neural_collapse(model, split)
        assert {name: getattr(measured, name) for name in expected} == pytest.approx(expected, rel=1e-8)
        assert measured.nc4 == pytest.approx(float((output.argmax(1) != nearest).double().mean()))
        assert measured.accuracy == pytest.approx(float((output.argmax(1) == y).double().mean()))
    assert 1 <= measured.effective_rank <= WIDTH


def test_a_simplex_has_collapsed_and_noise_opens_it() -> None:
    corners = simplex()
    target = torch.arange(200) % CLASSES
    found = []
    for noise in (0.0, 0.01, 0.1):
        moments = ClassMoments()
        moments.add(corners[target] + noise * torch.randn(200, WIDTH).double(), target)
        found.append(geometry(moments, 3 * corners))
    for name in ("nc1", "nc2", "nc2_norms", "nc2_angles", "nc3"):
        values = [one[name] for one in found]
        assert values[0] == pytest.approx(0, abs=1e-10)
        assert values == sorted(values)
    assert found[0]["effective_rank"] == pytest.approx(CLASSES - 1)


def test_two_classes_by_hand() -> None:
    """Means (2, 0) and (-2, 0), deviations of 1 along the first axis: ``tr(S_W S_B^+) / C = (1 / 4) / 2``."""
    moments = ClassMoments()
    moments.add(torch.tensor([[1.0, 0.0], [3.0, 0.0], [-1.0, 0.0], [-3.0, 0.0]]), torch.tensor([0, 0, 1, 1]))
    found = geometry(moments, torch.tensor([[1.0, 5.0], [-1.0, 5.0]]).double())
    assert found["nc1"] == pytest.approx(0.125)
    assert found["nc2"] == pytest.approx(0, abs=1e-12)
    assert found["nc3"] == pytest.approx(0, abs=1e-12)
    assert from_simplex(torch.tensor([[1.0, 1.0], [1.0, 1.0]]).double()) == pytest.approx(math.sqrt(2))


def test_factorized_and_merged_heads_are_measured_alike_and_a_cut_to_the_classes_keeps_the_collapse() -> None:
    corners = simplex()
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, CLASSES, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(WIDTH))
        model[1].weight.copy_(corners)
    target = torch.arange(40) % CLASSES
    batches = [(corners[target], target)]
    low = sp.factorize(model, where=sp.match("*"))
    full, cut = neural_collapse(low, batches), sp.prune(low, {"1": CLASSES - 1})
    for one in (full, neural_collapse(cut, batches), neural_collapse(sp.merge(cut), batches)):
        assert (one.nc1, one.nc2, one.nc3, one.nc4) == pytest.approx((0, 0, 0, 0), abs=1e-9)
    assert neural_collapse(sp.prune(low, {"1": 1}), batches).nc3 > 0.5


def test_the_callback_logs_every_other_epoch() -> None:
    batches = [(x.float(), y) for x, y in data()]
    model = network().float()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    history = sp.fit(model, batches, nn.CrossEntropyLoss(), optimizer, 4, callbacks=[LogCollapse(batches, every=2)], progress=False)
    logged: list[Any] = [line.get("nc1") for line in history.epochs]
    assert logged[0] is logged[2] is None
    assert logged[3] == pytest.approx(neural_collapse(model, batches).nc1)
    assert logged[3] < logged[1]


def test_what_cannot_be_measured_is_refused() -> None:
    model, (batch, *_) = network(), data()
    with pytest.raises(SettingError, match="batches that can be read twice"):
        neural_collapse(model, iter([batch]))
    with pytest.raises(SettingError, match="none without examples"):
        neural_collapse(model, [(batch[0], torch.full((len(batch[1]),), 2))])
    with pytest.raises(SettingError, match="targets must be classes"):
        neural_collapse(model, [(batch[0], batch[0])])
    with pytest.raises(LayerError, match="does not read features"):
        neural_collapse(model, [(batch[0][None], batch[1])])
    with pytest.raises(LayerError, match="no linear layer at its end"):
        neural_collapse(nn.Conv2d(1, 1, 1), [(torch.randn(2, 1, 2, 2), torch.tensor([0, 1]))])
    with pytest.raises(SettingError, match="every must be an integer >= 1"):
        LogCollapse([], every=0)
