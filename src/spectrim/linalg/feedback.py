"""Rounding of a matrix to levels, so that later entries make up for the errors of earlier ones, in given metrics of inputs and outputs."""

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

LARGEST = 1 << 18
"""Largest level."""

BLOCK = 64
"""Rows and columns of a block of entries that are decided one antidiagonal after the other."""

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


def rounded(
    weight: np.ndarray,
    step: float,
    right: Metric,
    left: Metric | None = None,
    price: float = 0.0,
    bits: np.ndarray | None = None,
    kept: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """Return levels ``q`` for a weight, and the distortion ``tr(G (qs - W) A (qs - W)^T)`` in the damped metrics.

    Entries are decided one after the other. With ``D = qs - W``, the distortion is ``sum_ik g_i a_k (M_G D M_A^T)_ik^2``, and the term of
    an entry depends on that entry and those decided before it: each level is chosen where its term, and `price` times its bits, is
    least. Blocks of entries follow each other, so that most of the work is products of matrices; inside a block, entries on an
    antidiagonal do not depend on each other and are decided at once.

    Args:
        weight: ``(out, in)``.
        step: between levels.
        right: metric of the inputs.
        left: of the outputs; None for the identity.
        price: distortion that one bit is worth.
        bits: by magnitude, what a level takes with its sign; larger ones take as much as the last.
        kept: ``(out, in)``, False where the level has to be 0; all are free when omitted.

    Returns:
        ``(out, in)``, int64, and the distortion.

    Examples:
        >>> correlated = metric_of(np.array([[1.0, 0.9], [0.9, 1.0]]), 0.0)
        >>> rounded(np.array([[0.4, 0.4]]), 1.0, correlated)[0].tolist()
        [[0, 1]]

    Source: Frantar et al., arXiv 2210.17323 (inputs, one side; blocks); the nearest-plane algorithm: Babai, Combinatorica 6 (1986).
    Deviation: both sides at once, and levels are chosen by what they cost.
    """
    order = np.arange(len(weight)) if left is None else left.order
    inside = np.ix_(order, right.order)
    target, free = weight[inside].astype(np.float64), None if kept is None else kept[inside]
    decide = _Decisions(step, price, bits)
    levels = _one_sided(target, free, right, decide) if left is None else _two_sided(target, free, right, left, decide)
    made = np.empty_like(levels)
    made[inside] = levels
    return made, decide.distortion


@dataclass
class _Decisions:
    """Decides levels, and adds up what they cost."""

    step: float
    price: float
    bits: np.ndarray | None
    distortion: float = 0.0

    def __call__(self, wanted: np.ndarray, weights: np.ndarray | float, free: np.ndarray | None) -> np.ndarray:
        levels = chosen(wanted, self.step, weights, self.price, self.bits)
        if free is not None:
            levels = levels * free
        self.distortion += float((weights * (levels * self.step - wanted) ** 2).sum())
        return levels


def _one_sided(target: np.ndarray, free: np.ndarray | None, right: Metric, decide: _Decisions) -> np.ndarray:
    """Decide one column after the other."""
    out, in_ = target.shape
    levels, error = np.zeros((out, in_), np.int64), np.zeros((out, in_))
    for start in range(0, in_, BLOCK):
        end = min(in_, start + BLOCK)
        behind = error[:, :start] @ right.mixing[start:end, :start].T
        for column in range(start, end):
            wanted = target[:, column] - behind[:, column - start] - error[:, start:column] @ right.mixing[column, start:column]
            levels[:, column] = found = decide(wanted, right.weights[column], None if free is None else free[:, column])
            error[:, column] = found * decide.step - target[:, column]
    return levels


def _two_sided(target: np.ndarray, free: np.ndarray | None, right: Metric, left: Metric, decide: _Decisions) -> np.ndarray:
    """Decide block by block, rows of blocks from the top."""
    out, in_ = target.shape
    levels, error, mixed = np.zeros((out, in_), np.int64), np.zeros((out, in_)), np.zeros((out, in_))
    for top in range(0, out, BLOCK):
        rows = slice(top, min(out, top + BLOCK))
        above = left.mixing[rows, :top] @ mixed[:top]
        own = left.mixing[rows, rows]
        for first in range(0, in_, BLOCK):
            columns = slice(first, min(in_, first + BLOCK))
            known = above[:, columns] + own @ (error[rows, :first] @ right.mixing[columns, :first].T)
            inside = None if free is None else free[rows, columns]
            weights = np.outer(left.weights[rows], right.weights[columns])
            levels[rows, columns] = _block(target[rows, columns], known, own, right.mixing[columns, columns], weights, inside, decide)
            error[rows, columns] = levels[rows, columns] * decide.step - target[rows, columns]
        mixed[rows] = error[rows] @ right.mixing.T
    return levels


def _block(
    target: np.ndarray,
    known: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    weights: np.ndarray,
    free: np.ndarray | None,
    decide: _Decisions,
) -> np.ndarray:
    """Decide a block, one antidiagonal after the other; `known` is what entries outside of it have done."""
    out, in_ = target.shape
    levels = np.zeros((out, in_), np.int64)
    open_, behind, error = target - known, np.zeros((out, in_)), np.zeros((out, in_))
    for line in range(out + in_ - 1):
        columns = np.arange(max(0, line - out + 1), min(in_ - 1, line) + 1)  # the row of a column is line - column
        places = line - columns
        first, last, low = int(columns[0]), int(columns[-1]) + 1, int(places[-1])
        wanted = open_[places, columns] - behind[places, columns] - error[places, columns]
        levels[places, columns] = found = decide(wanted, weights[places, columns], None if free is None else free[places, columns])
        behind[low:, first:last] += left[low:, places] * (found * decide.step - target[places, columns])
        error[places, first:] += behind[places, columns][:, None] * right[first:, columns].T
    return levels


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
