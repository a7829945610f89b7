"""Ranks of noisy matrices by the posterior, beside other rules; ten seconds.

python benchmarks/analysis/bayes.py    # writes benchmarks/results/analysis/bayes.json
"""

from typing import Any

import torch
from torch import Tensor

import spectrim as sp
from common import SEEDS, write
from spectrim.analysis.bayes import PosteriorRank, bayes_svd
from spectrim.layers import named_factors

SHAPE, NOISE, DRAWS = (20, 30), 0.1, 100
CASES = {"5, 3, 2": (5.0, 3.0, 2.0), "2, 1.5, 1": (2.0, 1.5, 1.0), "1.5, 1, 0.7": (1.5, 1.0, 0.7), "none": ()}


def drawn(seed: int, strengths: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, 3).double()).Q[:, : len(strengths)] for size in SHAPE)
    signal = (U * torch.tensor(strengths).double()) @ V.mT
    return signal, signal + NOISE * torch.randn(SHAPE).double()


def ranks() -> list[dict[str, Any]]:
    """Count the ranks that are found, and compare the squared error with that of the oracle: truncation at the true rank."""
    rows = []
    for name, strengths in CASES.items():
        for known in (True, False):
            found: dict[int, int] = {}
            energy: dict[int, int] = {}
            own = oracle = best = 0.0
            for seed in range(DRAWS):
                signal, Y = drawn(seed, strengths)
                made = bayes_svd(Y, NOISE if known else None)
                found[made.rank] = found.get(made.rank, 0) + 1
                U, S, Vh = torch.linalg.svd(Y, full_matrices=False)
                rule = sp.Energy(0.9)(S)
                energy[rule] = energy.get(rule, 0) + 1
                errors = [float(((U[:, :r] * S[:r]) @ Vh[:r] - signal).square().sum()) for r in range(7)]
                own, oracle, best = (
                    own + float((made.signal() - signal).square().sum()),
                    oracle + errors[len(strengths)],
                    best + min(errors),
                )
            row = {
                "strengths": name,
                "noise_known": known,
                "ranks": dict(sorted(found.items())),
                "energy_0.9": dict(sorted(energy.items())),
            }
            rows.append(row | {"error": own / DRAWS, "oracle_error": oracle / DRAWS, "best_truncation_error": best / DRAWS})
    return rows


def networks() -> list[dict[str, Any]]:
    """Apply the rule to trained networks, and to the same shapes with random weights."""
    from spectrim import zoo

    rows = []
    for name, make in {"resnet20": zoo.resnet20, "random": zoo.resnet20}.items():
        model = sp.factorize(make(pretrained="akamaster") if name == "resnet20" else make())
        shares = []
        for _, factors in named_factors(model):
            ratio = max(factors.shape) / min(factors.shape)
            shares.append(PosteriorRank(ratio=ratio)(factors.spectrum()) / factors.full_rank)
        rows.append({"network": name, "layers": len(shares), "mean_share_of_full_rank": sum(shares) / len(shares), "least": min(shares)})
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(SEEDS[0])
    write("bayes", {"settings": {"shape": SHAPE, "noise": NOISE, "draws": DRAWS}, "ranks": ranks(), "networks": networks()})
