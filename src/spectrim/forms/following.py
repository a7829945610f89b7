"""An average of factors over training steps, through a cut of the factors that it follows."""

import torch
from torch import Tensor

from spectrim.forms.form import Form
from spectrim.forms.svd import Factors


def followed(average: Form, new: Form) -> Form:
    """Cut an average of factors to the rank of `new`, in the coordinates of `new`, so that the two can be averaged further.

    What is kept is the best approximation of the average's own weight, so that a cut that discards nothing does not change it. Of all
    factors with that product those nearest to `new` are taken: its singular vectors ``U``, projected onto the kept column space.

    Args:
        average: before the cut, of any rank >= that of `new`.
        new: factors after the cut.
    """
    if not isinstance(average, Factors) or not isinstance(new, Factors) or not new.is_matrix:
        return _turned(average, new)
    cut = average.cut_to(new.size)
    parts = zip(*(_blocks(factors) for factors in (cut, new)), strict=True)
    aligned = [torch.stack(tensors) for tensors in zip(*(_aligned(*pair) for pair in parts), strict=True)]
    if cut.S.dim() == 1:
        aligned = [tensor[0] for tensor in aligned]
    return Factors(*aligned, dtype=average.dtype, requires_grad=average.S.requires_grad)


def _turned(average: Form, new: Form) -> Form:
    """Take the average's parts into the coordinates of `new`, where a cut leaves them."""
    turns, parts = average.turns(new), []
    for name, part in average.named_parameters(recurse=False):
        moved = part.detach().double()
        for axis, turn in turns[name].items():
            moved = torch.tensordot(moved, turn, dims=([axis], [0])).movedim(-1, axis)
        parts.append(moved)
    return new.like(*parts)


def _blocks(factors: Factors) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return ``U``, ``S``, ``Vh`` of each block in float64."""
    U, S, Vh = (tensor.detach().double() for tensor in (factors.U, factors.S, factors.Vh))
    return [(U, S, Vh)] if S.dim() == 1 else list(zip(U, S, Vh, strict=True))


def _aligned(cut: tuple[Tensor, Tensor, Tensor], new: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors of the product of `cut` (orthonormal) nearest to `new`; `cut` itself where the two have little in common."""
    (U, S, Vh), (U_new, _, Vh_new) = cut, new
    turn = U.mT @ U_new
    if S.min() <= 0 or torch.linalg.svdvals(turn).min() < 0.1:
        return cut
    rows = torch.linalg.solve(turn, S.unsqueeze(-1) * Vh)
    sizes = rows.norm(dim=-1)
    signs = torch.where((rows * Vh_new).sum(-1) < 0, -1.0, 1.0).to(sizes)  # of S, which is positive: into U and Vh
    return U @ turn * signs, sizes, rows / (sizes * signs).unsqueeze(-1)
