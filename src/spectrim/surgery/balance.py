"""`balance_` gives the factors of large weights entries of equal size, for optimizers with one step size for all."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from spectrim.checks import check, unwrapped
from spectrim.forms import Factors, derived
from spectrim.layers import named_factors
from spectrim.layers.sharded import refuse_shards
from spectrim.surgery.prune import prune_


@torch.no_grad()
def balance_(model: nn.Module, above: int = 1024) -> list[str]:
    """Move singular values into the factors of large weights, in place: ``U <- c U diag(S)``, ``Vh <- Vh / c``, ``S <- 1``.

    With the ``c`` for which the entries of both factors have the same root mean square. The weights stay the same. Columns of `U` that are
    orthonormal have entries of size ``1 / sqrt(rows)``: of a vocabulary of 10,000 words, 0.01, and Adam, whose every step is as large as
    the learning rate in every entry, moves them by a tenth of their size with a rate of 0.001, times a singular value in the hundreds.
    Balanced factors move about as far as the dense weight would, fit faster, and overfit sooner. `S` of a balanced weight is no spectrum,
    and its factors are not orthonormal, until `prune` cuts it: so this is for fine-tuning without penalties on factors, and before the
    optimizer is made.

    Args:
        model: factorized.
        above: balance the weights with a side longer than this, >= 0. Smaller ones gained nothing in trials.

    Returns:
        The names of the weights that were balanced, tied ones once.

    Raises:
        SettingError: for a negative `above`.
        LayerError: for a model that FSDP2 shards.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> model = factorize(nn.Sequential(nn.Linear(8, 2048, bias=False)))
        >>> x, before = torch.ones(1, 8), model[0].U.std()
        >>> y = model(x)
        >>> balance_(model)
        ['0']
        >>> torch.allclose(model(x), y, atol=1e-5), bool(model[0].U.std() > before)
        (True, True)
    """
    check("balance_", model=model, above=above)
    model = unwrapped(model)
    refuse_shards(model, "balance_")
    names = []
    for name, factors in named_factors(model):
        if isinstance(factors, Factors) and factors.is_matrix and max(factors.shape) > above:
            derived.balance_(factors)
            names.append(name)
    return names


@contextmanager
def balanced(model: nn.Module) -> Iterator[list[str]]:
    """Balance a model's large weights for the body, and make their factors orthonormal again after it, `S` their spectrum.

    Args:
        model: factorized, or dense: nothing happens then.
    """
    names = balance_(model)
    yield names
    if names:
        prune_(model, {name: factors.size for name, factors in named_factors(model) if name in names})
