"""Rank and strengths of noisy matrices; the error beside the oracle's; what the laws of spiked matrices say."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectrim.analysis.bayes import PosteriorRank, bayes_svd, cosines_of, edge_of, inclusion_of, noise_level, seen
from spectrim.errors import SettingError
from spectrim.protocols import RankRule

SHAPE, NOISE = (20, 30), 0.1
STRENGTHS = (5.0, 3.0, 2.0)


def matrices(seed: int, strengths: tuple[float, ...] = STRENGTHS, shape: tuple[int, int] = SHAPE) -> tuple[Tensor, Tensor]:
    """Return a signal and the signal with noise."""
    torch.manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, max(1, len(strengths))).double()).Q for size in shape)
    signal = (U[:, : len(strengths)] * torch.tensor(strengths).double()) @ V[:, : len(strengths)].mT
    return signal, signal + NOISE * torch.randn(shape).double()


@pytest.mark.parametrize("noise", [NOISE, None])
def test_rank_three_is_found_with_an_error_near_that_of_the_oracle(noise: float | None) -> None:
    ratios = []
    for seed in range(10):
        signal, Y = matrices(seed)
        found = bayes_svd(Y, noise)
        assert found.rank == 3
        U, S, Vh = torch.linalg.svd(Y, full_matrices=False)
        errors = [float(((U[:, :r] * S[:r]) @ Vh[:r] - signal).norm()) for r in range(8)]
        own = float((found.signal() - signal).norm())
        assert own <= 1.1 * errors[3]
        assert own < min(errors[r] for r in (0, 1, 2, 4, 5))
        ratios.append(own / errors[3])
        torch.testing.assert_close(found.values, torch.tensor(STRENGTHS).double(), rtol=0, atol=4 * NOISE)
        assert bool((found.spread - NOISE).abs().lt(0.05).all())
    assert sum(ratios) / len(ratios) < 1  # shrinkage is better than the oracle's plain truncation


ORACLE = json.loads((Path(__file__).parent / "oracles" / "bayes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", ORACLE["cases"])
def test_values_spread_and_error_are_those_of_the_sampled_posterior(case: str) -> None:
    """Numbers of NumPyro, sampling the model of rank three with orthonormal factors; made once by ``oracles/bayes.py``."""
    sampled = ORACLE["cases"][case]
    Y, signal = (torch.tensor(sampled[name], dtype=torch.float64) for name in ("Y", "signal"))
    found = bayes_svd(Y, ORACLE["noise"])
    assert max(sampled["r_hat"]) < 1.02  # the chains agree
    assert found.rank == len(sampled["values"])
    values, spread = (torch.tensor(sampled[name], dtype=torch.float64) for name in ("values", "spread"))
    assert float(((found.values - values) / spread).abs().max()) < 0.5
    assert bool(((found.spread / spread).log().abs() < math.log(1.25)).all())
    assert float((found.signal() - signal).square().sum()) <= 1.1 * sampled["squared_error_of_the_mean"]


def test_noise_alone_has_rank_zero_and_a_signal_below_the_edge_is_not_seen() -> None:
    assert sum(bayes_svd(matrices(seed, ())[1], NOISE).rank for seed in range(20)) <= 1
    quiet = next(found for seed in range(20) if (found := bayes_svd(matrices(seed, ())[1], NOISE)).rank == 0)
    assert float(quiet.signal().abs().max()) == 0
    assert sum(bayes_svd(matrices(seed, (0.3,))[1], NOISE).rank for seed in range(20)) <= 2  # the threshold is 0.49


def test_the_noise_level_is_that_of_the_noise() -> None:
    for shape in ((40, 40), (40, 160)):
        Y = matrices(0, STRENGTHS, shape)[1]
        assert noise_level(torch.linalg.svdvals(Y), shape) == pytest.approx(NOISE, rel=0.1)


def test_strengths_are_seen_as_the_law_of_spiked_matrices_says_by_hand() -> None:
    """m = 4, n = 9, noise 1, strength 6: ``sqrt((36 + 4) (36 + 9)) / 6 = 7.07``; cosines ``sqrt((1296 - 36)^2 / (36 * 45 * 36 * 40))``."""
    six = torch.tensor([6.0]).double()
    assert float(seen(six, (4, 9), 1.0)) == pytest.approx(math.sqrt(50))
    assert float(cosines_of(six, (4, 9), 1.0)) == pytest.approx(1260 / (36 * math.sqrt(45 * 40)))
    assert float(seen(torch.tensor([0.1]).double(), (4, 9), 1.0)) == pytest.approx(5.0)  # sqrt(4) + sqrt(9), the edge


def test_the_edge_is_that_of_drawn_noise() -> None:
    torch.manual_seed(0)
    tops = torch.linalg.matrix_norm(NOISE * torch.randn(2000, *SHAPE).double(), 2)
    mean, deviation = edge_of(SHAPE, NOISE)
    assert float(tops.mean()) == pytest.approx(mean, rel=0.02)
    assert float(tops.std()) == pytest.approx(deviation, rel=0.15)


def test_inclusion_falls_with_the_component_and_rises_with_its_value() -> None:
    values = torch.tensor([5.0, 1.4, 1.2, 0.9, 0.5]).double()
    inclusion = inclusion_of(values, SHAPE, NOISE)
    assert inclusion.tolist() == sorted(inclusion.tolist(), reverse=True)
    places = [float(inclusion_of(torch.tensor([5.0, 1.4, value, 0.5]).double(), SHAPE, NOISE)[2]) for value in (0.9, 1.0, 1.1, 1.2)]
    assert places == sorted(places)
    assert places[0] < 0.1 < 0.9 < places[-1]
    assert inclusion_of(values, SHAPE, NOISE, concentration=0.01)[2] < inclusion_of(values, SHAPE, NOISE, concentration=100.0)[2]


def test_the_rule_is_a_rank_rule() -> None:
    rule = PosteriorRank(ratio=1.5)
    assert isinstance(rule, RankRule)
    values = torch.linalg.svdvals(matrices(0)[1])
    assert rule(values) == rule(values.flip(0)) == rule(10 * values) == 3
    assert PosteriorRank(ratio=1.5, noise=NOISE)(values) == 3
    assert rule(torch.zeros(4)) == rule(torch.ones(1)) == 1


def test_what_is_no_noisy_matrix_is_refused() -> None:
    with pytest.raises(SettingError, match="a finite matrix, at least 2 x 2"):
        bayes_svd(torch.ones(1, 5))
    with pytest.raises(SettingError, match="noise must be a finite number > 0"):
        bayes_svd(torch.randn(4, 4), noise=0.0)
    with pytest.raises(SettingError, match="concentration"):
        PosteriorRank(concentration=-1.0)
    with pytest.raises(SettingError, match="ratio"):
        PosteriorRank(ratio=0.5)
