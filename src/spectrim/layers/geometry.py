"""Geometry of convolutions: chains in place of one, memory formats, sizes, paddings.

The law of a chain: an axis's size, stride, padding and dilation belong to the piece that has taps along that axis; every other piece is
neutral there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectrim.linalg.fold import KERNELS, Fold, leading

CONVOLUTIONS: dict[type[nn.Module], Any] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}


def base_of(module: nn.Module) -> type[nn.Module]:
    """Return the torch class of a convolution."""
    return next(kind for kind in CONVOLUTIONS if isinstance(module, kind))


PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Convolutions that are not transposed, by the number of axes less one."""


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


NEUTRAL = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
"""What the settings of a convolution are along an axis that it leaves as it is."""


SETTINGS = tuple(NEUTRAL)
"""Arguments of the constructor, the last one of transposed convolutions only."""


@dataclass(frozen=True)
class Piece:
    """One convolution of a chain that replaces a convolution, without its channels.

    Attributes:
        kind: its torch class.
        settings: arguments of the constructor: kernel size, stride, padding, dilation, for a transposed one output padding.
        padding_mode: as torch calls it.
    """

    kind: type[nn.Module]
    settings: Mapping[str, Any]
    padding_mode: str


def whole(module: Any) -> Piece:
    """Return a convolution itself as the only piece."""
    return Piece(base_of(module), {name: getattr(module, name) for name in _names(module)}, module.padding_mode)


def chain(module: Any, owners: Sequence[int], length: int = 2) -> tuple[Piece, ...]:
    """Return the convolutions that together have the geometry of one.

    An axis's size, stride, padding and dilation belong to one piece, and every other piece is neutral there. A piece that is neutral
    along every axis is a plain 1x1 convolution. Where all are, the first one keeps class and padding mode.

    Args:
        module: the convolution, dense or factorized.
        owners: for each axis the index of the piece it belongs to.
        length: number of pieces.
    """
    made: Callable[..., tuple[Piece, ...]] = (
        _chain if torch.compiler.is_compiling() else _chain_once
    )  # a compiler traces this once, and warns of caches
    values = [getattr(module, name) for name in _names(module)]
    hashable = tuple([value if isinstance(value, str) else tuple(value) for value in values])
    return made(base_of(module), hashable, module.padding_mode, tuple(owners), length)


def _names(module: Any) -> tuple[str, ...]:
    return SETTINGS if module.transposed else SETTINGS[:-1]


def _chain(kind: type[nn.Module], values: tuple[Any, ...], padding_mode: str, owners: tuple[int, ...], length: int) -> tuple[Piece, ...]:
    own = dict(zip(SETTINGS, values, strict=False))
    acts = [any(_acts(own, axis) for axis, owner in enumerate(owners) if owner == piece) for piece in range(length)]
    acts[0] = acts[0] or not any(acts)
    neutral = Piece(PLAIN[len(owners) - 1], {"kernel_size": (1,) * len(owners)}, "zeros")
    return tuple([Piece(kind, _part(own, owners, piece), padding_mode) if acts[piece] else neutral for piece in range(length)])


_chain_once = lru_cache(maxsize=1024)(_chain)


def _acts(own: Mapping[str, Any], axis: int) -> bool:
    """Whether a convolution does anything along an axis; one of a single tap does nothing for padding ``same`` and ``valid``."""
    return any(not isinstance(value, str) and value[axis] != NEUTRAL[name] for name, value in own.items())


def _part(own: Mapping[str, Any], owners: tuple[int, ...], piece: int) -> dict[str, Any]:
    """Return the settings of one piece: those of the convolution along its own axes, neutral along the others."""

    def along(name: str, value: Any) -> Any:
        return value if isinstance(value, str) else tuple([value[a] if owner == piece else NEUTRAL[name] for a, owner in enumerate(owners)])

    return {name: along(name, value) for name, value in own.items()}


