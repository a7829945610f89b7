"""What several tests of this room start from."""

import pytest
import torch
from torch import nn

import spectrim as sp


@pytest.fixture(scope="module")
def task():
    """A small network that was trained on separable data, and these."""
    torch.manual_seed(0)
    inputs = torch.randn(256, 16)
    targets = (inputs @ torch.randn(16, 4)).argmax(1)
    data = list(zip(inputs.split(32), targets.split(32), strict=True))
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    sp.fit(model, data, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), 0.01), 4, progress=False)
    return model.eval(), data
