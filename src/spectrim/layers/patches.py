"""`Patches`: the rows of inputs and outputs that the folded matrix of a convolution meets."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spectrim.layers.geometry import Axis, padded_sides, take
from spectrim.layers.weights import ROWS_SIZE, OneWeight
from spectrim.linalg.fold import KERNELS, Fold, leading


class Patches(OneWeight):
    """A convolution, plain or transposed, as products of its folded matrix with rows."""

    def input_rows(self, x: Tensor, output_shape: Sequence[int], scheme: Fold | None = None) -> Iterator[Tensor]:
        """Yield the inputs of the folded matrix, ``(groups, n, in * taps)``, with the taps that the fold has on the input side.

        Along an axis whose taps are there, one row for each output position; along any other, one for each position of the input that is
        read at all. In the channel fold these are the patches, in the input fold the pixels. A transposed convolution meets at an output
        position the inputs that reach it, and zeros for the taps that fall between them.
        """
        module: Any = self
        kernel, after = module.kernel_size, output_shape[-len(module.kernel_size) :]
        scheme = scheme or self.scheme
        count, inside = len(kernel), leading("input" if scheme in KERNELS else scheme, kernel)
        x = self._padded(x if x.dim() == count + 2 else x.unsqueeze(0))
        if count == inside == 2 and not module.transposed:
            yield from self._unfolded(x, self._part(after, module.in_channels))
            return
        width = module.in_channels * math.prod(kernel[:inside])
        taps = [3 + 2 * axis for axis in range(inside)]
        for rows in torch.split(x, self._part(after, module.in_channels)):
            for axis in reversed(range(count)):
                length = rows.shape[2 + axis]
                if axis < inside:
                    rows = take(rows, 2 + axis, self._taps(axis, after[axis], length))
                else:
                    rows = rows.index_select(2 + axis, self._read(axis, length, after[axis])[0].to(x.device))
            yield self._as_rows(rows, taps, width)

    def _unfolded(self, x: Tensor, part: int) -> Iterator[Tensor]:
        """Yield the patches of images as torch has them in one call, that many images at a time."""
        module: Any = self
        zeros = [side for pair in reversed(self._sides()) for side in pair] if module.padding_mode == "zeros" else [0] * 4
        for images in torch.split(x, part):
            patches = F.unfold(F.pad(images, zeros), module.kernel_size, module.dilation, 0, module.stride)
            yield patches.reshape(len(images), module.groups, -1, patches.shape[-1]).permute(1, 0, 3, 2).flatten(1, 2)

    def output_rows(self, y: Tensor, input_shape: Sequence[int]) -> Iterator[Tensor]:
        """Yield the outputs of the folded matrix, ``(groups, n, out * taps)``, with the taps that the fold has on the output side.

        The rows are those of `input_rows`. Along an axis whose taps are on the output side, a row holds the outputs that one position of
        the input reaches with each tap, and zero where that is outside.
        """
        module: Any = self
        kernel, before = module.kernel_size, input_shape[-len(module.kernel_size) :]
        count, inside = len(kernel), leading("channel" if self.scheme in KERNELS else self.scheme, kernel)
        y = y if y.dim() == count + 2 else y.unsqueeze(0)
        sides = [sum(pair) if module.padding_mode != "zeros" else 0 for pair in self._sides()]
        width = module.out_channels * math.prod(kernel[inside:])
        taps = [3 + inside + 2 * axis for axis in range(count - inside)]
        for rows in torch.split(y, self._part(y.shape[2:], module.out_channels)):
            for axis in reversed(range(inside, count)):
                rows = take(rows, 2 + axis, self._read(axis, before[axis] + sides[axis], rows.shape[2 + axis])[1])
            yield self._as_rows(rows, taps, width)

    def _as_rows(self, x: Tensor, taps: Sequence[int], width: int) -> Tensor:
        """Turn ``(batch, channels, ...)``, positions but for the dimensions `taps`, into rows ``(groups, n, width / groups)``."""
        module: Any = self
        positions = [dimension for dimension in range(2, x.dim()) if dimension not in taps]
        return x.permute(0, *positions, 1, *taps).reshape(-1, module.groups, width // module.groups).transpose(0, 1)

    def _part(self, output_size: Sequence[int], channels: int) -> int:
        """Return how many examples to make rows of at a time."""
        module: Any = self
        return max(1, ROWS_SIZE // int(math.prod(output_size) * channels * math.prod(module.kernel_size)))

    def _sides(self) -> list[tuple[int, int]]:
        module: Any = self
        return padded_sides(module.padding, module.kernel_size, module.dilation)

    def _padded(self, x: Tensor) -> Tensor:
        """Pad with anything but zeros, which need not be there to be read."""
        module: Any = self
        if module.padding_mode == "zeros":
            return x
        return F.pad(x, [side for pair in reversed(self._sides()) for side in pair], mode=module.padding_mode)

    def _axis(self, axis: int) -> Axis:
        module: Any = self
        padding = self._sides()[axis][0] if module.padding_mode == "zeros" else 0
        return Axis(module.kernel_size[axis], module.stride[axis], module.dilation[axis], padding)

    def _taps(self, axis: int, positions: int, length: int) -> Tensor:
        """Return which input each tap of each output position reads."""
        module: Any = self
        return self._axis(axis).read_by(positions, length) if module.transposed else self._axis(axis).reads(positions, length)

    def _read(self, axis: int, length: int, positions: int) -> tuple[Tensor, Tensor]:
        """Return which of `length` inputs along an axis are read, and which of the output `positions` each reaches with each tap."""
        module: Any = self
        along = self._axis(axis)
        index = along.reads(length, positions) if module.transposed else along.read_by(length, positions)
        read = (index < positions).any(1)
        return read.nonzero().squeeze(1), index[read]
