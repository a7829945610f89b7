"""Whether the components of factors kept their places between two samples: a permutation or a change of sign leaves the weight as it is."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spectrim.layers import named_factors
from spectrim.layers.sharded import whole_sides

SAME = 0.7
"""Cosine above which two unit vectors are the same component: of orthonormal ones, at most one is as near."""


def jumps(model: nn.Module, before: Mapping[int, Tensor]) -> list[str]:
    """Return the names of factorized weights of which a component took the place or the opposite sign of another sample's.

    Column ``k`` of a side jumped where it is nearer to another column of the earlier sample than to its own (a cosine above 0.7), or to
    its own with the opposite sign. A line between the two samples then passes through weights that are like neither. Forms without
    orthonormal sides, such as CP, are not compared.

    Args:
        model: at the later sample.
        before: the earlier sample's values, by the id of the parameter.
    """
    found = []
    for name, form in named_factors(model):
        earlier = copy.deepcopy(form)
        for now, then in zip(form.parameters(), earlier.parameters(), strict=True):
            then.data.copy_(before.get(id(now), now))  # one that is frozen has not moved
        if any(_moved(old, new) for old, new in zip(whole_sides(earlier), whole_sides(form), strict=True)):
            found.append(name)
    return found


def _moved(old: Tensor, new: Tensor) -> bool:
    old, new = (nn.functional.normalize(side.float(), dim=-2) for side in (old.to(new.device), new))
    cosines = old.mT @ new
    own = cosines.diagonal(dim1=-2, dim2=-1)
    others = cosines.abs() - torch.diag_embed(torch.full_like(own, torch.inf))
    nearer = others.amax(-2) > own.abs().clamp(min=SAME)
    return bool((nearer | (own < -SAME)).any())
