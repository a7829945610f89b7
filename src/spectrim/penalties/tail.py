"""Penalty on the part of each spectrum that will be cut."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.layers import Factors, named_factors
from spectrim.layers.sharded import whole
from spectrim.penalties.sums import total
from spectrim.surgery.ranks import check_names


def tail_share(S: Tensor, rank: int) -> Tensor:
    """Return the fraction of the energy in all but the `rank` largest ``|S|`` of each block, a scalar in [0, 1]; 0 for a spectrum of zeros.

    The total energy is treated as a constant. Values are scaled by the largest first, so that squares neither underflow nor overflow. If
    the largest is so small that the gradient would overflow, all are treated as zeros.

    Examples:
        >>> tail_share(torch.tensor([3.0, -1.0, 0.0]), 1)
        tensor(0.1000)
    """
    S = whole(S).to(torch.promote_types(S.dtype, torch.float32))
    with torch.no_grad():
        size = S.abs()
        largest = size.max()
        zero = largest < torch.finfo(S.dtype).tiny * S.numel()
        scale = torch.where(zero, 1.0, largest)
        order = size.argsort(dim=-1, descending=True, stable=True)
        cut = torch.ones_like(size).scatter_(-1, order[..., :rank], 0.0)
        weight = torch.where(zero, 0.0, cut / torch.where(zero, 1.0, (size / scale).square().sum()))
    return (weight * (S / scale).square()).sum()


def tail_share_of(factors: Factors, rank: int) -> Tensor:
    """Return `tail_share` of one weight."""
    return tail_share(factors.S, rank)


@torch.no_grad()
def tail_shares(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, float]:
    """Return `tail_share` of each named weight that holds more singular values than its rank.

    Args:
        model: factorized.
        ranks: by the names of `coverage`.
    """
    found = {name: tail_share(f.S, ranks[name]) for name, f in named_factors(model) if name in ranks and f.rank > ranks[name]}
    if not found:
        return {}
    device = next(iter(found.values())).device
    shares = torch.stack([share.double().to(device) for share in found.values()]).tolist()  # one transfer for all
    return dict(zip(found, shares, strict=True))


@dataclass(frozen=True)
class TailEnergy:
    """``sum_l strength_l * tau_l``, ``tau_l`` the fraction of the energy in all but the ``rank_l`` largest ``|S_l|``; in float32 at least.

    It drives the values that a cut to `ranks` would discard to zero, and has no gradient on the others. With orthonormal factors ``tau_l``
    is the squared distance of the weight to the nearest weight of that rank, relative to its norm (Eckart and Young, 1936). The norm is
    treated as a constant, so that growth of the other values does not lower the penalty. Blocks of a grouped convolution share one rank and
    are pooled.

    Args:
        ranks: number of largest values of each weight that are not penalized, by the names of `coverage`, >= 1. Weights without an entry,
            or with no more values than that, add nothing.
        strengths: factor of each ``tau_l``, by the same names, finite and >= 0.

    Raises:
        SettingError: for a value outside its range, or when the two do not name the same weights.
        LayerError: when called on a model that has no factorized weight of such a name.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
        >>> round(TailEnergy({"": 1}, {"": 0.5})(factorize(layer)).item(), 4)  # 0.5 * 1 / (9 + 1)
        0.05

    Source: ours.
    """

    ranks: Mapping[str, int]
    strengths: Mapping[str, float]

    def __post_init__(self) -> None:
        if self.ranks.keys() != self.strengths.keys():
            raise SettingError(
                "TailEnergy", "strengths", got=sorted(self.strengths), rule=f"for the weights in ranks, {sorted(self.ranks)}"
            )
        for name, rank in self.ranks.items():
            if isinstance(rank, bool) or rank < 1:
                raise SettingError("TailEnergy", f"ranks['{name}']", got=rank, rule="an integer >= 1")
        for name, strength in self.strengths.items():
            if not 0 <= strength < float("inf"):
                raise SettingError("TailEnergy", f"strengths['{name}']", got=strength, rule="a finite number >= 0")

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the weighted penalty of all named weights, a scalar."""
        check_names(model, self.ranks)
        held = [(name, factors) for name, factors in named_factors(model) if factors.rank > self.ranks.get(name, factors.rank)]
        return total(model, [self.strengths[name] * tail_share(factors.S, self.ranks[name]) for name, factors in held])
