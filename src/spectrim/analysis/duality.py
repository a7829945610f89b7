"""Convex duality of networks with weight decay: bounds on the loss that a two-layer network can reach."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from spectrim.analysis.arrangements import FEW, arrangements, most_arrangements
from spectrim.analysis.optima import checked, linear_optimum, rank_one_optimum, relu_optimum
from spectrim.analysis.starting_ranks import alignment, output_spectra, suggest_rank, suggest_ranks
from spectrim.errors import LayerError, SettingError
from spectrim.layers import has_matrix

__all__ = [
    "Certificate",
    "alignment",
    "certificate",
    "linear_optimum",
    "output_spectra",
    "rank_one_optimum",
    "relu_optimum",
    "suggest_rank",
    "suggest_ranks",
]

Bound = Literal["auto", "arrangements", "relaxed", "sampled"]


@dataclass(frozen=True)
class Certificate:
    """What weak duality says about a two-layer network and its data.

    Attributes:
        loss: of this network: ``1/2 ||f(X) - Y||_F^2 + decay / 2 (||W_1||_F^2 + ||W_2||_F^2)``.
        bound: no network of this kind, of any width, has a lower loss; an estimate of that where `proof` is False.
        proof: whether `bound` is one.
        method: how the dual constraint was bounded.
    """

    loss: float
    bound: float
    proof: bool
    method: str

    @property
    def gap(self) -> float:
        """How much of the loss could be saved, at most, as a fraction."""
        return (self.loss - self.bound) / self.loss if self.loss > 0 else 0.0

    def __str__(self) -> str:
        kind = "at least" if self.proof else "an estimate:"
        return f"loss {self.loss:.6g}; the optimum is {kind} {self.bound:.6g} ({self.method}), a gap of {self.gap:.2%}"


def certificate(
    model: nn.Module, inputs: Tensor, targets: Tensor, decay: float, *, method: Bound = "auto", samples: int = 1000, seed: int = 0
) -> Certificate:
    """Bound the loss that any two-layer network can reach on these data from below, by the residual of this one.

    The residual ``V = Y - f(X)``, scaled until ``max_{||u|| <= 1} ||V^T g(X u)|| <= decay``, is a point of the dual problem, whose value
    ``<V, Y> - 1/2 ||V||^2`` is a lower bound. At the optimum both agree. For a linear network the maximum is ``||X^T V||``. For ReLU:
    ``arrangements``: over all patterns of active examples, for few examples; exact for one output; ``relaxed``:
    ``(||X^T V|| + ||X|| ||V||) / 2``, for any number; ``sampled``: found by search, and no proof.

    Args:
        model: two linear layers without biases, with a ReLU between them or not: an `nn.Sequential`, factorized or not.
        inputs: ``(n, in)``.
        targets: ``(n, out)``.
        decay: > 0, weight decay of the sum of squares, not of the mean.
        method: for ReLU; ``auto`` counts patterns where there are at most a few thousand, else relaxes.
        samples: starts of the search for ``sampled``.
        seed: of them.

    Raises:
        LayerError: for a deeper network, biases or other layers: there no such bound holds.
        SettingError: for a setting outside its range.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> for layer, weight in zip(net, linear_optimum(torch.eye(2), 3 * torch.eye(2), 1.0).weights):
        ...     layer.weight.data = weight.float()
        >>> print(certificate(net, torch.eye(2), 3 * torch.eye(2), 1.0))
        loss 5; the optimum is at least 5 (linear), a gap of 0.00%

    Source: Ergen and Pilanci, arXiv 2002.09773 (the dual); the relaxation is ours. Deep networks have a duality gap: Wang, Ergen and
        Pilanci, arXiv 2110.06482.
    """
    X, Y = checked("certificate", inputs, targets, decay, 2)
    if decay <= 0:
        raise SettingError("certificate", "decay", got=decay, rule="> 0: without decay the bound is 0")
    if method not in get_args(Bound):
        raise SettingError("certificate", "method", got=method, rule=f"one of {get_args(Bound)}")
    first, second, relu = two_layers(model)
    if first.shape[1] != X.shape[1] or second.shape[0] != Y.shape[1]:
        rule = f"(n, {first.shape[1]}) and (n, {second.shape[0]}), as the network has them"
        raise SettingError("certificate", "inputs and targets", got=(tuple(X.shape), tuple(Y.shape)), rule=rule)
    if not (bool(torch.isfinite(first).all()) and bool(torch.isfinite(second).all())):
        raise LayerError(type(model).__name__, "holds NaN or infinite values", hint="load the last good checkpoint")
    hidden = X @ first.mT
    V = Y - (hidden.clamp(min=0) if relu else hidden) @ second.mT
    loss = float(V.square().sum() / 2 + decay / 2 * (first.square().sum() + second.square().sum()))
    largest, proof, name = (_norm(X.mT @ V), True, "linear") if not relu else _relu_maximum(X, V, method, samples, seed)
    limit = decay / largest if largest > 0 else math.inf
    scale = max(-limit, min(limit, float((V * Y).sum() / V.square().sum().clamp(min=1e-300))))
    bound = max(0.0, float(scale * (V * Y).sum() - scale**2 * V.square().sum() / 2))
    return Certificate(loss, bound, proof, name)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def _relu_maximum(X: Tensor, V: Tensor, method: Bound, samples: int, seed: int) -> tuple[float, bool, str]:
    """Bound or estimate ``max ||V^T relu(X u)||`` over the unit ball."""
    if method == "arrangements" or (method == "auto" and most_arrangements(X) <= FEW):
        return max(_on_cone(X, V, D) for D in arrangements(X)), True, "arrangements"
    if method != "sampled":
        return (_norm(X.mT @ V) + _norm(X) * _norm(V)) / 2, True, "relaxed"
    U = torch.randn(X.shape[1], samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    best = 0.0
    for _ in range(100):  # ascent: the function is convex on each cone, so its gradient normalized does not descend
        U = U / U.norm(dim=0).clamp(min=1e-300)
        hidden = (X @ U).clamp(min=0)
        ahead = V.mT @ hidden
        best = max(best, float(ahead.norm(dim=0).max()))
        U = X.mT @ ((hidden > 0) * (V @ ahead))
    return best, False, "sampled"


def _on_cone(X: Tensor, V: Tensor, D: Tensor) -> float:
    """Return ``max ||V^T D X u||`` over the directions of the unit ball with the pattern D; with several outputs over the whole ball.

    With one output it is the length of the projection of ``+-X^T D V`` onto the cone ``(2 D - I) X u >= 0``, by non-negative least squares.
    """
    ahead = X.mT @ (D[:, None] * V)
    if V.shape[1] > 1:
        return _norm(ahead)
    sides = ((2 * D - 1)[:, None] * X).mT.numpy()
    return max(nnls(sides, -sign * ahead[:, 0].numpy())[1] for sign in (1, -1))


def two_layers(model: nn.Module) -> tuple[Tensor, Tensor, bool]:
    """Return both weights ``(out, in)`` of a network of two linear layers, and whether a ReLU is between them; in float64."""
    layers = [layer for layer in model if not isinstance(layer, nn.Identity)] if isinstance(model, nn.Sequential) else [model]
    kinds = "".join(
        "L" if isinstance(layer, nn.Linear) and has_matrix(layer) else "R" if isinstance(layer, nn.ReLU) else "?" for layer in layers
    )
    if kinds not in ("LL", "LRL"):
        problem = "is not two linear layers with or without a ReLU between them"
        raise LayerError(type(model).__name__, problem, hint="for deeper networks no bound of this kind holds")
    ends: list[Any] = [layers[0], layers[-1]]
    if any(layer.bias is not None for layer in ends):
        raise LayerError(type(model).__name__, "has biases", hint="append a column of ones to the inputs, and use bias=False")
    first, second = ((layer.weight.detach() + 0).double() for layer in ends)
    return first, second, kinds == "LRL"
