"""Hidden units left out one after another, with the weight that reads them refitted to those that stay."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from spectrim.errors import SettingError

STEPS = 128
"""Units are left out in so many steps at most: of wider layers several at a time."""

DAMPING = 1e-6
"""Added to the diagonal of the second moment, as a share of its mean: units that never fire have an inverse, too."""


@dataclass(frozen=True, eq=False)
class Elimination:
    """An order in which the units that a weight reads can be left out, and what that costs.

    Attributes:
        order: units, the first one that goes in front; ``(units,)``.
        widths: numbers of units left, from all of them down to the fewest, descending.
        errors: ``tr(G D A D^T)`` at each of these widths, with ``D`` the change of the refitted weight; the first one is 0.
    """

    order: Int64[Tensor, " units"]
    widths: tuple[int, ...]
    errors: tuple[float, ...]

    def kept(self, width: int) -> Int64[Tensor, " width"]:
        """Return the units that stay at a width, ascending.

        Args:
            width: in [1, units].

        Raises:
            SettingError: for any other.
        """
        units = len(self.order)
        if not 1 <= width <= units:
            raise SettingError("Elimination", "width", got=width, rule=f"in [1, {units}]")
        return self.order[units - width :].sort().values


def eliminate(
    weight: Float[Tensor, "out inputs"],
    moment: Float[Tensor, "size size"],
    metric: Float[Tensor, "out out"] | None = None,
    *,
    taps: int = 1,
    fewest: int = 1,
) -> Elimination:
    """Leave out the units that a weight reads, each time those without which its outputs change least.

    A unit is `taps` consecutive columns ``W_j``. What is left is refitted to the same outputs each time, so that leaving out one more costs
    ``tr(G W_j (P_jj)^-1 W_j^T)`` with ``P`` the inverse of the second moment of the inputs that are left: exactly, for one at a time.

    Args:
        weight: ``W``.
        moment: ``A``, of its inputs.
        metric: ``G``, on its outputs; the identity when omitted.
        taps: columns of a unit.
        fewest: units that stay at least.

    Raises:
        SettingError: for columns that are no whole number of units, or another number than `moment` has.

    Examples:
        >>> weight = torch.tensor([[1.0, 3.0, 2.0]])
        >>> found = eliminate(weight, torch.diag(torch.tensor([1.0, 1.0, 4.0])))
        >>> found.order.tolist(), found.widths, [round(error, 3) for error in found.errors]
        ([0, 1, 2], (3, 2, 1), [0.0, 1.0, 10.0])

    Source: Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon", NIPS 1992, equation 5; for units of
    several columns Kurtic, Frantar and Alistarh, arXiv 2302.04089, section 3.
    Deviation: a metric on the outputs; several units in one step where there are more than `STEPS`.
    """
    columns = weight.shape[1]
    if not torch.isfinite(moment).all():
        raise SettingError("eliminate", "moment", got="NaN or infinity in it", rule="finite")
    if taps < 1 or columns % taps or moment.shape != (columns, columns):
        rule = f"of {columns} columns and as many rows as the weight has columns, {taps} for each unit"
        raise SettingError("eliminate", "moment", got=tuple(moment.shape), rule=rule)
    units, least = columns // taps, max(1, fewest)
    inverse, W, G = _inverse(moment), weight.detach().double().clone(), None if metric is None else metric.double()
    order: list[int] = []
    widths, errors = [units], [0.0]
    left = torch.arange(units, device=W.device)
    at_once = math.ceil(units / STEPS)
    while len(left) > least:
        count = min(at_once, len(left) - least)
        gone = _costs(W, inverse, G, taps).argsort(stable=True)[:count]
        columns_gone = (gone[:, None] * taps + torch.arange(taps, device=W.device)).flatten()
        W, inverse, error = _without(W, inverse, G, columns_gone)
        order += left[gone].tolist()
        stays = torch.ones(len(left), dtype=torch.bool, device=W.device)
        stays[gone] = False
        left = left[stays]
        widths.append(len(left))
        errors.append(errors[-1] + error)
    return Elimination(torch.tensor([*order, *left.tolist()]), tuple(widths), tuple(errors))


def refitted(
    weight: Float[Tensor, "out inputs"], moment: Float[Tensor, "inputs inputs"], columns: Int64[Tensor, " kept"]
) -> Float[Tensor, "out kept"]:
    """Return the weight on some of its inputs whose outputs are nearest to those on all: ``W A[:, S] A[S, S]^-1``, in float64.

    It is the nearest one in every metric on the outputs.

    Args:
        weight: ``W``.
        moment: ``A``, of its inputs.
        columns: ``S``.

    Examples:
        >>> refitted(torch.tensor([[1.0, 1.0]]), torch.ones(2, 2), torch.tensor([0])).round(decimals=4)
        tensor([[2.]], dtype=torch.float64)
    """
    A = _damped(moment)
    made: Tensor = torch.linalg.solve(A[columns][:, columns], A[columns] @ weight.detach().double().mT).mT
    return made


def _damped(moment: Tensor) -> Tensor:
    """Return the second moment with as much added to its diagonal as makes it positive definite."""
    A = moment.double()
    unit = torch.eye(len(A), dtype=A.dtype, device=A.device) * (float(A.diagonal().mean()) or 1.0)
    damping = DAMPING
    while int(torch.linalg.cholesky_ex(made := A + damping * unit).info):
        damping *= 10
    return made


def _inverse(moment: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(_damped(moment)))


def _costs(W: Tensor, inverse: Tensor, G: Tensor | None, taps: int) -> Tensor:
    """Return what leaving out each unit would cost, ``(units,)``."""
    units = W.shape[1] // taps
    parts = W.reshape(len(W), units, taps).transpose(0, 1)
    squares = parts.mT @ (parts if G is None else G @ parts)
    blocks = inverse.reshape(units, taps, units, taps).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    costs: Tensor = torch.linalg.solve(blocks, squares).diagonal(dim1=-2, dim2=-1).sum(-1)
    return costs


def _without(W: Tensor, inverse: Tensor, G: Tensor | None, gone: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return the refitted weight and the inverse on the columns that stay, and the change of the outputs."""
    stays = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
    stays[gone] = False
    solved = torch.linalg.solve(inverse[gone][:, gone], W[:, gone].mT).mT
    error = float(((solved if G is None else G @ solved) * W[:, gone]).sum())
    between = inverse[gone][:, stays]
    W = W[:, stays] - solved @ between
    inverse = inverse[stays][:, stays] - between.mT @ torch.linalg.solve(inverse[gone][:, gone], between)
    return W, (inverse + inverse.mT) / 2, error
