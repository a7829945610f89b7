"""Rank and singular values of a noisy matrix, by a prior that shrinks later components ever harder."""

import math
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from spectrim import linalg
from spectrim.errors import SettingError

TRACY_WIDOM = (-1.2065, 1.2680)
"""Mean and standard deviation of the Tracy-Widom law of order 1."""

POINTS = 4000
"""Points at which the prior of a strength is integrated."""


@dataclass(frozen=True)
class BayesSVD:
    """A matrix as signal of low rank and noise.

    Attributes:
        rank: components that are signal with a probability above one half, from the first one on.
        inclusion: probability that each component, and all before it, is signal, ``(full,)``.
        values: strengths of the signal, descending, without what noise adds to them, ``(rank,)``.
        spread: standard deviation of each.
        noise: standard deviation of an entry.
        left: singular vectors ``(out, rank)``.
        right: singular vectors ``(rank, in)``.
        cosines: ``(rank,)``: product of the cosines between left and right singular vectors and those of the signal, as expected.
    """

    rank: int
    inclusion: Tensor
    values: Tensor
    spread: Tensor
    noise: float
    left: Tensor
    right: Tensor
    cosines: Tensor

    def signal(self) -> Tensor:
        """Return the estimate of the signal with the smallest expected squared error: each strength times its cosines."""
        return (self.left * (self.values * self.cosines)) @ self.right


def bayes_svd(Y: Tensor, noise: float | None = None, concentration: float = 1.0) -> BayesSVD:
    """Find the rank and the singular values of the signal in ``Y = signal + noise``, at the mode of the posterior.

    Component h is spike (noise) with the prior probability ``1 - (a / (1 + a))^h``, which grows with h, or slab, with an exponential
    strength. A strength ``d`` is seen as the singular value ``sqrt((d^2 + m t^2) (d^2 + n t^2)) / d`` with a deviation of ``t``, a spike
    as the largest value of the noise that is left (Tracy and Widom).

    Args:
        Y: a matrix with noise of equal variance in each entry, at least 2 x 2.
        noise: standard deviation ``t`` of an entry, > 0; estimated from the median singular value when omitted, which takes a rank below
            half the full one.
        concentration: ``a`` > 0: the expected number of slabs of the prior; a clear signal outweighs a small one.

    Raises:
        SettingError: for a matrix that is too small, or a setting outside its range.

    Examples:
        >>> draw = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
        >>> found = bayes_svd(torch.ones(20, 30) + 0.1 * draw)
        >>> found.rank, round(float(found.values[0])), round(found.noise, 1)  # the strength is sqrt(600) = 24.5
        (1, 25, 0.1)

    Source: Legramanti, Durante and Dunson, arXiv 1902.04349 (the prior of ranks); Benaych-Georges and Nadakuditi, arXiv 1103.2221 (values
        and cosines of spiked matrices); Gavish and Donoho, arXiv 1305.5870 and 1405.7511 (noise from the median; the best shrinkage).
    Deviation: singular vectors are integrated out by their asymptotic laws, instead of sampling nearly orthogonal factors; the mode
        and its curvature, no samples.
    """
    if Y.dim() != 2 or min(Y.shape) < 2 or not bool(torch.isfinite(Y).all()) or not bool(Y.any()):
        raise SettingError("bayes_svd", "Y", got=tuple(Y.shape), rule="a finite matrix, at least 2 x 2, not of zeros")
    left, S, right = linalg.svd(Y.double())
    shape = (Y.shape[0], Y.shape[1])
    level = noise_level(S, shape) if noise is None else noise
    inclusion = inclusion_of(S, shape, level, concentration)
    rank = int((inclusion > 0.5).sum())
    slab = float(S.norm())
    values = [_mode(float(s), shape, level, slab) for s in S[:rank]]
    strengths = torch.tensor([value for value, _ in values], dtype=torch.float64)
    spread = torch.tensor([deviation for _, deviation in values], dtype=torch.float64)
    cosines = cosines_of(strengths, shape, level)
    return BayesSVD(rank, inclusion, strengths, spread, level, left[:, :rank], right[:rank], cosines)


def noise_level(values: Tensor, shape: tuple[int, int]) -> float:
    """Return the standard deviation of an entry from all singular values of a matrix: their median over that of pure noise.

    Examples:
        >>> draw = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
        >>> round(noise_level(torch.linalg.svdvals(3 * draw), (200, 300)), 1)
        3.0

    Source: Gavish and Donoho, arXiv 1305.5870, section 3.
    """
    ratio = min(shape) / max(shape)
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    angle = (torch.arange(20001, dtype=torch.float64) + 0.5) / 20001 * math.pi  # t = middle - half cos(angle) evens out the edges
    t = (low + high) / 2 - (high - low) / 2 * torch.cos(angle)
    mass = torch.sin(angle) ** 2 / t
    median = float(t[int((mass.cumsum(0) < mass.sum() / 2).sum())])
    return max(float(values.double().median()) / math.sqrt(max(shape) * median), 1e-12 * float(values.max()), 1e-300)


def inclusion_of(values: Tensor, shape: tuple[int, int], noise: float, concentration: float = 1.0) -> Tensor:
    """Return the probability that each component, and all before it, is signal.

    Args:
        values: singular values, in any order.
        shape: of the matrix.
        noise: standard deviation of an entry, > 0.
        concentration: > 0, see `bayes_svd`.
    """
    for name, value in (("noise", noise), ("concentration", concentration)):
        if not 0 < value < math.inf:
            raise SettingError("bayes_svd", name, got=value, rule="a finite number > 0")
    S = values.detach().double().sort(descending=True).values
    slab = float(S.norm())
    kept = concentration / (1 + concentration)
    found, before = [], 1.0
    for h, s in enumerate(S.tolist()):
        left = (max(shape[0] - h, 1), max(shape[1] - h, 1))
        odds = (h + 1) * math.log(kept) - math.log1p(-(kept ** (h + 1)))
        odds += _log_slab(s, left, noise, slab) - _log_spike(s, left, noise)
        before = min(before, 1 / (1 + math.exp(-max(-700.0, min(700.0, odds)))))
        found.append(before)
    return torch.tensor(found, dtype=torch.float64)


