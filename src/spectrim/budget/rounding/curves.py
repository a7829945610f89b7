"""Bits and distortion of each weight by its step, and the steps that spend a number of bits best."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from spectrim.budget.rounding.meeting import Moments
from spectrim.linalg.feedback import Metric, bits_of, chosen, entropy, metric_of, rounded

STEPS = tuple(1.25**power for power in range(-13, 7))
"""Steps that are tried, in units of the weight's root mean square: 1 is the step of a weight whose entries are 0 and plus or minus one."""

INPUTS, OUTPUTS = 0.01, 0.05
"""Damping of the second moments, as a share of the mean of their diagonals."""

WIDEST = 2048
"""Weights with more outputs than this are rounded with feedback over the inputs alone."""

LARGE = 40_000
"""Entries above which a weight is rounded roughly, with feedback over the inputs alone, where many roundings are compared."""

PRICE = 0.25
"""Share of the price of a bit that rounding itself reckons with: at the whole price it takes too many small weights to zero."""


@dataclass(frozen=True, eq=False)
class Rounding:
    """How one weight is rounded: the metrics of its inputs and outputs, by block; or the curvature that all its entries share.

    Attributes:
        matrices: the weight, ``(blocks, out, in)``.
        metrics: of inputs and outputs, for each block; empty without feedback.
        curvature: distortion of a squared change of 1, without feedback.
        kept: share of the entries that may be other than zero: those whose loss alone would cost most.
        support: the entries that are not zero in a weight that was pruned: its zeros stay; None for all.
    """

    matrices: np.ndarray
    metrics: Sequence[tuple[Metric, Metric | None]] = ()
    curvature: float = 0.0
    kept: float = 1.0
    support: np.ndarray | None = field(default=None, repr=False)

    def holding(self) -> "Rounding":
        """Return the same with the zeros of this weight held."""
        some = self.matrices != 0
        return self if some.all() else replace(self, support=some)

    @cached_property
    def size(self) -> float:
        """Root mean square of the entries that may be other than zero; 0 where there are none."""
        squares = self.matrices**2 if self.support is None else self.matrices[self.support] ** 2
        return float(np.sqrt(squares.mean())) if squares.size else 0.0

    @cached_property
    def rough(self) -> "Rounding":
        """The same for a large weight without feedback over the outputs, which takes a twentieth of the time; itself otherwise.

        The mean of what is left of the outputs' metric by their feedback stands for it.
        """
        if self.matrices.size <= LARGE or not any(left is not None for _, left in self.metrics):
            return self
        scales = [1.0 if left is None else float(left.weights.mean()) for _, left in self.metrics]
        rights = [replace(right, weights=right.weights * scale) for (right, _), scale in zip(self.metrics, scales, strict=True)]
        return replace(self, metrics=[(right, None) for right in rights])

    @cached_property
    def free(self) -> list[np.ndarray | None]:
        """Which entries may be other than zero, by block; None for all."""
        if self.kept >= 1:
            return [None] * len(self.matrices) if self.support is None else list(self.support)
        scores = np.abs(self.matrices)
        for score, (right, left) in zip(scores, self.metrics, strict=False):
            score *= _in_order(right)[None]
            score *= 1.0 if left is None else _in_order(left)[:, None]
        least = np.sort(scores, axis=None)[-max(1, int(self.kept * scores.size))]
        return list(scores >= least if self.support is None else (scores >= least) & self.support)

    def __call__(self, step: float, price: float = 0.0) -> tuple[np.ndarray, float]:
        """Return the levels, and their distortion.

        Args:
            step: between levels.
            price: of a bit.
        """
        if price and self.rough is not self:
            levels, distortion = self.rough(step)
        else:
            levels, distortion = self._once(step, 0.0, None)
        return self._once(step, PRICE * price, bits_of(levels)) if price else (levels, distortion)

    def _once(self, step: float, price: float, bits: np.ndarray | None) -> tuple[np.ndarray, float]:
        if not self.metrics:
            levels = chosen(self.matrices, step, self.curvature, price, bits)
            levels = levels if self.free[0] is None else levels * np.stack([free for free in self.free if free is not None])
            return levels, self.curvature * float(((levels * step - self.matrices) ** 2).sum())
        each = zip(self.matrices, self.metrics, self.free, strict=True)
        parts = [rounded(matrix, step, right, left, price, bits, free) for matrix, (right, left), free in each]
        return np.stack([levels for levels, _ in parts]), sum(distortion for _, distortion in parts)