def owners_of(module: Any, scheme: Fold) -> tuple[int, ...]:
    """Return for each axis of a convolution which of the operations it belongs to: the one that has its taps, the middle one of three.

    An axis of one tap belongs to the first operation, which then works at fewer positions where it has a stride; of a transposed
    convolution, whose stride makes more positions, to the last one. So in matrices and tensor trains.
    """
    kernel = module.kernel_size
    if scheme in ("tucker", "cp"):
        return (1,) * len(kernel)
    single = (length_of(module, scheme) - 1) * int(module.transposed)
    if scheme == "tt":
        return tuple(sum(size > 1 for size in kernel[: axis + 1]) if size > 1 else single for axis, size in enumerate(kernel))
    count = leading(scheme, kernel)
    return tuple(int(axis >= count) if size > 1 else single for axis, size in enumerate(kernel))


def length_of(module: Any, scheme: Fold) -> int:
    """Return the number of operations: two for a matrix, three of Tucker's and of CP, one for each axis with taps and two of a train."""
    if scheme == "tt":
        return 2 + len([size for size in module.kernel_size if size > 1])
    return 3 if scheme in KERNELS else 2


def channels_of(module: Any, scheme: Fold, size: Any) -> tuple[int, ...]:
    """Return the channels of the input, between the operations of a size, and of the output."""
    if scheme == "tt":
        return (module.in_channels, *size, module.out_channels)
    ranks = size if scheme == "tucker" else (size,) * (length_of(module, scheme) - 1)
    return (module.in_channels, *(module.groups * rank for rank in reversed(ranks)), module.out_channels)


def groups_of(module: Any, scheme: Fold, size: Any) -> tuple[int, ...]:
    """Return the groups of each operation: the one in the middle of CP's is depthwise."""
    return (1, size, 1) if scheme == "cp" else (module.groups,) * length_of(module, scheme)


def kernels_of_pair(module: Any, right: Tensor, left: Tensor, blocks: int, pieces: Sequence[Piece]) -> list[Tensor]:
    """Return the kernels of two convolutions from ``(rank, in * taps)`` and ``(out * taps, rank)``, of blocks where there are groups."""
    (one, two), rank, in_, out = pieces, left.shape[-1], module.in_channels // blocks, module.out_channels // blocks
    first = right.reshape(blocks, rank, in_, *one.settings["kernel_size"])
    if math.prod(two.settings["kernel_size"]) > 1:  # else a view with transposed strides would pass for channels last
        left = left.reshape(blocks, out, -1, rank).mT
    second = left.reshape(blocks, out, rank, *two.settings["kernel_size"])
    kernels = [(kernel.transpose(1, 2) if piece.kind in TRANSPOSED else kernel) for kernel, piece in ((first, one), (second, two))]
    return [kernel.flatten(0, 1) for kernel in kernels]


def stored(module: Any, scheme: Fold, size: Any) -> int:
    """Return how many numbers the kernels of the operations of a size have."""
    owners, channels, total = owners_of(module, scheme), channels_of(module, scheme, size), 0
    for piece, (in_, out, groups) in enumerate(zip(channels, channels[1:], groups_of(module, scheme, size), strict=False)):
        taps = math.prod(length for length, owner in zip(module.kernel_size, owners, strict=True) if owner == piece)
        total += in_ * out // groups * taps
    return total


def chain_macs(
    module: Any, owners: Sequence[int], channels: Sequence[int], shape: Sequence[int] | None, groups: Sequence[int] | None = None
) -> float:
    """Multiply-accumulates of a chain in place of a convolution.

    A plain convolution multiplies once for each output position, a transposed one once for each input position.

    Args:
        module: the convolution, dense or factorized.
        owners: as for `chain`.
        channels: of the input, between the pieces, and of the output; one more than there are pieces.
        shape: of the input, ``(batch, in, size...)`` or ``(in, size...)``; None for one output position of a large plane (one input
            position of a transposed convolution).
        groups: of each piece; those of the convolution when omitted.
    """
    count = len(module.kernel_size)
    groups = tuple(groups or (module.groups,) * (len(channels) - 1))
    if shape is None:
        batch, unit, stride = 1, (1,) * count, tuple(module.stride)
        before, after = (unit, stride) if module.transposed else (stride, unit)
    else:
        batch, size = shape[0] if len(shape) == count + 2 else 1, shape[-count:]
        before, after = tuple(size), tuple(output_size(module, size))
    made = _chain_macs if torch.compiler.is_compiling() else _chain_macs_once
    return batch * made(tuple(module.kernel_size), bool(module.transposed), tuple(owners), tuple(channels), before, after, groups)


