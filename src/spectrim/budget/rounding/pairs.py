"""Rank and step of each weight by one price of a bit: a weight as it is, or two small ones in its place, each with a step of its own."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from spectrim.budget.rounding.curves import INPUTS, OUTPUTS, WIDEST, Curve, Rounding, curve_of
from spectrim.budget.rounding.meeting import Moments
from spectrim.budget.rounding.options import Option, best_at
from spectrim.budget.rounding.weights import Weight, weights_of
from spectrim.linalg.feedback import metric_of
from spectrim.surgery.exchange import duplicate
from spectrim.surgery.factorize import factorize
from spectrim.surgery.merge import merge

__all__ = ["Option", "best_at", "options_of", "with_pairs"]

SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Ranks that are tried, as shares of the full rank; those that take no more numbers than the weight itself."""


def options_of(weight: Weight, met: Moments, dense: Curve) -> list[Option]:
    """Return the ways to hold one weight; that of the dense weight alone where a pair never takes fewer numbers.

    The cut is the best one in the metric ``tr(G D A D^T)`` of the second moments.

    With ``A = R^T R``, ``G = Q^T Q`` and ``Q W R^T = U S V^T`` the factors are ``S^1/2 V^T R^-T`` and ``Q^-1 U S^1/2``. An error of the
    first is priced by what the second makes of it and the other way around: in the metrics ``(S, A)`` and ``(G, S)``.

    Args:
        weight: linear or a convolution.
        met: its moments.
        dense: its curve.
    """
    from scipy.linalg import solve_triangular  # here, because it takes long to import and few commands need it

    matrices = weight.matrices().cpu().numpy()
    blocks, out, in_ = matrices.shape
    found = [Option(None, [dense], numbers=matrices.size)]
    ranks = sorted({max(1, round(share * min(out, in_))) for share in SHARES})
    ranks = [rank for rank in ranks if rank * (out + in_) < out * in_]
    if blocks > 1 or out > WIDEST or not ranks:
        return found
    right, left = metric_of(met.own[0].cpu().numpy(), INPUTS), metric_of(met.left[0].cpu().numpy(), OUTPUTS)
    roots = [np.sqrt(metric.weights)[:, None] * metric.mixing for metric in (left, right)]
    u, s, vh = np.linalg.svd(roots[0] @ matrices[0][np.ix_(left.order, right.order)] @ roots[1].T, full_matrices=False)
    second, first = np.empty((out, len(s))), np.empty((len(s), in_))
    second[left.order] = solve_triangular(roots[0], u, lower=True)
    first[:, right.order] = solve_triangular(roots[1], vh.T, lower=True).T
    for rank in ranks:
        root = np.sqrt(np.maximum(s[:rank], 1e-12 * s[0]))
        factors = root[:, None] * first[:rank], second[:, :rank] * root
        between = metric_of(np.diag(root**2), 0.0)
        sides = (right, between), (between, left)
        curves = [_curve(Rounding(factor[None], [side])) for factor, side in zip(factors, sides, strict=True)]
        found.append(Option(rank, curves, float((s[rank:] ** 2).sum()), factors, numbers=rank * (out + in_)))
    return found


def _curve(rounding: Rounding) -> Curve:
    return curve_of(rounding.rough, rounding.size)


def with_pairs(dense: nn.Module, options: Mapping[str, Option]) -> tuple[nn.Module, dict[str, str]]:
    """Return a copy of a network with two layers in place of some, and by the name of each second layer that of the one before.

    Args:
        dense: of ordinary layers.
        options: with factors, by the names of the layers.
    """
    cut = duplicate(dense)
    held = weights_of(cut)
    for name, option in options.items():
        assert option.factors is not None
        first, second = option.factors
        held[name].set_(torch.from_numpy(second @ first)[None].to(held[name].matrices()))
    made = merge(factorize(cut, "channel", list(options), rank={name: option.rank or 1 for name, option in options.items()}))
    counterparts, weights = {}, weights_of(made)
    for name, option in options.items():
        pair = [f"{name}.0", f"{name}.1"]
        factors = option.factors or ()
        if any(part not in weights for part in pair) or [weights[part].matrices().shape[1:] for part in pair] != [f.shape for f in factors]:
            continue  # written in another way: the product is right all the same
        for part, factor in zip(pair, factors, strict=True):
            weights[part].set_(torch.from_numpy(factor)[None].to(weights[part].matrices()))
        counterparts[pair[1]] = name
    return made, counterparts
