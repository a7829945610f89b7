"""Weights near the largest number of float16, whose singular values are above it."""

import pytest
import torch
from torch import nn

import spectrim as sp


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scheme", ["channel", "tucker", "cp", "tt", "quaternion"])
def test_factors_of_large_weights_stay_in_the_range_of_float16(scheme: str, autocast: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False)), 1e-3 * torch.randn(2, 8, 4, 4)
    nn.init.uniform_(model[0].weight, 3e4, 6e4)
    exact = sp.factorize(model, rank=2, where="*", scheme=scheme)
    expected = exact(x)
    low = exact if autocast else exact.half()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        output = low(x if autocast else x.half())
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=5e-3 * float(expected.detach().abs().max()))  # float16 has 1e-3
    output.float().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) and p.grad.abs().sum() > 0 for p in low.parameters())


def test_a_weight_of_zeros_gets_its_gradient_in_float16() -> None:
    low = sp.factorize(nn.Sequential(nn.Linear(4, 4, bias=False)).half().requires_grad_(True), rank=1, where="*")
    low[0].factors["weight"].S.data.zero_()
    low(torch.ones(1, 4).half()).float().square().add(low(torch.ones(1, 4).half()).float()).sum().backward()
    assert float(low[0].factors["weight"].S.grad.abs()) > 0
