"""The refit of weights with very many inputs, for which no matrix of all inputs is formed."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spectrim.forms.svd import Factors
from spectrim.linalg.gram import MomentSum
from spectrim.surgery.decompositions import unit_rows
from spectrim.surgery.regression import CUTOFF, in_scheme, rows_of, truncated
from spectrim.surgery.side_by_side import _Met

STEPS = 20
"""Of conjugate gradients, in wide layers that are refitted without equations."""


def basis_of(layer: Any, met: Sequence[_Met], dense: Tensor, most: float) -> Tensor:
    """Return the directions of the inputs that the refit of a wide layer in the channel scheme looks at, ``(blocks, seen, in)``.

    The rows of the dense weight, those that are held, and the gradient of the error at the dense weight, ``E[(y - W x~) x~^T]``: the
    regression in this space is one step of conjugate gradients by blocks.

    Args:
        layer: as for `rows_of`.
        met: as for `rows_of`; it is read once more later.
        dense: the dense weight, ``(blocks, out, in)``.
        most: as for `rows_of`.
    """
    Vh = layer.factors_of("weight").block_parts()[2]
    slope, weight = torch.zeros((), dtype=torch.float64), None
    for rows, wanted in rows_of(layer, met, most):
        weight = dense.to(rows) if weight is None else weight
        rest = wanted - rows @ weight.mT
        rest = rest - rest.mean(-2, keepdim=True) if layer.bias is not None else rest
        slope = slope + (rest.mT @ rows).double()
    scale = torch.linalg.matrix_norm(slope).clamp_min(torch.finfo(slope.dtype).tiny)[..., None, None]
    together = torch.cat([dense / torch.linalg.matrix_norm(dense)[..., None, None], Vh, slope / scale], -2)
    basis: Tensor = torch.linalg.qr(together.mT).Q.mT
    return basis


def refit_by_steps_(layer: Any, original: Any, dense: Tensor, met: Sequence[_Met], steps: int = STEPS) -> bool:
    """Give a wide layer in another scheme than ``channel`` a better second operation, in place, by conjugate gradients.

    The first operation is the one that is held, or that of the dense weight's best cut for the present inputs, where that starts lower.
    No equations are formed: each step runs the layer.

    Args:
        layer: of the network that is corrected.
        original: of the dense network.
        dense: the original's weight, ``(blocks, out, in)``.
        met: what the layer meets.
        steps: of conjugate gradients.

    Returns:
        Whether the weight is another one.
    """
    factors, bias = layer.factors_of("weight"), layer.bias
    before = factors.parts()
    columns = MomentSum()
    for y, x_now in met:
        for rows in layer.input_rows(x_now, y.shape):
            columns.add(rows)
    best = truncated(factors.rank, in_scheme(layer, dense), columns.second() / columns.count, None)
    targets = [y if bias is None else y - y.mean(_around(layer, y), keepdim=True) for y, _ in met]
    inputs = [x for _, x in met]
    errors = []
    for parts in (before, best):
        factors.set_(*parts)
        errors.append(sum(float((target - out).square().sum()) for target, out in zip(targets, _outputs(layer, inputs), strict=True)))
    factors.set_(*(before if errors[0] <= errors[1] else best))
    _conjugate_gradients(layer, factors, inputs, targets, steps)
    U, S, Vh = factors.block_parts()
    factors.set_(*unit_rows(U * S.unsqueeze(-2), Vh))
    if bias is not None and original.bias is not None:
        with torch.no_grad():
            count = sum(y.numel() // len(bias) for y, _ in met)
            rests = (y - layer.forward(x) for y, x in met)
            bias.add_(sum(rest.sum(_around(layer, rest), dtype=torch.float64) for rest in rests) / count)
    return True


def _around(layer: Any, y: Tensor) -> list[int]:
    """Return the axes of a layer's output but that of its features."""
    features = y.dim() - 1 - len(getattr(layer, "kernel_size", ()))
    return [axis for axis in range(y.dim()) if axis != features]


def _outputs(layer: Any, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield what the layer computes, less its mean where a bias takes that up."""
    for x in inputs:
        out = layer.forward(x)
        yield out if layer.bias is None else out - out.mean(_around(layer, out), keepdim=True)


def _conjugate_gradients(layer: Any, factors: Factors, inputs: Sequence[Tensor], targets: Sequence[Tensor], steps: int) -> None:
    """Minimize the squared error in the left factor, in place: CGLS, in the dtype of the layer."""
    U, S, Vh = factors.parts()
    factors.set_(U * S.unsqueeze(-2), torch.ones_like(S), Vh)
    left = dict(factors.named_parameters())["U"]
    trained = left.requires_grad

    def back(rests: Sequence[Tensor]) -> Tensor:
        slope = torch.zeros_like(left)
        with torch.enable_grad():
            for rest, out in zip(rests, _outputs(layer, inputs), strict=True):
                slope += torch.autograd.grad(out, left, rest)[0]
        return slope

    def ahead(values: Tensor) -> list[Tensor]:
        held = left.detach().clone()
        left.data.copy_(values)
        out = [made.detach() for made in _outputs(layer, inputs)]
        left.data.copy_(held)
        return out

    left.requires_grad_(True)
    rests = [target - out.detach() for target, out in zip(targets, _outputs(layer, inputs), strict=True)]
    slope = back(rests)
    direction, size = slope, float(slope.square().sum())
    first = size
    with torch.no_grad():
        for _ in range(steps):
            if size <= CUTOFF**2 * first or size == 0:
                break
            moved = ahead(direction)
            step = size / max(sum(float(part.square().sum()) for part in moved), torch.finfo(torch.float64).tiny)
            left.add_(direction, alpha=step)
            rests = [rest - step * part for rest, part in zip(rests, moved, strict=True)]
            slope = back(rests)
            now = float(slope.square().sum())
            direction, size = slope + now / size * direction, now
    left.requires_grad_(trained)
