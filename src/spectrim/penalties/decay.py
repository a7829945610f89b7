"""Weight decay on the product of the factors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectrim.forms.svd import Factors
from spectrim.layers import named_factors
from spectrim.layers.sharded import is_sharded, of_shards
from spectrim.penalties.sums import STACKED, check_weight, stack, total


def half_squared_norm(left: Tensor, right: Tensor) -> Tensor:
    """Return ``1/2 sum ||left right||_F^2`` of matrices ``(..., out, rank)`` and ``(..., rank, in)``, composed if that is cheaper.

    Uncomposed it is ``1/2 tr(left^T left right right^T)``.
    """
    (out, rank), in_ = left.shape[-2:], right.shape[-1]
    if out * in_ <= rank * (out + in_):
        return 0.5 * (left @ right).square().sum()
    return 0.5 * ((left.mT @ left) * (right @ right.mT)).sum()


def groups_of(model: nn.Module) -> list[list[Factors]]:
    """Group the factors of equal shape, dtype and device; a group has at most `STACKED` elements. Each sharded one is a group."""
    groups: dict[tuple[object, ...], list[Factors]] = {}
    for _, factors in named_factors(model):
        if not isinstance(factors, Factors):
            continue
        key = (id(factors),) if is_sharded(factors.S) else (factors.U.shape[-2:], factors.Vh.shape[-2:], factors.U.dtype, factors.U.device)
        groups.setdefault(key, []).append(factors)
    chunks: list[list[Factors]] = []
    for group in groups.values():
        count = max(1, STACKED // max(factors.U.numel() + factors.Vh.numel() for factors in group))
        chunks.extend(group[start : start + count] for start in range(0, len(group), count))
    return chunks


@dataclass(frozen=True)
class FrobeniusDecay:
    """``weight / 2 * sum_l ||U diag(S) Vh||_F^2``: the decay of the dense weight, for the factors; in float32 at least.

    An optimizer's ``weight_decay`` on the factors shrinks each of them, which acts like a nuclear norm on their product. This penalty acts
    on the product as ``weight_decay=weight`` acts on a dense weight, except for adaptive steps. Set the optimizer's decay of the factors
    to zero.

    Args:
        weight: strength, >= 0; a dense network's ``weight_decay``, typically 1e-4 to 5e-4.

    Raises:
        SettingError: for a negative or infinite strength.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
        >>> round(FrobeniusDecay(1.0)(factorize(layer)).item(), 4)  # (9 + 1) / 2
        5.0

    Source: Khodak, Tenenholtz, Mackey and Fusi, arXiv 2105.01029, section 3 (Frobenius decay).
    """

    weight: float

    def __post_init__(self) -> None:
        check_weight(self, self.weight)

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the weighted penalty of all factorized layers, a scalar."""
        others = [form.half_squared_norm() for _, form in named_factors(model) if not form.is_matrix]
        return self.weight * total(model, [*(self._of(group) for group in groups_of(model)), *others])

    def _of(self, group: Sequence[Factors]) -> Tensor:
        if is_sharded(group[0].S):
            return of_shards(_half_squared_norm_of, group[0].U, group[0].S, group[0].Vh)
        U, S, Vh = stack([f.U for f in group]), stack([f.S for f in group], axes=1), stack([f.Vh for f in group])
        return _half_squared_norm_of(U, S, Vh)


def _half_squared_norm_of(U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    with torch.autocast(U.device.type, enabled=False):
        return half_squared_norm(U * S.unsqueeze(-2), Vh)