def _in_order(metric: Metric) -> np.ndarray:
    """Return the root of what the error of each entry costs, in the order of the entries."""
    costs = np.empty_like(metric.weights)
    costs[metric.order] = np.sqrt(metric.weights)
    return costs


def with_feedback(matrices: Tensor, met: Moments) -> Rounding:
    """Return the rounding of a weight with known moments."""
    lefts = [None if matrices.shape[1] > WIDEST else metric_of(left.numpy(), OUTPUTS) for left in met.left.cpu()]
    if lefts and lefts[0] is None:  # its mean stands for all outputs, so that distortions stay in one unit
        scales = [float(left.diagonal().mean()) for left in met.left]
        rights = [metric_of(own.numpy() * scale, INPUTS) for own, scale in zip(met.own.cpu(), scales, strict=True)]
    else:
        rights = [metric_of(own.numpy(), INPUTS) for own in met.own.cpu()]
    return Rounding(matrices.cpu().numpy(), list(zip(rights, lefts, strict=True)))


def towards(matrices: Tensor, met: Moments, ridge: float = 0.01) -> Tensor:
    """Return the weight that makes up best for what the output lacks: ``W + C (A + r I)^-1``, with ``C`` the cross moment.

    Args:
        matrices: the weight, ``(blocks, out, in)``.
        met: beside the dense network.
        ridge: ``r``, as a share of the mean of the diagonal of ``A``.
    """
    share = ridge * met.own.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(met.own.shape[-1], dtype=met.own.dtype) * share.clamp_min(1e-30)[:, None, None]
    change: Tensor = torch.linalg.solve(met.own + eye, met.cross.mT).mT
    return matrices + change


@dataclass(frozen=True)
class Curve:
    """The steps of one weight that are tried, and what each costs.

    Attributes:
        steps: ascending.
        bits: of all entries, by how often each level occurs.
        distortions: mean squared change of the network's outputs, summed over outputs, as the second moments predict it.
    """

    steps: tuple[float, ...]
    bits: tuple[float, ...] = field(repr=False)
    distortions: tuple[float, ...] = field(repr=False)

    def best(self, price: float) -> int:
        """Return the place of the step that costs least at a price of a bit."""
        return min(range(len(self.steps)), key=lambda place: self.distortions[place] + price * self.bits[place])


def curve_of(rounding: Callable[[float], tuple[np.ndarray, float]], size: float) -> Curve:
    """Round a weight at each step, and return what that costs.

    Args:
        rounding: of a step.
        size: root mean square of the weight; 0 for a weight of zeros.
    """
    steps = tuple(share * (size or 1.0) for share in STEPS)
    made = [rounding(step) for step in steps]
    return Curve(steps, tuple(entropy(levels) for levels, _ in made), tuple(distortion for _, distortion in made))


def bits_at(curves: Mapping[str, Curve], price: float) -> float:
    """Return the bits of all weights at a price."""
    return sum((curve.bits[curve.best(price)] for curve in curves.values()), 0.0)


def price_for(curves: Mapping[str, Curve], bits: float) -> float:
    """Return the lowest price of a bit at which the weights take no more than `bits` together; see `lowest_price`."""
    return lowest_price(lambda price: bits_at(curves, price), bits)


def lowest_price(taken: Callable[[float], float], bits: float) -> float:
    """Return the lowest price of a bit at which no more than `bits` are taken, or, where they are too few, the fewest that any price takes.

    At one price for all weights, no bit would lower the distortion more in another weight: the Lagrangian condition.

    Args:
        taken: bits at a price; falls as the price rises.
        bits: that may be taken.
    """
    low, high = 1e-18, 1e12
    bits = max(bits, taken(high))
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if taken(middle) > bits else (low, middle)
    return high
