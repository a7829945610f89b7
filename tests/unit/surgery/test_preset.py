"""Random values at the scale of the dense initialization."""

from typing import Any

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.budget.rules import Fixed
from spectrim.errors import LayerError
from spectrim.layers import named_factors
from spectrim.surgery.preset import preset_


@pytest.mark.parametrize("scheme", ["channel", "spatial", "input", "tucker", "cp", "tt"])
def test_composed_weights_are_random_with_the_mean_square_of_the_dense_ones(scheme: Any) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(72, 5))
    low = sp.prune(sp.factorize(dense, scheme, "*"), Fixed(3))
    before = {name: form.matrix().detach().clone() for name, form in named_factors(low)}
    sizes = {name: form.size for name, form in named_factors(low)}
    preset_(low, dense)
    for name, form in named_factors(low):
        reference = dense.get_parameter(f"{name}.weight").square().mean()
        torch.testing.assert_close(form.matrix().square().mean(), reference)
        assert form.size == sizes[name]
        likeness = torch.nn.functional.cosine_similarity(form.matrix().detach().flatten(), before[name].flatten(), dim=0)
        assert float(likeness) < 0.5
        assert form.exact
        assert all(part.requires_grad for part in form.parameters())
    assert low(torch.randn(2, 6, 7, 7)).shape == (2, 5)


def test_another_network_is_refused() -> None:
    low = sp.factorize(nn.Sequential(nn.Linear(6, 6)), where="*")
    with pytest.raises(LayerError, match="is not in the dense network"):
        preset_(low, nn.Linear(6, 6))
