"""What is computed from the factors of one weight: for distortions, for refits, and for optimizers behind a cut."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

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


def first_order_rises(factors: Factors, slopes: Tensor) -> Tensor:
    """Return ``sum_{k>r} |S_k dL/dS_k|`` for each rank ``r`` from 0 on, blocks added up, in float64.

    Values are ordered as a cut orders them, up to the angles between factors that are not orthonormal.

    Args:
        factors: of one weight.
        slopes: ``dL/dS``, one for each value held.
    """
    U, S, Vh = factors.U.detach(), factors.S.detach(), factors.Vh.detach()
    size = S.abs() * U.norm(dim=-2) * Vh.norm(dim=-1)
    rises = (slopes.to(S) * S).abs().double().gather(-1, size.argsort(dim=-1)).cumsum(-1)  # of the least ones, the least first
    rises = rises.flatten(0, -2).sum(0) if S.dim() > 1 else rises
    return torch.cat([rises.new_zeros(1), rises]).flip(0)


def rotations(old: Factors, new: Factors) -> tuple[Tensor, Tensor]:
    """Return ``P = U_old^T U_new`` and ``Q = Vh_old Vh_new^T``, by which moments of gradients follow a cut, in float64."""
    (U, _, Vh), (U_new, _, Vh_new) = old.parts(), new.parts()
    return U.mT @ U_new, Vh @ Vh_new.mT


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
def zeroed_beyond(factors: Factors, rank: int) -> Iterator[None]:
    """Keep the `rank` largest singular values inside, the rest being zero; the factors as they were afterwards.

    Args:
        factors: of one weight.
        rank: 0 for a weight of zeros.
    """
    kept = factors.U.detach().clone(), factors.S.detach().clone(), factors.Vh.detach().clone()
    U, S, Vh = svd_of_product(*kept)
    S[..., rank:] = 0
    factors.set_(U, S, Vh)
    try:
        yield
    finally:
        factors.set_(*kept)
