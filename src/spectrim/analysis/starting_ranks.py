"""Starting ranks from convex duality: the directions that survive a weight decay. And how far neighboring layers share directions."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.analysis.optima import checked, path_scale
from spectrim.errors import LayerError, SettingError
from spectrim.layers import named_factors
from spectrim.surgery.moments import Calibration


def suggest_rank(inputs: Tensor, targets: Tensor, decay: float, layers: int = 2) -> int:
    """Return how many directions survive a weight decay: those of a linear network on the whitened inputs; at least 1.

    Args:
        inputs: ``(n, in)``, whitened here.
        targets: ``(n, out)``.
        decay: >= 0, in units of the singular values of ``(X^T X)^(-1/2) X^T Y``.
        layers: >= 2; deeper networks drop more.

    Examples:
        >>> suggest_rank(10 * torch.eye(3), torch.diag(torch.tensor([5.0, 3.0, 0.5])), decay=1.0)
        2
    """
    X, Y = checked("suggest_rank", inputs, targets, decay, layers)
    U, S, _ = torch.linalg.svd(X, full_matrices=False)
    v = torch.linalg.svdvals(U[:, S.gt(1e-10 * S[0])].mT @ Y)
    return survivors(v, decay, layers)


def survivors(strengths: Tensor, decay: float, layers: int = 2) -> int:
    """Return how many paths of these strengths survive, at least 1."""
    if not bool(torch.isfinite(strengths).all()):
        raise SettingError("suggest_ranks", "spectra", got="NaN or infinite values", rule="finite numbers")
    return max(1, sum(path_scale(v, decay, layers) > 0 for v in strengths.tolist()))


def suggest_ranks(spectra: Mapping[str, Tensor], decay: float, layers: int = 2) -> dict[str, int]:
    """Return a starting rank for each weight: the directions of its outputs that survive a decay relative to the strongest one.

    Args:
        spectra: singular values of each weight on whitened inputs, ``W A^(1/2)``, see `output_spectra`.
        decay: in [0, 1), a fraction of each weight's largest value.
        layers: as for `suggest_rank`.

    Examples:
        >>> suggest_ranks({"0": torch.tensor([4.0, 1.0, 0.1])}, decay=0.1)
        {'0': 2}
    """
    if not 0 <= decay < 1:
        raise SettingError("suggest_ranks", "decay", got=decay, rule="a fraction in [0, 1)")
    return {name: survivors(values / values.max().clamp(min=1e-300), decay, layers) for name, values in spectra.items()}


def output_spectra(model: nn.Module, calibration: Calibration) -> dict[str, Tensor]:
    """Return the singular values of ``W A^(1/2)`` of each factorized weight, ``A`` the second moment of its inputs: those of its outputs.

    Args:
        model: factorized.
        calibration: of the same model, from `calibrate`.

    Examples:
        >>> from spectrim import calibrate, factorize
        >>> net = nn.Linear(2, 2, bias=False)
        >>> net.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
        >>> low = factorize(net)
        >>> spectra = output_spectra(low, calibrate(low, [torch.tensor([[1.0, 0.0], [0.0, 5.0]])]))
        >>> suggest_ranks({"all": spectra[""] * 2**0.5}, decay=0.7)  # strengths 5 and 3
        {'all': 1}
    """
    without_outputs = replace(calibration, outputs={})
    return {
        name: (-factors.tail(*without_outputs.metrics(name, factors.shape)).diff()).clamp(min=0).sqrt()
        for name, factors in named_factors(model)
        if name in calibration.inputs
    }


def alignment(model: nn.Module) -> dict[tuple[str, str], float]:
    """Return how far neighboring linear layers share singular vectors: ``||W_2 W_1||_* / sum_k s_k(W_2) s_k(W_1)``, in [0, 1].

    One where the left singular vectors of a layer are the right ones of the next, in the same order (von Neumann's trace inequality), as
    they are at the optimum of a deep linear network; activations between them are ignored.

    Args:
        model: layers in the order of their registration; pairs whose sizes do not fit are left out.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> net[0].weight.data, net[1].weight.data = torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([1.0, 2.0]))
        >>> alignment(net)  # (2 + 2) / (4 + 1)
        {('0', '1'): 0.8}
    """
    layers: list[tuple[str, Any]] = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = {}
    for (name, one), (later, two) in pairwise(layers):
        first, second = ((layer.weight.detach() + 0).double() for layer in (one, two))
        if not (bool(torch.isfinite(first).all()) and bool(torch.isfinite(second).all())):
            raise LayerError(name, "or the layer behind it holds NaN or infinite values", hint="load the last good checkpoint")
        if second.shape[1] == first.shape[0]:
            values = [torch.linalg.svdvals(weight) for weight in (first, second)]
            count = min(len(one) for one in values)
            most = float((values[0][:count] * values[1][:count]).sum())
            found[name, later] = float(torch.linalg.svdvals(second @ first).sum()) / most if most > 0 else 0.0
    return found
