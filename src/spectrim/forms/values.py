"""Values of parts that are pruned or rounded: which are kept, steps of the least squared error, and the bits that they take."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectrim.linalg.rounding import EXACT
from spectrim.projections.counts import largest
from spectrim.projections.positions import entropy_bits
from spectrim.projections.scale import best_scale

__all__ = ["BITS", "EXACT", "bits_of_parts", "counts_up_to", "effects", "pruned", "shown_part", "steps_of"]

BITS = (2, 3, 4, 5, 6, 7, 8, EXACT)
"""Bits that parts can be rounded to; the last stands for no rounding."""

COUNTS = tuple(0.01 * 100 ** (place / 23) for place in range(24))
"""Shares of the entries at the rungs of what is pruned, from 1 % to all."""

FLOAT_BITS = 32

PROBES = 4
"""Random directions by which the effect of a part on the weight is measured."""


class _StraightThrough(torch.autograd.Function):
    """Multiples of a step, at most `most` of them; the gradient goes through where none is cut off."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, step: Tensor, most: int) -> Tensor:
        """Return the nearest level."""
        return (x / step).round().clamp(-most, most) * step

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        """Keep what decides where values are cut off."""
        x, step, most = inputs
        ctx.save_for_backward(x.abs() <= (most + 0.5) * step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the values."""
        return grad * ctx.saved_tensors[0], None, None


def shown_part(part: Tensor, mask: Tensor | None, step: Tensor | None, bits: int) -> Tensor:
    """Return a part as it enters the weight: zero where it is pruned, on levels where it is rounded.

    Args:
        part: what learns.
        mask: which entries may be other than zero; None for all.
        step: between levels; None, or 0 for a part of zeros, to round nothing.
        bits: the levels are ``-m ... m`` with ``m = 2^(bits-1) - 1``.
    """
    if mask is not None:
        part = part * mask
    if step is not None and not step.is_meta and bool(step > 0):
        part = _StraightThrough.apply(part, step, 2 ** (bits - 1) - 1)  # type: ignore[no-untyped-call]
    return part


def counts_up_to(kept: int, total: int) -> list[int]:
    """Return the counts at the rungs up to one of them, ascending.

    Examples:
        >>> counts_up_to(5, 100), counts_up_to(100, 100)[-3:]
        ([1, 2, 3, 4, 5], [67, 82, 100])
    """
    grid = sorted({min(total, max(1, round(share * total))) for share in COUNTS} | {total})
    return [*(count for count in grid if count < kept), kept]


def effects(compose: Callable[..., Tensor], parts: Sequence[Tensor]) -> list[float]:
    """Return for each part the root mean square change of the weight by a unit change of an entry, by random directions of the weight.

    Args:
        compose: makes the weight from the parts.
        parts: of one weight.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        leaves = [part.detach().double().requires_grad_() for part in parts]
        weight = compose(*leaves)
        squares = [0.0] * len(parts)
        for probe in range(PROBES):
            direction = torch.randn(weight.shape, dtype=torch.float64, generator=generator).to(weight.device)
            grads = torch.autograd.grad(weight, leaves, direction, retain_graph=probe + 1 < PROBES)
            squares = [square + float(grad.square().mean()) / PROBES for square, grad in zip(squares, grads, strict=True)]
    return [square**0.5 for square in squares]


def pruned(parts: Mapping[str, Tensor], kept: int, scales: Mapping[str, float]) -> dict[str, Tensor]:
    """Set all but the largest entries of several parts to zero.

    Args:
        parts: by name.
        kept: exact number of entries that are left as they are.
        scales: what magnitudes of each part are multiplied with when they are compared.
    """
    if kept >= sum(part.numel() for part in parts.values()):
        return dict(parts)
    scores = [scales[name] * part.double().abs().flatten() for name, part in parts.items()]
    masks = torch.split(largest(torch.cat(scores), kept), [len(score) for score in scores])
    return {name: torch.where(mask.reshape(part.shape), part, 0.0) for (name, part), mask in zip(parts.items(), masks, strict=True)}


def steps_of(parts: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Return the step of each part with the least squared error; 0 where nothing is rounded."""
    if bits >= EXACT:
        return {name: part.new_zeros(()) for name, part in parts.items()}
    most = 2 ** (bits - 1) - 1
    levels = torch.arange(-most, most + 1, dtype=torch.float64)
    return {name: _step(part, levels.to(part.device)) for name, part in parts.items()}


def _step(part: Tensor, levels: Tensor) -> Tensor:
    if part.is_meta or not bool(part.any()):
        return torch.zeros((), dtype=part.dtype, device=part.device)
    return best_scale(part.detach().double().reshape(1, -1), levels).reshape(()).to(part.dtype)


def bits_of_parts(parts: Mapping[str, Tensor], steps: Mapping[str, Tensor]) -> float:
    """Return the bits of parts by the entropy of their values and of the positions of zeros.

    Args:
        parts: as they enter the weight.
        steps: between levels, one for each part; none where values are floats.
    """
    total = 0.0
    for name, part in parts.items():
        if name in steps and float(steps[name]) > 0:
            counts = np.unique((part.double() / steps[name].double()).round().cpu().numpy(), return_counts=True)[1]
            total += float(-(counts * np.log2(counts / counts.sum())).sum()) + FLOAT_BITS
        else:
            total += FLOAT_BITS * int(part.count_nonzero()) + entropy_bits(part != 0)
    return total
