"""What is computed from the factors of one weight: for distortions, for refits, and for optimizers behind a cut."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from spectrim.forms.form import Form
from spectrim.forms.svd import Factors
from spectrim.linalg.spectral import pooled_spectrum, svd_of_product

MEASURED_AT = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7)
"""Sizes at which a form is cut to see what it loses, as fractions of the numbers of the dense weight."""

AFFORDABLE = 5e10
"""Multiply-accumulates that the cuts of one weight may take, about ten seconds of one core; of 3x3 taps up to 160 channels in CP."""


def affordable(form: Form) -> bool:
    """Return whether cuts of a weight at all of `MEASURED_AT` take at most `AFFORDABLE`."""
    return sum(form.cut_macs(form.size_of(rung)) for rung in _measured(form)) <= AFFORDABLE


def _measured(form: Form) -> list[int]:
    """Return the rungs at `MEASURED_AT`, ascending."""
    counts, dense = [form.count(form.size_of(rung)) for rung in range(1, form.rank + 1)], form.matrix().numel()
    return sorted({max(1, int(np.searchsorted(counts, share * dense, "right"))) for share in MEASURED_AT} - {form.rank})


@torch.no_grad()
def measure_cuts(form: Form) -> None:
    """Let a form know what its cuts lose as a share of its distortions, at most all of it: cuts of kernels are improved.

    Measured at `MEASURED_AT`, in between interpolated. Nothing is done where it is known, for a matrix, whose distortions are exact, and
    for a weight whose cuts are not `affordable`.

    Args:
        form: of one weight, at full size.
    """
    if form.is_matrix or "_shares" in form.__dict__ or not affordable(form):
        return
    tail, shares, weight = form.tail().cpu(), {0: 1.0}, form.product().double()
    for rung in _measured(form):
        lost = float((form.cut_to(form.size_of(rung)).product().double() - weight).square().sum())
        shares[rung] = min(1.0, lost / max(float(tail[rung]), 1e-300))
    form.__dict__["_shares"] = tuple(np.interp(np.arange(len(tail)), list(shares), list(shares.values())).tolist())


def measured_tail(form: Form, tail: Tensor) -> Tensor:
    """Return a distortion as what cuts lose, where that was measured: `measure_cuts`; as it is otherwise.

    Args:
        form: of one weight.
        tail: its distortion in any metric, ``(rank + 1,)``.
    """
    shares = form.__dict__.get("_shares", ())
    return (tail * torch.tensor(shares).to(tail)).cummin(0).values if len(shares) == len(tail) else tail


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
