"""Networks with weight decay whose optimum has a closed form."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from torch import Tensor

from spectrim.errors import SettingError

WHITE = 1e-6
"""Largest deviation from the identity, relative, of data that count as whitened."""


@dataclass(frozen=True)
class Optimum:
    """The best a network without biases can do: ``min 1/2 ||f(X) - Y||_F^2 + decay / 2 sum_l ||W_l||_F^2``.

    Attributes:
        loss: its value, weight decay included.
        weights: of the layers as `nn.Linear` has them, ``(out, in)``; an optimum, one of many.
        strengths: how much of the target each path carries, descending, before the decay; those that do not survive included.
        rank: paths that survive: the rank of every layer.
    """

    loss: float
    weights: tuple[Tensor, ...]
    strengths: Tensor
    rank: int


def path_scale(strength: float, decay: float, layers: int = 2, curvature: float = 1.0) -> float:
    """Return the scale ``s >= 0`` of each of `layers` weights on a path that minimizes ``c s^2L / 2 - v s^L + decay L s^2 / 2``.

    Stationary where ``s^(L-2) (v - c s^L) = decay``; the larger root is the minimum, and for three layers and more it is compared with 0.

    Args:
        strength: ``v``, >= 0: how much of the target the path can carry.
        decay: >= 0.
        layers: ``L``, >= 2.
        curvature: ``c``, > 0.

    Examples:
        >>> path_scale(5.0, decay=1.0)  # two layers: s^2 = v - decay
        2.0
        >>> path_scale(1.0, decay=1.0)
        0.0
    """
    v, c, L = float(strength), float(curvature), layers
    if v <= 0:
        return 0.0
    if L == 2:
        return math.sqrt(max(0.0, v - decay) / c)

    def slope(s: float) -> float:
        return s ** (L - 2) * (v - c * s**L) - decay

    peak = (v * (L - 2) / (c * (2 * L - 2))) ** (1 / L)
    if slope(peak) <= 0:
        return 0.0
    found = float(brentq(slope, peak, (1 + 1e-9) * (v / c) ** (1 / L), xtol=1e-15))
    return found if path_cost(found, v, decay, L, c) < 0 else 0.0


def path_cost(scale: float, strength: float, decay: float, layers: int = 2, curvature: float = 1.0) -> float:
    """Return what a path adds to the loss: 0 for the path that is not used."""
    return curvature * scale ** (2 * layers) / 2 - strength * scale**layers + decay * layers * scale**2 / 2


def linear_optimum(inputs: Tensor, targets: Tensor, decay: float, layers: int = 2) -> Optimum:
    """Return the optimum of a deep linear network on whitened data.

    With the SVD ``X^T Y = A diag(v) B^T`` each singular direction is a path, and neighboring layers share singular vectors. Two layers:
    ``(v - decay)_+``, the minimum of ``1/2 ||W - X^T Y||^2 + decay ||W||_*``.

    Args:
        inputs: ``(n, in)`` with ``X^T X = I`` or ``X X^T = I``.
        targets: ``(n, out)``.
        decay: >= 0.
        layers: >= 2; hidden layers have ``min(in, out)`` units.

    Raises:
        SettingError: for data that are not whitened; `certificate` bounds the loss on any data.

    Examples:
        >>> linear_optimum(torch.eye(2), torch.diag(torch.tensor([5.0, 0.5])), decay=1.0).rank
        1

    Source: Ergen and Pilanci, arXiv 2002.09773.
    Deviation: all layers are decayed, as weight decay does; the paper decays the last two and bounds the norms of the others.
    """
    X, Y = checked("linear_optimum", inputs, targets, decay, layers)
    _white("linear_optimum", X, (0, 1))
    A, v, Bh = torch.linalg.svd(X.mT @ Y, full_matrices=False)
    scales = torch.tensor([path_scale(one, decay, layers) for one in v.tolist()], dtype=torch.float64)
    middle = [torch.diag(scales)] * (layers - 2)
    weights = (scales[:, None] * A.mT, *middle, Bh.mT * scales)
    return _optimum(Y, weights, v, scales, decay, layers)


def relu_optimum(inputs: Tensor, targets: Tensor, decay: float, layers: int = 2) -> Optimum:
    """Return the optimum of a deep ReLU network on whitened examples with one-hot targets.

    Each class of ``n_r`` examples is a path of strength ``sqrt(n_r)``: a class survives the decay or is given up, and every layer has as
    many directions as classes survive. With BatchNorm before the last ReLU the value is the same for any data with enough features.

    Args:
        inputs: ``(n, in)`` with ``X X^T = I``, so ``n <= in``.
        targets: one-hot ``(n, classes)``.
        decay: >= 0.
        layers: >= 2.

    Raises:
        SettingError: for data that are not whitened, or targets that are not one-hot.

    Examples:
        >>> relu_optimum(torch.eye(4), torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]]), decay=1.2).rank  # classes of 3 and 1
        1

    Source: Ergen and Pilanci, arXiv 2002.09773.
    Deviation: as in `linear_optimum`.
    """
    X, Y = checked("relu_optimum", inputs, targets, decay, layers)
    _white("relu_optimum", X, (1,))
    if not (bool(((Y == 0) | (Y == 1)).all()) and bool((Y.sum(1) == 1).all()) and bool((Y.sum(0) > 0).all())):
        raise SettingError("relu_optimum", "targets", got=tuple(Y.shape), rule="one-hot, each class with an example")
    v, order = Y.sum(0).sqrt().sort(descending=True)
    scales = torch.tensor([path_scale(one, decay, layers) for one in v.tolist()], dtype=torch.float64)
    first = (scales / v)[:, None] * (Y[:, order].mT @ X)
    last = torch.eye(len(v), dtype=torch.float64)[:, order].mT * scales
    return _optimum(Y, (first, *[torch.diag(scales)] * (layers - 2), last), v, scales, decay, layers)


def rank_one_optimum(column: Tensor, row: Tensor, targets: Tensor, decay: float, layers: int = 2) -> Optimum:
    """Return the optimum of a deep ReLU network on inputs of rank one, ``X = column row^T``.

    Two paths: the examples where the column is positive, and those where it is negative. With three layers and more they share the later
    layers where their targets agree, which is cheaper than two paths, so that there is a closed form for opposite ones only.

    Args:
        column: ``(n,)``.
        row: ``(in,)``.
        targets: ``(n, out)``.
        decay: >= 0.
        layers: >= 2; above 2 for one output, and sums of the targets weighted by the column of opposite signs (or zero) on both sides.

    Raises:
        SettingError: for three layers and more where both paths pull the same way.

    Examples:
        >>> column, row = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0])
        >>> round(rank_one_optimum(column, row, torch.tensor([[3.0], [0.0]]), decay=1.0).loss, 6)  # (9 - (3 - 1)^2) / 2
        2.5

    Source: Ergen and Pilanci, arXiv 2002.09773.
    Deviation: as in `linear_optimum`; the restriction for three layers and more is ours: gradient descent went below two separate paths.
    """
    column, row = column.double().flatten(), row.double().flatten()
    _, Y = checked("rank_one_optimum", torch.outer(column, row), targets, decay, layers)
    norm = row.norm()
    features = norm * torch.stack([column.clamp(min=0), (-column).clamp(min=0)])  # (2, n)
    ahead = features @ Y
    if layers > 2 and (Y.shape[1] > 1 or float(ahead.prod()) > 0):
        rule = "2, or more for one output with opposite targets on both sides"
        raise SettingError(
            "rank_one_optimum", "layers", got=layers, rule=rule, hint="else both paths share layers, and no closed form is known"
        )
    v, c = ahead.norm(dim=1), features.square().sum(1)
    scales = torch.tensor(
        [path_scale(one, decay, layers, two) if two > 0 else 0.0 for one, two in zip(v.tolist(), c.tolist(), strict=True)],
        dtype=torch.float64,
    )
    first = torch.stack([row / norm, -row / norm]) * scales[:, None]
    last = (ahead / v.clamp(min=1e-300)[:, None]).mT * scales
    weights = (first, *[torch.diag(scales)] * (layers - 2), last)
    return _optimum(Y, weights, v, scales, decay, layers, c)


def _optimum(
    Y: Tensor, weights: Sequence[Tensor], v: Tensor, scales: Tensor, decay: float, layers: int, curvature: Tensor | None = None
) -> Optimum:
    c = torch.ones_like(v) if curvature is None else curvature
    costs = [path_cost(s, one, decay, layers, two) for s, one, two in zip(scales.tolist(), v.tolist(), c.tolist(), strict=True)]
    return Optimum(float(Y.square().sum() / 2) + sum(costs), tuple(weights), v.sort(descending=True).values, int((scales > 0).sum()))


def checked(owner: str, X: Tensor, Y: Tensor, decay: float, layers: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets as matrices in float64."""
    if Y.dim() == 1 and not Y.is_floating_point():
        rule, hint = "numbers, a column for each output", "torch.nn.functional.one_hot(classes) of classes"
        raise SettingError(owner, "targets", got=f"{Y.dtype} of shape {tuple(Y.shape)}", rule=rule, hint=hint)
    Y = Y[:, None] if Y.dim() == 1 else Y
    if X.dim() != 2 or Y.dim() != 2 or len(X) != len(Y):
        raise SettingError(owner, "inputs and targets", got=(tuple(X.shape), tuple(Y.shape)), rule="matrices with a row for each example")
    if not len(X) or not bool(torch.isfinite(X).all()) or not bool(torch.isfinite(Y).all()):
        raise SettingError(owner, "inputs and targets", got=f"{len(X)} examples", rule="finite numbers of one example at least")
    if not 0 <= decay < math.inf:
        raise SettingError(owner, "decay", got=decay, rule="a finite number >= 0")
    if isinstance(layers, bool) or layers < 2:
        raise SettingError(owner, "layers", got=layers, rule="an integer >= 2")
    return X.detach().double(), Y.detach().double()


def _white(owner: str, X: Tensor, sides: Sequence[int]) -> None:
    for side in sides:
        gram = X @ X.mT if side else X.mT @ X
        if float((gram - torch.eye(len(gram), dtype=gram.dtype)).norm()) <= WHITE * math.sqrt(len(gram)):
            return
    rule = "whitened, X X^T = I" + (" or X^T X = I" if 0 in sides else "")
    raise SettingError(owner, "inputs", got=tuple(X.shape), rule=rule, hint="multiply by the inverse root of the Gram matrix")
