"""Posterior of a noisy matrix by sampling, with NumPyro: the numbers that `test_bayes.py` compares with.

The model at the true rank, with orthonormal factors: ``Y = U diag(d) V^T + E``, ``U`` and ``V`` uniform over matrices with orthonormal
columns, ``d`` exponential; NUTS, several chains, each from the SVD of the data, with the split R-hat of the strengths. The rank itself is
not sampled: spikes and slabs in one model stayed at the rank where each chain began, and evidence by thermodynamic integration did not
converge in a time that is worth it. Nor do chains agree (R-hat 13) for strengths of 2, 1.5 and 1, so there is no such case. Two minutes:

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
from numpyro.diagnostics import split_gelman_rubin
from numpyro.infer import MCMC, NUTS, init_to_value

SHAPE, NOISE, RANK = (20, 30), 0.1, 3
CASES = {"clear": (5.0, 3.0, 2.0), "near each other": (3.0, 2.5, 2.0)}
WARMUP, SAMPLES, CHAINS = 500, 2000, 3


def drawn(strengths: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return a signal and the signal with noise, rounded so that the file holds what was sampled."""
    random = np.random.default_rng(0)
    U, V = (np.linalg.qr(random.standard_normal((size, len(strengths))))[0] for size in SHAPE)
    signal = np.round(U * strengths @ V.T, 5)
    return signal, np.round(signal + NOISE * random.standard_normal(SHAPE), 5)


def model(Y: jax.Array, slab: float, *, rank: int) -> None:
    """Sample orthonormal factors as QR factors of Gaussian matrices."""
    A, B = (numpyro.sample(name, dist.Normal(0, 1).expand((size, rank)).to_event(2)) for name, size in zip("AB", SHAPE, strict=True))
    d = numpyro.sample("d", dist.Exponential(1 / slab).expand((rank,)).to_event(1))
    signal = numpyro.deterministic("signal", (jnp.linalg.qr(A)[0] * d) @ jnp.linalg.qr(B)[0].T)
    numpyro.sample("Y", dist.Normal(signal, NOISE).to_event(2), obs=Y)


def sampled(Y: np.ndarray) -> dict[str, np.ndarray]:
    """Return the samples, ``(chains, samples, ...)``."""
    U, S, Vh = np.linalg.svd(Y, full_matrices=False)
    sides = [np.linalg.qr(side[:, :RANK]) for side in (U, Vh.T)]
    start = {name: jnp.asarray(4 * Q * np.sign(np.diag(R))) for name, (Q, R) in zip("AB", sides, strict=True)}
    kernel = NUTS(
        partial(model, rank=RANK), target_accept_prob=0.9, init_strategy=init_to_value(values=start | {"d": jnp.asarray(S[:RANK])})
    )
    chain = MCMC(kernel, num_warmup=WARMUP, num_samples=SAMPLES, num_chains=CHAINS, chain_method="sequential", progress_bar=False)
    chain.run(jax.random.PRNGKey(0), Y=jnp.asarray(Y), slab=float(np.linalg.norm(S)))
    return {name: np.asarray(values) for name, values in chain.get_samples(group_by_chain=True).items()}


def summary(strengths: tuple[float, ...]) -> dict[str, object]:
    """Return what the test needs of one case."""
    signal, Y = drawn(strengths)
    found = sampled(Y)
    values = np.sort(found["d"], axis=-1)[..., ::-1]
    mean = found["signal"].mean((0, 1))
    return {
        "strengths": strengths,
        "Y": Y.tolist(),
        "signal": signal.tolist(),
        "values": values.mean((0, 1)).round(4).tolist(),
        "spread": values.std((0, 1)).round(4).tolist(),
        "r_hat": np.asarray(split_gelman_rubin(values)).round(4).tolist(),
        "squared_error_of_the_mean": round(float(((mean - signal) ** 2).sum()), 4),
    }


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    made = {"made by": f"numpyro {numpyro.__version__}, jax {jax.__version__}", "noise": NOISE}
    made |= {"warmup, samples, chains": [WARMUP, SAMPLES, CHAINS], "cases": {name: summary(case) for name, case in CASES.items()}}
    Path(__file__).with_suffix(".json").write_text(json.dumps(made) + "\n", encoding="utf-8")