def edge_of(shape: tuple[int, int], noise: float) -> tuple[float, float]:
    """Return mean and standard deviation of the largest singular value of noise."""
    small, large = math.sqrt(max(min(shape) - 1, 0.5)), math.sqrt(max(shape))
    center, scale = (small + large) ** 2, (small + large) * (1 / small + 1 / large) ** (1 / 3)
    mean, deviation = TRACY_WIDOM
    top = math.sqrt(max(center + mean * scale, 0.25 * center))
    return noise * top, noise * deviation * scale / (2 * top)


def seen(strength: Tensor, shape: tuple[int, int], noise: float) -> Tensor:
    """Return the singular value as which a strength is seen; that of the noise where it is below the threshold."""
    m, n = shape
    square = strength.clamp(min=noise * (m * n) ** 0.25).square()
    return ((square + m * noise**2) * (square + n * noise**2) / square).sqrt()


def cosines_of(strength: Tensor, shape: tuple[int, int], noise: float) -> Tensor:
    """Return the product of the cosines between the singular vectors of the noisy matrix and those of the signal."""
    m, n = shape
    square = (strength / noise).square()
    first = (square.square() - m * n) / (square * (square + n))
    second = (square.square() - m * n) / (square * (square + m))
    return (first * second).clamp(min=0).sqrt()


def _log_spike(s: float, shape: tuple[int, int], noise: float) -> float:
    """Return the log density of the largest value of noise; below its mean as high as there, as smaller values are no sign of signal."""
    mean, deviation = edge_of(shape, noise)
    return -0.5 * (max(0.0, s - mean) / deviation) ** 2 - math.log(deviation)


def _log_slab(s: float, shape: tuple[int, int], noise: float, slab: float) -> float:
    """Return the log density of a value under an exponential strength of mean `slab` above the threshold, by integration.

    Weaker strengths cannot be told from noise and count as such. The deviation of what is seen goes from that of noise, at the threshold,
    to `noise`.
    """
    threshold = noise * (shape[0] * shape[1]) ** 0.25
    strengths = torch.linspace(threshold, threshold + 3 * slab, POINTS, dtype=torch.float64)
    around = seen(strengths, shape, noise)
    least = edge_of(shape, noise)[1]
    deviation = noise * (1 - (threshold / strengths) ** 4).clamp(min=min(1.0, least / noise) ** 2).sqrt()
    logs = -strengths / slab - 0.5 * ((s - around) / deviation).square() - deviation.log() - math.log(slab)
    return float(torch.logsumexp(logs, 0)) + math.log(3 * slab / POINTS)


def _mode(s: float, shape: tuple[int, int], noise: float, slab: float) -> tuple[float, float]:
    """Return the strength at the mode of the posterior, and its standard deviation from the curvature there."""

    def cost(strength: float) -> float:
        return strength / slab + 0.5 * ((s - float(seen(torch.tensor(strength, dtype=torch.float64), shape, noise))) / noise) ** 2

    threshold = noise * (shape[0] * shape[1]) ** 0.25
    best = float(minimize_scalar(cost, bounds=(threshold, max(s, 1.001 * threshold)), method="bounded", options={"xatol": 1e-9 * s}).x)
    step = 1e-3 * max(noise, 1e-6 * s)
    curvature = (cost(best + step) - 2 * cost(best) + cost(best - step)) / step**2
    return best, 1 / math.sqrt(max(curvature, 1e-12 / noise**2))


@dataclass(frozen=True)
class PosteriorRank:
    """A rank rule: the components that are more likely signal than noise, at least 1; see `bayes_svd`.

    The bulk of a spectrum is taken for noise, also where it is not: of a trained network it cuts most. A rule sees singular values only, so
    the shape of the matrix is given by its ratio.

    Args:
        ratio: larger side over smaller side, >= 1.
        noise: standard deviation of an entry, > 0; from the median singular value when omitted.
        concentration: > 0: expected number of components of the prior.

    Raises:
        SettingError: for a setting outside its range.

    Examples:
        >>> noise = torch.linalg.svdvals(torch.randn(40, 40, generator=torch.Generator().manual_seed(0)))
        >>> PosteriorRank()(torch.cat([torch.tensor([50.0, 30.0]), noise[2:]]))
        2

    Source: see `bayes_svd`.
    """

    ratio: float = 1.0
    noise: float | None = None
    concentration: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.ratio < math.inf:
            raise SettingError("PosteriorRank", "ratio", got=self.ratio, rule="a finite number >= 1")
        for name in ("noise", "concentration"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SettingError("PosteriorRank", name, got=value, rule="a finite number > 0")

    def __call__(self, singular_values: Tensor) -> int:
        """Return the rank, in ``[1, full]``."""
        values = singular_values.detach().double().abs()
        if len(values) < 2 or float(values.max()) == 0:
            return 1
        shape = (len(values), round(self.ratio * len(values)))
        noise = noise_level(values, shape) if self.noise is None else self.noise
        return max(1, int((inclusion_of(values, shape, noise, self.concentration) > 0.5).sum()))
