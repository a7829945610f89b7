"""A small network with BatchNorm and its data: what tests of subspaces and trajectories train."""

import torch
from torch import Tensor, nn


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 12, generator=generator), torch.randn(8, 4, generator=generator)) for _ in range(count)]


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4))


def flat(model: nn.Module) -> Tensor:
    """Return the trained parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
