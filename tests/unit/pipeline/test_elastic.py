"""One file, any budget: a saved network is sliced when it is loaded."""

from pathlib import Path

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.layers import named_factors
from spectrim.metrics.measurement import measure


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 16, 32)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(32, 5)).eval()


@pytest.fixture(scope="module")
def folder(dense: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sp.save(sp.factorize(dense, "channel"), tmp_path_factory.mktemp("elastic"))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_one_file_meets_every_budget_and_loses_more_at_smaller_ones(dense: nn.Module, folder: Path) -> None:
    whole = measure(dense, X, latency=False).macs
    assert whole is not None
    errors = []
    for share in (0.9, 0.6, 0.4):
        small = sp.merge(sp.load(folder, dense, share, inputs=X))
        macs = measure(small, X, latency=False).macs
        assert macs is not None
        assert macs <= share * whole
        errors.append(float((small(X) - dense(X)).detach().square().mean()))
    assert errors == sorted(errors)
    assert errors[0] < errors[-1]


def test_smaller_networks_are_slices_of_larger_ones(dense: nn.Module, folder: Path) -> None:
    larger, smaller = (dict(named_factors(sp.load(folder, dense, share, inputs=X))) for share in (0.8, 0.4))
    whole = dict(named_factors(sp.load(folder, dense)))
    assert any(smaller[name].rank < larger[name].rank for name in smaller)
    for name, factors in smaller.items():
        rank = min(factors.rank, larger[name].rank)
        for found in (larger[name], whole[name]):
            own, theirs = (one.block_parts()[1][..., :rank] for one in (factors, found))
            torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-6)  # pruning decomposes factors of 32 bits again


def test_what_a_budget_needs_is_asked_for(dense: nn.Module, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="inputs must be one batch of inputs, with a budget"):
        sp.load(folder, dense, 0.5)
    merged = sp.save(sp.merge(sp.load(folder, dense, 0.5, inputs=X)), tmp_path)
    assert next(named_factors(sp.load(merged, dense)), None) is None
    with pytest.raises(SettingError, match="save the factorized network before merge"):
        sp.load(merged, dense, 0.4, inputs=X)
    with pytest.raises(SettingError, match="must be at least"):
        sp.load(folder, dense, 0.001, inputs=X)
