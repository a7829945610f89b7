"""Rounding of a matrix to levels, so that later entries make up for the errors of earlier ones, in given metrics of inputs and outputs."""

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

LARGEST = 1 << 18
"""Largest level."""

TRIES = 12
"""Attempts to factor a second moment, each with ten times the damping of the one before."""


@dataclass(frozen=True, eq=False)
class Metric:
    """A second moment, factored for rounding: ``A = M^T diag(a) M`` in the order of decisions, with unit lower triangular ``M``.

    Attributes:
        order: of decisions: entries with the largest moment first.
        mixing: ``M``, ``(n, n)``.
        weights: ``a``, ``(n,)``: what the error of each entry costs, once those that are decided later have made up for it.
    """

    order: np.ndarray
    mixing: np.ndarray
    weights: np.ndarray


def metric_of(moment: np.ndarray, damping: float) -> Metric:
    """Factor a second moment.

    Args:
        moment: ``(n, n)``, positive semi-definite.
        damping: added to the diagonal, as a share of its mean.
    """
    size = len(moment)
    mean = float(np.trace(moment)) / size
    added = damping * mean if mean > 0 else 1.0
    for _ in range(TRIES):  # of inputs that hardly vary, rounding errors of single precision are left
        damped = moment + added * np.eye(size)
        order = np.argsort(-np.diag(damped), kind="stable")
        flipped = damped[np.ix_(order, order)][::-1, ::-1]
        with suppress(np.linalg.LinAlgError):
            upper = np.linalg.cholesky(flipped)[::-1, ::-1]  # A = upper upper^T
            break
        added = 10 * max(added, 1e-12 * abs(mean))
    else:
        raise np.linalg.LinAlgError("a second moment is far from positive semi-definite")
    scale = np.diag(upper)
    return Metric(order, np.ascontiguousarray((upper / scale).T), scale**2)


def identity_metric(size: int) -> Metric:
    """Return the metric of independent entries."""
    return Metric(np.arange(size), np.eye(size), np.ones(size))


def rounded(
    weight: np.ndarray, step: float, right: Metric, left: Metric | None = None, price: float = 0.0, bits: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """Return levels ``q`` for a weight, and the distortion ``tr(G (qs - W) A (qs - W)^T)`` in the damped metrics.

    Entries are decided one after the other. With ``D = qs - W``, the distortion is ``sum_ik g_i a_k (M_G D M_A^T)_ik^2``, and the term of
    an entry depends on that entry and those decided before it: each level is chosen where its term, and `price` times its bits, is
    least. Entries on an antidiagonal do not depend on each other and are decided at once.

    Args:
        weight: ``(out, in)``.
        step: between levels.
        right: metric of the inputs.
        left: of the outputs; None for the identity.
        price: distortion that one bit is worth.
        bits: by magnitude, what a level takes with its sign; larger ones take as much as the last.

    Returns:
        ``(out, in)``, int64, and the distortion.

    Examples:
        >>> correlated = metric_of(np.array([[1.0, 0.9], [0.9, 1.0]]), 0.0)
        >>> rounded(np.array([[0.4, 0.4]]), 1.0, correlated)[0].tolist()
        [[0, 1]]

    Source: Frantar et al., arXiv 2210.17323 (inputs, one side); the nearest-plane algorithm: Babai, Combinatorica 6 (1986).
    Deviation: both sides at once, and levels are chosen by what they cost.
    """
    out, in_ = weight.shape
    rows = identity_metric(out) if left is None else left
    target = weight[np.ix_(rows.order, right.order)].astype(np.float64)
    levels = np.zeros((out, in_), np.int64)
    behind, total = np.zeros((out, in_)), 0.0  # F and E of what is decided, where it matters
    error = np.zeros((out, in_))
    if left is None:
        for column in range(in_):
            before = error[:, :column] @ right.mixing[column, :column]
            wanted = target[:, column] - before
            levels[:, column] = chosen(wanted, step, right.weights[column], price, bits)
            error[:, column] = levels[:, column] * step - target[:, column]
            total += float(right.weights[column] * ((levels[:, column] * step - wanted) ** 2).sum())
    else:
        for line in range(out + in_ - 1):
            first, last = max(0, line - out + 1), min(in_ - 1, line)  # columns; the row of a column is line - column
            columns = np.arange(first, last + 1)
            places = line - columns
            wanted = target[places, columns] - behind[places, columns] - error[places, columns]
            weights = rows.weights[places] * right.weights[columns]
            levels[places, columns] = found = chosen(wanted, step, weights, price, bits)
            total += float((weights * (found * step - wanted) ** 2).sum())
            low = int(places[-1])
            behind[low:, first : last + 1] += rows.mixing[low:, places] * (found * step - target[places, columns])
            error[places, first:] += behind[places, columns][:, None] * right.mixing[first:, columns].T
    made = np.empty_like(levels)
    made[np.ix_(rows.order, right.order)] = levels
    return made, total


def chosen(wanted: np.ndarray, step: float, weights: np.ndarray | float, price: float, bits: np.ndarray | None) -> np.ndarray:
    """Return the level of each entry: the nearest, the one nearer to zero, or zero, whichever costs least."""
    nearest = np.clip(np.rint(wanted / step), -LARGEST, LARGEST)
    if bits is None or price == 0:
        return nearest.astype(np.int64)
    best, least = nearest, np.full(wanted.shape, np.inf)
    for candidate in (nearest, nearest - np.sign(nearest), np.zeros_like(nearest)):
        cost = weights * (candidate * step - wanted) ** 2 + price * bits[np.minimum(np.abs(candidate), len(bits) - 1).astype(np.int64)]
        better = cost < least
        best, least = np.where(better, candidate, best), np.where(better, cost, least)
    return best.astype(np.int64)


def bits_of(levels: np.ndarray) -> np.ndarray:
    """Return what each magnitude takes with its sign, by how often it occurs, smoothed; up to twice the largest one."""
    counts = np.bincount(np.abs(levels).ravel())
    counts = counts[: 1 << 12].astype(np.float64)
    counts = np.concatenate([counts, np.zeros(len(counts))])
    decay = 0.5 ** (np.arange(1, len(counts) + 1))
    shares = (counts + decay) / (counts.sum() + decay.sum())
    return np.asarray(-np.log2(np.maximum(shares, 2.0**-24)) + (np.arange(len(counts)) > 0))


def entropy(levels: np.ndarray) -> float:
    """Return the bits of all levels together, by how often each occurs."""
    counts = np.unique(levels, return_counts=True)[1].astype(np.float64)
    return float(-(counts * np.log2(counts / counts.sum())).sum())