def _chain_macs(
    kernel: tuple[int, ...],
    transposed: bool,
    owners: tuple[int, ...],
    channels: tuple[int, ...],
    before: tuple[int, ...],
    after: tuple[int, ...],
    groups: tuple[int, ...],
) -> float:
    """Multiply-accumulates for one example of a chain, from the sizes `before` and `after` all of it."""
    total = 0.0
    for piece, (in_, out) in enumerate(pairwise(channels)):
        done = piece if transposed else piece + 1  # pieces that have made their output where this one multiplies
        macs = float(in_ * out // groups[piece])
        for axis, owner in enumerate(owners):
            macs *= after[axis] if owner < done else before[axis]
            if owner == piece:
                macs *= kernel[axis]
        total += macs
    return total


_chain_macs_once = lru_cache(maxsize=4096)(_chain_macs)


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return the channels-last format of a tensor of 4 or 5 dimensions that is laid out so, else the contiguous one."""
    last = CHANNELS_LAST.get(x.dim())
    return last if last and x.is_contiguous(memory_format=last) and not x.is_contiguous() else torch.contiguous_format


def output_size(module: Any, size: Sequence[int]) -> list[int]:
    """Return the spatial output size of a convolution, plain or transposed, for a spatial input size."""
    sizes = []
    for axis, length in enumerate(size):
        kernel, stride, dilation = module.kernel_size[axis], module.stride[axis], module.dilation[axis]
        if module.padding == "same":
            sizes.append(length)
            continue
        padding = 0 if module.padding == "valid" else module.padding[axis]
        if module.transposed:
            sizes.append((length - 1) * stride - 2 * padding + dilation * (kernel - 1) + module.output_padding[axis] + 1)
        else:
            sizes.append((length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
    return sizes


def padded_sides(padding: str | Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Return how much is padded before and behind each axis."""
    if padding == "valid":
        return [(0, 0)] * len(kernel_size)
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        return [(span // 2, span - span // 2) for span in spans]
    return [(int(p), int(p)) for p in padding]


@dataclass(frozen=True)
class Axis:
    """How a convolution reads along one axis: at output ``p``, tap ``k`` is the input at ``stride * p + dilation * k - padding``."""

    kernel: int
    stride: int
    dilation: int
    padding: int

    def reads(self, positions: int, length: int) -> Tensor:
        """Return which input each tap of each output position reads, ``(positions, kernel)``; `length` for none."""
        index = self.stride * torch.arange(positions).unsqueeze(1) + self.dilation * torch.arange(self.kernel) - self.padding
        return torch.where((index >= 0) & (index < length), index, length)

    def read_by(self, positions: int, length: int) -> Tensor:
        """Return which output reads an input position with each tap, ``(positions, kernel)``; `length`, that of the output, for none."""
        index = torch.arange(positions).unsqueeze(1) + self.padding - self.dilation * torch.arange(self.kernel)
        whole = index % self.stride == 0
        index = index // self.stride
        return torch.where(whole & (index >= 0) & (index < length), index, length)


def take(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """Replace one axis of `x` by ``(positions, kernel)``, read at `index`; zero where that is the length of the axis."""
    zero = x.new_zeros(()).expand(*(1 if a == axis else size for a, size in enumerate(x.shape)))
    found = torch.cat([x, zero], axis).index_select(axis, index.flatten().to(x.device))
    return found.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, piece: Piece, groups: int) -> Tensor:
    """Run one convolution; padding modes other than zeros pad first, as torch's layers do."""
    options = {key: value for key, value in piece.settings.items() if key != "kernel_size"}
    if piece.padding_mode != "zeros":
        sides = padded_sides(options["padding"], piece.settings["kernel_size"], options["dilation"])
        x = F.pad(x, [side for pair in reversed(sides) for side in pair], mode=piece.padding_mode)
        options["padding"] = 0
    return cast(Tensor, CONVOLUTIONS[piece.kind](x, weight, bias, groups=groups, **options))
