"""The symbol of a convolution: the matrix ``F(w) = sum_k K_k e^{i k w}`` that it applies at each frequency; polyphase with a stride."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spectrim.analysis.operators import Convolution
from spectrim.errors import SettingError

CHUNK = 2**22
"""Entries of the symbol that are held at a time."""

GRID = 32
"""Frequencies along each axis, at least, at which a symbol is sampled."""


def total_strides(parts: Sequence[Convolution]) -> tuple[int, ...]:
    """Return the stride of the whole along each axis."""
    return tuple(math.prod(strides) for strides in zip(*(part.strides for part in parts), strict=True))


def inputs_of(parts: Sequence[Convolution]) -> int:
    """Return the number of input channels."""
    return parts[0].groups * parts[0].kernel.shape[1]


def degrees(parts: Sequence[Convolution]) -> tuple[int, ...]:
    """Return the degree of the symbol along each axis: the largest shift between entries of its polyphase matrix."""
    found = [0] * parts[0].axes
    for part, phases in zip(parts, phases_of(parts), strict=True):
        for axis, (stride, dilation, taps) in enumerate(zip(part.strides, part.dilations, part.kernel.shape[2:], strict=True)):
            found[axis] += (stride * (phases[axis] - 1) + dilation * (taps - 1)) // (stride * phases[axis])
    return tuple(found)


def slack(parts: Sequence[Convolution], grid: int) -> float:
    """Return by how much the symbol can rise between the points of a grid, a factor >= 1."""
    for part in parts:
        if part.padding_mode == "circular" and any(sum(pair) > span for pair, span in zip(part.sides, part.spans, strict=True)):
            hint = "pad by (taps - 1) * dilation in all, or less"
            raise SettingError(
                "spectral_norm_bound", "padding", got=part.sides, rule="no wider than the kernel where it is circular", hint=hint
            )
    highest = max(degrees(parts), default=0)
    if isinstance(grid, bool) or grid <= highest:
        raise SettingError("spectral_norm_bound", "grid", got=grid, rule=f"an integer above the degree {highest} of the symbol")
    return math.prod((1 / math.cos(math.pi * degree / (2 * grid)) for degree in degrees(parts)), start=1.0)


def phases_of(parts: Sequence[Convolution]) -> list[tuple[int, ...]]:
    """Return for each part how many phases of its output along each axis those behind it tell apart."""
    found = [(1,) * parts[0].axes]
    for part in reversed(parts[1:]):
        found.append(tuple(p * s for p, s in zip(found[-1], part.strides, strict=True)))
    return found[::-1]


def symbol(part: Convolution, grid: Sequence[int], phases: Sequence[int], first: slice = slice(None)) -> Tensor:
    """Return the polyphase symbol ``(groups, frequencies..., out * phases, in * stride * phases)`` of one convolution, complex.

    Along the last axis only the first half of the frequencies: the others are conjugates. An axis along which it is constant has length 1.

    Args:
        part: the convolution.
        grid: frequencies along each axis, of the input's phases.
        phases: of the output that are told apart along each axis.
        first: which frequencies of the first axis.
    """
    found = part.blocks().to(torch.complex128)
    for axis in range(part.axes):
        waves = _waves(part, axis, grid[axis], phases[axis])
        waves = waves[: grid[axis] // 2 + 1] if axis == part.axes - 1 else waves
        waves = waves[first] if axis == 0 and len(waves) > 1 else waves
        found = torch.tensordot(found, waves.to(found.device), dims=([3], [3]))
    at, per = range(part.axes), 3
    order = [0, *(3 + per * a for a in at), 1, *(4 + per * a for a in at), 2, *(5 + per * a for a in at)]
    found = found.permute(order)
    lead = found.shape[: 1 + part.axes]
    return found.reshape(*lead, found.shape[1 + part.axes] * math.prod(phases), -1)


def _waves(part: Convolution, axis: int, grid: int, phases: int) -> Tensor:
    """Return ``(frequencies, phases out, phases in, taps)``: at output phase q, tap k reads input phase (s q + d k) mod (s phases)."""
    taps, stride = part.kernel.shape[2 + axis], part.strides[axis]
    period = stride * phases
    read = stride * torch.arange(phases)[:, None] + part.dilations[axis] * torch.arange(taps)
    shift, phase = read // period, read % period
    frequencies = torch.arange(grid if int(shift.max()) else 1)
    turns = 2 * math.pi * (frequencies[:, None, None] * shift % grid).double() / grid
    wave = torch.polar(torch.ones_like(turns), turns)
    return wave.unsqueeze(2) * (phase.unsqueeze(1) == torch.arange(period)[:, None])


def symbol_of(parts: Sequence[Convolution], grid: Sequence[int], first: slice = slice(None)) -> list[Tensor]:
    """Return the symbols of the parts, the first to be applied first; where the rank is low, cut down to matrices with the same product."""
    symbols = [symbol(part, grid, phases, first) for part, phases in zip(parts, phases_of(parts), strict=True)]
    if len(symbols) == 2 and symbols[0].shape[-2] < min(symbols[0].shape[-1], symbols[1].shape[-2]):
        one, two = symbols
        return [torch.linalg.qr(one.mH, mode="r").R.mH, torch.linalg.qr(two, mode="r").R]
    return symbols


def multiplied(symbols: Sequence[Tensor]) -> Tensor:
    """Return the product, the first factor applied first."""
    product = symbols[0]
    for later in symbols[1:]:
        product = later @ product
    return product


def chunks(parts: Sequence[Convolution], grid: Sequence[int]) -> list[slice]:
    """Cut the first axis of the frequencies so that few entries are held at a time."""
    if len(grid) < 2:
        return [slice(None)]
    entries = max(part.kernel.shape[0] * part.kernel.shape[1] for part in parts) * math.prod(total_strides(parts))
    step = max(1, CHUNK // (entries * math.prod(grid[1:])))
    return [slice(start, start + step) for start in range(0, grid[0], step)]


def symbol_values(parts: Sequence[Convolution], grid: Sequence[int]) -> Tensor:
    """Return all singular values of the symbol at the frequencies of a grid, unordered: as many as the circular operator has."""
    groups = parts[0].groups
    full = min(parts[-1].kernel.shape[0], inputs_of(parts) * math.prod(total_strides(parts))) // groups
    found = []
    for chunk in chunks(parts, grid):
        values = torch.linalg.svdvals(multiplied(symbol_of(parts, grid, chunk)))
        found.append(_repeated(values, grid, chunk))
        if values.dim() > 1 and len(grid) > 1 and values.shape[1] == 1 and grid[0] > 1:
            break  # constant along the first axis: the first chunk was repeated for all
    values = torch.cat(found, 1) if found[0].dim() > 2 else found[0]
    return torch.nn.functional.pad(values, (0, full - values.shape[-1]))


def _repeated(values: Tensor, grid: Sequence[int], chunk: slice) -> Tensor:
    """Write out values ``(groups, frequencies..., k)`` for the frequencies that were left out."""
    for axis, points in enumerate(grid):
        length = values.shape[1 + axis]
        if length == 1 and points > 1:
            counts = torch.tensor([points])
        elif axis == len(grid) - 1:
            counts = torch.full((length,), 2)
            counts[0] = 1
            counts[-1] = 1 if points % 2 == 0 and points > 1 else counts[-1]
        else:
            continue
        values = values.repeat_interleave(counts, 1 + axis)
    return values


def sampled_norm(parts: Sequence[Convolution], grid: int) -> Tensor:
    """Return the largest ``||F(w)||`` on a grid, differentiable in the kernels: at the frequency where it is largest."""
    points = [grid] * parts[0].axes
    with torch.no_grad():
        norms = [torch.linalg.matrix_norm(multiplied(symbol_of(parts, points, chunk)), 2) for chunk in chunks(parts, points)]
        tops = torch.stack([norm.max() for norm in norms])
    if not any(part.kernel.requires_grad for part in parts):
        return tops.max()
    best = int(tops.argmax())
    chunk = chunks(parts, points)[best]
    place = torch.unravel_index(norms[best].argmax(), norms[best].shape)
    symbols = multiplied([symbol(part, points, phases, chunk) for part, phases in zip(parts, phases_of(parts), strict=True)])
    norm: Tensor = torch.linalg.matrix_norm(symbols[place], 2)
    return norm
