"""The check that every measure of distortion passes."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spectrim.errors import LayerError, SettingError
from spectrim.layers import named_factors
from spectrim.protocols import Importance


def distortions_of(model: nn.Module, importance: Importance) -> dict[str, Tensor]:
    """Call an importance and check what it returns.

    Args:
        model: factorized, at any rank.
        importance: see `Importance`.

    Returns:
        By the names of `named_factors`, in that order: float64 ``(rank + 1,)``; rounding that makes an entry rise is taken out.

    Raises:
        LayerError: when nothing is factorized; when a weight has no distortions, the wrong number of them, or some that are not finite,
            negative or rise with the rank.
        SettingError: when the importance returns no mapping.

    Examples:
        >>> from spectrim.budget.distortion.energy import SpectralEnergy
        >>> from spectrim.surgery.factorize import factorize
        >>> {name: tuple(distortion.shape) for name, distortion in distortions_of(factorize(nn.Linear(8, 6)), SpectralEnergy()).items()}
        {'': (7,)}
    """
    named = dict(named_factors(model))
    if not named:
        raise LayerError(type(model).__name__, "has no factorized layer", hint="call factorize(model) first")
    owner = getattr(importance, "__name__", type(importance).__name__)
    found = importance(model)
    if not isinstance(found, Mapping):
        raise SettingError(owner, "what it returns", got=type(found), rule="a mapping from the names of named_factors to distortions")
    distortions = {}
    for name, factors in named.items():
        if name not in found:
            raise LayerError(name, f"{owner} has no entry for it", hint="an importance must have every name of named_factors(model)")
        distortion = torch.as_tensor(found[name]).detach().to("cpu", torch.float64)
        if distortion.shape != (factors.rank + 1,):
            hint = "entry r is the distortion of keeping r singular values, from none to all"
            raise LayerError(name, f"{owner} gives distortions of shape {tuple(distortion.shape)}, not ({factors.rank + 1},)", hint=hint)
        for problem, broken in (
            ("that are not finite", ~torch.isfinite(distortion)),
            ("below zero", distortion < 0),
            (
                "that increase with the rank",
                torch.cat([torch.zeros(1, dtype=torch.bool), distortion.diff() > 1e-9 * distortion.abs().max()]),
            ),
        ):
            if broken.any():
                rank = int(broken.nonzero()[0])
                raise LayerError(name, f"{owner} gives distortions {problem}: {float(distortion[rank]):.6g} at rank {rank}")
        distortions[name] = distortion.cummin(0).values
    return distortions


def _relative(tail: Tensor) -> Tensor:
    """Return the tail energy at every rung as a fraction of all; zeros for a weight of zeros."""
    return tail / tail[0].clamp(min=1e-300)
