"""Penalty on the part of each spectrum that will be cut."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.forms.form import Form, Size
from spectrim.layers import named_factors
from spectrim.penalties.sums import total
from spectrim.surgery.ranks import check_names


@torch.no_grad()
def tail_shares(model: nn.Module, ranks: Mapping[str, Size]) -> dict[str, float]:
    """Return `Form.tail_share` of each named weight that is larger than the size given.

    Args:
        model: factorized.
        ranks: by the names of `coverage`.
    """
    found = {name: f.tail_share(ranks[name]) for name, f in larger(model, ranks)}
    if not found:
        return {}
    device = next(iter(found.values())).device
    shares = torch.stack([share.double().to(device) for share in found.values()]).tolist()  # one transfer for all
    return dict(zip(found, shares, strict=True))


def larger(model: nn.Module, ranks: Mapping[str, Size]) -> list[tuple[str, Form]]:
    """Return the weights, by name, that hold more than the size given."""
    held = [(name, factors) for name, factors in named_factors(model) if name in ranks]
    return [(name, factors) for name, factors in held if factors.rung_of(ranks[name]) < factors.rank]


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

    ranks: Mapping[str, Size]
    strengths: Mapping[str, float]

    def __post_init__(self) -> None:
        if self.ranks.keys() != self.strengths.keys():
            raise SettingError(
                "TailEnergy", "strengths", got=sorted(self.strengths), rule=f"for the weights in ranks, {sorted(self.ranks)}"
            )
        for name, rank in self.ranks.items():
            if isinstance(rank, bool) or min(rank if isinstance(rank, tuple) else (rank,)) < 1:
                raise SettingError("TailEnergy", f"ranks['{name}']", got=rank, rule="an integer >= 1, or one for each axis of a size")
        for name, strength in self.strengths.items():
            if not 0 <= strength < float("inf"):
                raise SettingError("TailEnergy", f"strengths['{name}']", got=strength, rule="a finite number >= 0")

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the weighted penalty of all named weights, a scalar."""
        check_names(model, self.ranks)
        held = larger(model, self.ranks)
        return total(model, [self.strengths[name] * factors.tail_share(self.ranks[name]) for name, factors in held])
