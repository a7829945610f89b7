"""Where pruning begins to pay: what is timed is the product itself, and the crossing is found."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spectrim as sp
from spectrim.budget.break_even import DENSITIES, BreakEven, _crossing, _Product, break_even, paying
from spectrim.errors import SettingError
from spectrim.projections import entropy_bits


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(12, 7, bias=False), torch.randn(2, 5, 12)),
        (nn.Conv2d(3, 4, (3, 2), stride=2, padding=1, dilation=(1, 2), bias=False), torch.randn(2, 3, 9, 8)),
    ],
)
def test_the_sparse_product_computes_what_the_pruned_layer_does(layer: nn.Module, x: torch.Tensor) -> None:
    product = _Product(layer, 0.3)
    kept = product.matrix.to_dense()
    assert int(kept.count_nonzero()) == round(0.3 * kept.numel())
    weight = kept.reshape(layer.weight.shape)
    if isinstance(layer, nn.Linear):
        wanted = F.linear(x, weight).flatten(0, -2)
    else:
        wanted = F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation).flatten(2).permute(1, 0, 2).flatten(1)
    torch.testing.assert_close(product(x), wanted)


def test_the_crossing_lies_between_what_was_timed_and_noise_does_not_move_it() -> None:
    seconds = {0.01: 1.0, 0.04: 4.0, 0.16: 16.0}
    assert _crossing(2.0, seconds) == pytest.approx(0.02)
    assert _crossing(2.0, {0.005: 3.0, **seconds}) == pytest.approx(0.02), "slow by chance"
    assert (_crossing(0.5, seconds), _crossing(20.0, seconds), _crossing(1.0, {})) == (0.0, 0.16, 0.0)


def test_layers_are_found_by_their_calls_and_bytes_by_the_entropy_of_positions() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.deep, self.fc, self.unused = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, groups=2), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.deep(self.conv(x)).flatten(1))

    found = break_even(Net(), torch.randn(3, 1, 6, 6), bits=3, min_time=1e-4)
    assert list(found) == ["conv", "deep", "fc"]
    assert (sorted(found["fc"].sparse_s), found["deep"].sparse_s, found["deep"].clock) == (list(DENSITIES), {}, 0.0)
    for share, pays in ((found["fc"].bytes - 0.02, True), (found["fc"].bytes + 0.02, False)):
        mask = torch.arange(10_000) < share * 10_000
        assert (3 * int(mask.sum()) + entropy_bits(mask) < 3 * 10_000) == pays
    low = sp.factorize(nn.Sequential(nn.Linear(8, 8)), rank=2, where="0")
    assert list(break_even(sp.merge(low), torch.randn(1, 8), min_time=1e-4)) == ["0.0", "0.1"], "the layers of a pair"
    half = break_even(nn.Sequential(nn.Linear(8, 8)).bfloat16(), torch.randn(1, 8).bfloat16(), min_time=1e-4)
    assert half["0"].sparse_s == {}
    with pytest.raises(SettingError, match="merge"):
        break_even(low, torch.randn(1, 8))
    with pytest.raises(SettingError, match=r"\[1, 32\]"):
        break_even(Net(), torch.randn(3, 1, 6, 6), bits=0)
    rows = {"conv": BreakEven(0.7, 0.02, 1.0, {}), "fc": BreakEven(0.7, 0.2, 1.0, {})}
    assert paying({"conv": 3, "fc": 0.1, "deep": 0.1}, rows, Net()) == {"fc": 0.1}
    assert paying({"conv": 3, "fc": 0.8}, rows, Net(), by="bytes") == {"conv": 3}
