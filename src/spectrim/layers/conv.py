"""Factorized convolutions in one, two and three dimensions, plain and transposed."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectrim import linalg
from spectrim.forms.svd import Factors
from spectrim.layers.base import ROWS_SIZE, OneWeight, Share
from spectrim.layers.geometry import (
    CHANNELS_LAST,
    Axis,
    base_of,
    convolve,
    geometry,
    memory_format_of,
    output_size,
    padded_sides,
    second_kind,
    take,
)
from spectrim.linalg.fold import Fold
from spectrim.plain.chain import PlainPair


class FactorizedConv(OneWeight):
    """A convolution whose folded kernel is ``U diag(S) Vh``; with groups, block by block at one common rank.

    Source: Yang et al., arXiv 2004.09031, section 3.1; transposed forms and groups follow from the same folding.
    """

    channels_last: bool = False

    @classmethod
    def adopt(cls, dense: Any, factors: Mapping[str, Factors], scheme: Fold) -> Any:
        """Take over a dense convolution, the memory format of its kernel included."""
        layer = super().adopt(dense, factors, scheme)
        layer.__dict__["channels_last"] = (
            memory_format_of(dense.weight) is not torch.contiguous_format
        )  # the format itself cannot be pickled
        return layer

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        """Refuse depthwise kernels: each block has a single input channel."""
        if module.groups > 1 and module.groups == module.in_channels:
            return "depthwise: each block has one input channel, so there is no rank to cut"
        return None

    @classmethod
    def schemes(cls, module: Any) -> tuple[Fold, ...]:
        """Both for a 2-D kernel larger than 1x1; the channel scheme otherwise."""
        return ("channel", "spatial") if len(module.kernel_size) == 2 and math.prod(module.kernel_size) > 1 else ("channel",)

    @classmethod
    def fold(cls, module: Any, name: str, weight: Tensor, scheme: Fold) -> Tensor:
        """Fold the kernel, see `linalg.to_matrix`."""
        return linalg.to_matrix(weight, scheme, module.groups, module.transposed)

    @classmethod
    def unfold(cls, module: Any, name: str, matrix: Tensor, scheme: Fold) -> Tensor:
        """Unfold the kernel, see `linalg.from_matrix`."""
        out, in_ = module.out_channels, module.in_channels
        lead = (in_, out // module.groups) if module.transposed else (out, in_ // module.groups)
        return linalg.from_matrix(matrix, (*lead, *module.kernel_size), scheme, module.groups, module.transposed)

    @classmethod
    def work(cls, module: Any, name: str, scheme: Fold, rank: int | None, shape: Sequence[int] | None) -> float:
        """Multiply-accumulates of one convolution, or of two of `rank`, from the sizes between them.

        A transposed convolution multiplies once for each input position, a plain one for each output position.
        """
        in_, out, groups, kernel = module.in_channels, module.out_channels, module.groups, module.kernel_size
        if shape is None:  # one output position of a large plane; the strides give the others
            before = [1.0] * len(kernel) if module.transposed else [float(s) for s in module.stride]
            after = [float(s) for s in module.stride] if module.transposed else [1.0] * len(kernel)
            batch = 1
        else:
            before = [float(size) for size in shape[-len(kernel) :]]
            after = [float(size) for size in output_size(module, shape[-len(kernel) :])]
            batch = shape[0] if len(shape) == len(kernel) + 2 else 1
        first = math.prod(before if module.transposed else after)
        if rank is None:
            return float(batch * first * out * (in_ // groups) * math.prod(kernel))
        if scheme == "channel":
            return float(batch * rank * (first * in_ * math.prod(kernel) + math.prod(after) * out))
        middle = after[0] * before[1]
        vertical = (math.prod(before) if module.transposed else middle) * in_ * kernel[0]
        horizontal = (middle if module.transposed else math.prod(after)) * out * kernel[1]
        return float(batch * rank * (vertical + horizontal))

    def _kernels(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Reshape the two factors to the kernels of the two operations, in the memory format that the dense kernel had."""
        module: Any = self
        blocks, rank = self.factors_of("weight").blocks, self.rank
        in_, out = module.in_channels // blocks, module.out_channels // blocks
        first_shape, second_shape = (shape["kernel_size"] for shape in geometry(module, self.scheme))
        right = right.reshape(blocks, rank, in_, *first_shape)
        first = right.transpose(1, 2) if module.transposed else right
        if self.scheme == "channel":
            second = left.reshape(blocks, out, rank, *second_shape)
        else:
            second = left.reshape(blocks, out, second_shape[1], rank).transpose(2, 3).unsqueeze(-2)
            if module.transposed:
                second = second.transpose(1, 2)
        return self.laid_out(first.flatten(0, 1)), self.laid_out(second.flatten(0, 1))

    def forward(self, input: Tensor, *output: Any, **options: Any) -> Tensor:
        """Convolve ``(batch, in, size...)`` or ``(in, size...)``; a transposed convolution takes ``output_size`` too, as torch's does."""
        module: Any = self
        wants_size = any(value is not None for value in (*output, *options.values()))
        if wants_size:
            dense: Any = super()
            return cast(Tensor, dense.forward(input, *output, **options))
        if self.composes("weight", input.shape):
            own, _ = geometry(module, "channel")
            mode = module.padding_mode

            def dense_operation(weight: Tensor) -> Tensor:
                return convolve(input, weight, module.bias, base_of(self), module.groups, mode, own)

            return self.run_dense("weight", input.shape, dense_operation)
        first, second = self._kernels(*self.factors_of("weight").pair())
        one, two = geometry(module, self.scheme)
        middle = convolve(input, first, None, base_of(self), module.groups, module.padding_mode, one)
        return convolve(middle, second, module.bias, second_kind(self, self.scheme), module.groups, self._second_mode(), two)

    def input_rows(self, x: Tensor, output_shape: Sequence[int], scheme: Fold | None = None) -> Iterator[Tensor]:
        """Yield the patches ``(groups, n, in * k...)``, or vertical ones ``(groups, n, in * kh)``, that the folded kernel meets.

        One for each output position; in the spatial scheme for each output row and each column of the input that is read at all. A
        transposed convolution meets at an output position the inputs that reach it, and zeros for the taps that fall between them.
        """
        module: Any = self
        count, scheme = len(module.kernel_size), scheme or self.scheme
        x, after = self._padded(x if x.dim() == count + 2 else x.unsqueeze(0)), output_shape[-count:]
        if count == 2 and scheme == "channel" and not module.transposed:
            yield from self._unfolded(x, self._part(after))
            return
        axes = range(1 if scheme == "spatial" else count)
        if scheme == "spatial":
            x = x.index_select(3, self._columns(x.shape[3], after[1])[0].to(x.device))
        width = module.in_channels * math.prod(module.kernel_size[axis] for axis in axes)
        for rows in torch.split(x, self._part(after)):
            for axis in reversed(axes):
                rows = take(rows, 2 + axis, self._taps(axis, after[axis], rows.shape[2 + axis]))
            taps = [3 + 2 * axis for axis in axes]
            positions = [axis for axis in range(2, rows.dim()) if axis not in taps]
            yield rows.permute(0, *positions, 1, *taps).reshape(-1, module.groups, width // module.groups).transpose(0, 1)

    def _unfolded(self, x: Tensor, part: int) -> Iterator[Tensor]:
        """Yield the patches of images as torch has them in one call, that many images at a time."""
        module: Any = self
        zeros = [side for pair in reversed(self._sides()) for side in pair] if module.padding_mode == "zeros" else [0] * 4
        for images in torch.split(x, part):
            patches = F.unfold(F.pad(images, zeros), module.kernel_size, module.dilation, 0, module.stride)
            yield patches.reshape(len(images), module.groups, -1, patches.shape[-1]).permute(1, 0, 3, 2).flatten(1, 2)

    def output_rows(self, y: Tensor, input_shape: Sequence[int]) -> Iterator[Tensor]:
        """Yield the outputs ``(groups, n, out)``; in the spatial scheme those of each horizontal offset, ``(groups, n, out * kw)``."""
        module: Any = self
        count, out = len(module.kernel_size), module.out_channels
        y = y if y.dim() == count + 2 else y.unsqueeze(0)
        for rows in torch.split(y, self._part(y.shape[2:])):
            if self.scheme == "spatial":
                sides = sum(self._sides()[1]) if module.padding_mode != "zeros" else 0
                rows = take(rows, 3, self._columns(input_shape[-1] + sides, rows.shape[3])[1]).permute(0, 2, 3, 1, 4)
                out = module.out_channels * module.kernel_size[1]
            else:
                rows = rows.movedim(1, -1)
            yield rows.reshape(-1, module.groups, out // module.groups).transpose(0, 1)

    def _part(self, output_size: Sequence[int]) -> int:
        """Return how many examples to make rows of at a time."""
        module: Any = self
        return max(1, ROWS_SIZE // int(math.prod(output_size) * module.in_channels * math.prod(module.kernel_size)))

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

    def _columns(self, columns: int, width: int) -> tuple[Tensor, Tensor]:
        """Return which input columns the second operation of the spatial scheme reads, and for each tap the output column it goes to."""
        module: Any = self
        index = self._axis(1).reads(columns, width) if module.transposed else self._axis(1).read_by(columns, width)
        read = (index < width).any(1)
        return read.nonzero().squeeze(1), index[read]

    def _second_mode(self) -> str:
        module: Any = self
        return "zeros" if self.scheme == "channel" else str(module.padding_mode)

    def laid_out(self, weight: Tensor) -> Tensor:
        """Return a kernel in the memory format that the dense layer had."""
        return weight.contiguous(memory_format=CHANNELS_LAST[weight.dim()] if self.channels_last else torch.contiguous_format)

    def split(self, share: Share, paying: Collection[str]) -> nn.Module | None:
        """Two convolutions, in → groups * rank → out; the second carries the bias."""
        if "weight" not in paying:
            return None
        module: Any = self
        factors = self.factors_of("weight")
        first, second = self._kernels(*factors.balanced())
        one, two = geometry(module, self.scheme)
        middle, common = factors.blocks * self.rank, {"groups": module.groups, "device": "meta"}
        head: Any = base_of(self)(module.in_channels, middle, bias=False, padding_mode=module.padding_mode, **one, **common)
        tail: Any = second_kind(self, self.scheme)(
            middle, module.out_channels, bias=module.bias is not None, padding_mode=self._second_mode(), **two, **common
        )
        head.weight, tail.weight = share(factors, "first", first), share(factors, "second", second)
        if module.bias is not None:
            tail.bias = module.bias
        return PlainPair(head, tail)


class FactorizedConv1d(FactorizedConv, nn.Conv1d):
    """Factorized `torch.nn.Conv1d`."""

    dense_kinds = (nn.Conv1d,)


class FactorizedConv2d(FactorizedConv, nn.Conv2d):
    """Factorized `torch.nn.Conv2d`."""

    dense_kinds = (nn.Conv2d,)


class FactorizedConv3d(FactorizedConv, nn.Conv3d):
    """Factorized `torch.nn.Conv3d`."""

    dense_kinds = (nn.Conv3d,)


class FactorizedConvTranspose1d(FactorizedConv, nn.ConvTranspose1d):
    """Factorized `torch.nn.ConvTranspose1d`."""

    dense_kinds = (nn.ConvTranspose1d,)


class FactorizedConvTranspose2d(FactorizedConv, nn.ConvTranspose2d):
    """Factorized `torch.nn.ConvTranspose2d`."""

    dense_kinds = (nn.ConvTranspose2d,)


class FactorizedConvTranspose3d(FactorizedConv, nn.ConvTranspose3d):
    """Factorized `torch.nn.ConvTranspose3d`."""

    dense_kinds = (nn.ConvTranspose3d,)
