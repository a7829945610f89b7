"""What is computed from the factors of one weight: for distortions, for refits, and for optimizers behind a cut."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from spectrim.forms.form import Form
from spectrim.forms.svd import Factors
from spectrim.linalg.spectral import pooled_spectrum, svd_of_product


def product_with(factors: Factors, vectors: Tensor) -> Tensor:
    """Return ``W v`` for each vector, in float64, without composing the weight.

    Args:
        factors: of ``W``, ``(out, in)`` or ``(blocks, out, in)``.
        vectors: ``(in, n)`` or ``(blocks, in, n)``.
    """
    U, S, Vh = factors.parts()
    return (U * S.unsqueeze(-2)) @ (Vh @ vectors)


def scaled_spectrum(factors: Factors, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the singular values of ``diag(rows) W diag(columns)``, descending, blocks pooled, in float64.

    Args:
        factors: of ``W``.
        rows: ``(out,)`` or ``(blocks, out)``.
        columns: ``(in,)`` or ``(blocks, in)``.
    """
    U, S, Vh = factors.parts()
    return pooled_spectrum(svd_of_product(rows.unsqueeze(-1) * U, S, Vh * columns.unsqueeze(-2))[1])


@torch.no_grad()
def balance_(factors: Factors) -> None:
    """Move the singular values into both factors, whose entries get the same root mean square, in place; ``S`` becomes 1.

    Not `Factors.balanced`, whose halves are of one norm: the long one would keep the smaller entries.
    """
    U, S, Vh = factors.parts()
    U = U * S.unsqueeze(-2)
    mine, theirs = U.square().mean().sqrt(), Vh.square().mean().sqrt()
    share = (theirs / mine).sqrt() if mine > 0 and theirs > 0 else torch.ones_like(mine)
    factors.set_(U * share, torch.ones_like(S), Vh / share)


@contextmanager
def zeroed_beyond(form: Form, rank: int) -> Iterator[None]:
    """Hold the weight cut to a rung inside, in tensors of the present shapes; as it was afterwards.

    Args:
        form: of one weight.
        rank: 0 for a weight of zeros.
    """
    kept = tuple(parameter.detach().clone() for parameter in form.parameters(recurse=False))
    form.set_(*form.truncated_parts(rank))
    try:
        yield
    finally:
        form.set_(*kept)
