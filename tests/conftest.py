"""Every test starts from the same random state, on one thread: layers this small only lose time to a pool of threads."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed formats a stack trace for every kind of device
