"""Models that follow another one, averages of its weights (EMA, SWA), through a cut of its ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import LayerError
from spectrim.forms.svd import Factors

WRAPPERS = 3
"""How many wrappers with a ``module`` (`AveragedModel`, `DataParallel`) are looked into."""


def followed(average: Factors, new: Factors) -> Factors:
    """Cut an average of factors to the rank of `new`, in the coordinates of `new`, so that the two can be averaged further.

    What is kept is the best approximation of the average's own weight, so that a cut that discards nothing does not change it. Of all
    factors with that product those nearest to `new` are taken: its singular vectors ``U``, projected onto the kept column space.

    Args:
        average: before the cut, of any rank >= that of `new`.
        new: factors after the cut.
    """
    cut = average.cut(lambda spectrum: new.rank)
    parts = zip(*(_blocks(factors) for factors in (cut, new)), strict=True)
    aligned = [torch.stack(tensors) for tensors in zip(*(_aligned(*pair) for pair in parts), strict=True)]
    if cut.S.dim() == 1:
        aligned = [tensor[0] for tensor in aligned]
    return Factors(*aligned, dtype=average.dtype, requires_grad=average.S.requires_grad)


def _blocks(factors: Factors) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return ``U``, ``S``, ``Vh`` of each block in float64."""
    U, S, Vh = (tensor.detach().double() for tensor in (factors.U, factors.S, factors.Vh))
    return [(U, S, Vh)] if S.dim() == 1 else list(zip(U, S, Vh, strict=True))


def _aligned(cut: tuple[Tensor, Tensor, Tensor], new: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors of the product of `cut` (orthonormal) nearest to `new`; `cut` itself where the two have little in common."""
    (U, S, Vh), (U_new, _, Vh_new) = cut, new
    turn = U.mT @ U_new
    if S.min() <= 0 or torch.linalg.svdvals(turn).min() < 0.1:
        return cut
    rows = torch.linalg.solve(turn, S.unsqueeze(-1) * Vh)
    sizes = rows.norm(dim=-1)
    signs = torch.where((rows * Vh_new).sum(-1) < 0, -1.0, 1.0).to(sizes)  # of S, which is positive: into U and Vh
    return U @ turn * signs, sizes, rows / (sizes * signs).unsqueeze(-1)


def cuts_of(follower: nn.Module, cuts: Mapping[str, tuple[Factors, Factors]]) -> dict[str, tuple[Factors, Factors]]:
    """Return the present and the cut factors of a follower, by module name; nothing is changed.

    Args:
        follower: what `inner_of` returned.
        cuts: those of the model that it follows.

    Raises:
        LayerError: for factors that the follower has not, or has in another size.
    """
    found: dict[str, tuple[Factors, Factors]] = {}
    modules = dict(follower.named_modules())
    for name, (old, new) in cuts.items():
        own = modules.get(name)
        if not isinstance(own, Factors) or own.U.shape != old.U.shape or own.Vh.shape != old.Vh.shape:
            got = f"factors of rank {own.rank}" if isinstance(own, Factors) else "no such factors"
            hint = f"a follower must have the layers and ranks of the model: rank {old.rank} here; copy the factorized model and cut both"
            raise LayerError(name, f"the follower {type(follower).__name__} has {got}", hint=hint)
        found[name] = own, followed(own, new)
    return found


def inner_of(follower: Any, names: Sequence[str]) -> nn.Module:
    """Return the module inside a follower whose modules have the names of the model's.

    Args:
        follower: a copy of the model, or what wraps one as ``module``.
        names: of modules that hold factors.

    Raises:
        LayerError: for anything else.
    """
    inner = follower
    for _ in range(WRAPPERS):
        if isinstance(inner, nn.Module) and set(names) <= {name for name, _ in inner.named_modules()}:
            return inner
        inner = getattr(inner, "module", None)
    problem = f"is not in the follower, a {type(follower).__name__}"
    raise LayerError(names[0] if names else "model", problem, hint="pass models with the same layers: a deepcopy, AveragedModel(model)")
