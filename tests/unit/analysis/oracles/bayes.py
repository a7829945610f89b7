"""Posterior of a noisy matrix by sampling, with NumPyro: the numbers that `test_bayes.py` compares with.

The whole model of each rank k, with orthonormal factors: ``Y = U diag(d) V^T + E``, ``U`` and ``V`` uniform over matrices with k
orthonormal columns, ``d`` exponential; NUTS. Evidence by thermodynamic integration over tempered posteriors, ``log Z = int_0^1 E_t[log
likelihood] dt``. With the prior of the ranks, ``a / (1 + a)`` to the power of h for each slab and the rest spikes at zero, it gives the
posterior of the rank. (Spikes and slabs in one model do not mix: a first attempt stayed at the rank where each chain began.) A few minutes:

    pip install numpyro==0.22.0        # into an environment of its own
    python tests/unit/analysis/oracles/bayes.py    # writes bayes.json beside it
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro.infer import MCMC, NUTS, init_to_value

SHAPE, NOISE, RANKS, CONCENTRATION = (20, 30), 0.1, (2, 3, 4), 1.0
CASES = {"clear": (5.0, 3.0, 2.0), "weaker": (2.0, 1.5, 1.0)}
TEMPERATURES = np.linspace(0, 1, 11) ** 4
WARMUP, SAMPLES = 150, 150


def drawn(strengths: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return a signal and the signal with noise, rounded so that the file holds what was sampled."""
    random = np.random.default_rng(0)
    U, V = (np.linalg.qr(random.standard_normal((size, len(strengths))))[0] for size in SHAPE)
    signal = np.round(U * strengths @ V.T, 5)
    return signal, np.round(signal + NOISE * random.standard_normal(SHAPE), 5)


def model(Y: jax.Array, slab: float, temperature: float, *, rank: int) -> None:
    """Sample orthonormal factors as QR factors of Gaussian matrices."""
    A, B = (numpyro.sample(name, dist.Normal(0, 1).expand((size, rank)).to_event(2)) for name, size in zip("AB", SHAPE, strict=True))
    d = numpyro.sample("d", dist.Exponential(1 / slab).expand((rank,)).to_event(1))
    signal = numpyro.deterministic("signal", (jnp.linalg.qr(A)[0] * d) @ jnp.linalg.qr(B)[0].T)
    likelihood = numpyro.deterministic("likelihood", dist.Normal(signal, NOISE).log_prob(Y).sum())
    numpyro.factor("tempered", temperature * likelihood)


def sampled(Y: np.ndarray, rank: int) -> tuple[float, dict[str, np.ndarray]]:
    """Return the log evidence of a rank, and the samples of its posterior; each chain starts from the SVD of the data."""
    U, S, Vh = np.linalg.svd(Y, full_matrices=False)
    sides = [np.linalg.qr(side[:, :rank]) for side in (U, Vh.T)]
    start = {name: jnp.asarray(4 * Q * np.sign(np.diag(R))) for name, (Q, R) in zip("AB", sides, strict=True)} | {
        "d": jnp.asarray(S[:rank])
    }
    chain = MCMC(
        NUTS(partial(model, rank=rank), init_strategy=init_to_value(values=start)),
        num_warmup=WARMUP,
        num_samples=SAMPLES,
        progress_bar=False,
        jit_model_args=True,
    )
    heights, found = [], {}
    for number, temperature in enumerate(TEMPERATURES):
        chain.run(jax.random.PRNGKey(number), Y=jnp.asarray(Y), slab=float(np.linalg.norm(S)), temperature=temperature)
        found = {name: np.asarray(values) for name, values in chain.get_samples().items()}
        heights.append(float(found["likelihood"].mean()))
    return float(np.trapezoid(heights, TEMPERATURES)), found


def summary(strengths: tuple[float, ...]) -> dict[str, object]:
    """Return what the test needs of one case."""
    signal, Y = drawn(strengths)
    evidence, by_rank = {}, {}
    for rank in RANKS:
        evidence[rank], by_rank[rank] = sampled(Y, rank)
    kept = (CONCENTRATION / (1 + CONCENTRATION)) ** np.arange(1, max(RANKS) + 1)
    logs = {rank: evidence[rank] + np.log(kept[:rank]).sum() + np.log1p(-kept[rank:]).sum() for rank in RANKS}
    best = max(logs, key=lambda rank: logs[rank])
    values = np.sort(by_rank[best]["d"], axis=1)[:, ::-1]
    return {
        "strengths": strengths,
        "Y": Y.tolist(),
        "signal": signal.tolist(),
        "log_posterior": {str(rank): round(float(logs[rank] - logs[best]), 2) for rank in RANKS},
        "rank": best,
        "values": values.mean(0).round(4).tolist(),
        "spread": values.std(0).round(4).tolist(),
        "squared_error_of_the_mean": round(float(((by_rank[best]["signal"].mean(0) - signal) ** 2).sum()), 4),
    }


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    made = {"made by": f"numpyro {numpyro.__version__}, jax {jax.__version__}", "noise": NOISE, "warmup, samples": [WARMUP, SAMPLES]}
    made |= {"cases": {name: summary(case) for name, case in CASES.items()}}
    Path(__file__).with_suffix(".json").write_text(json.dumps(made) + "\n", encoding="utf-8")
