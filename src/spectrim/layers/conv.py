"""Factorized convolutions in one, two and three dimensions, plain and transposed."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectrim import linalg
from spectrim.layers.base import ROWS_SIZE, OneWeight, Share
from spectrim.layers.factors import Factors
from spectrim.layers.plain import PlainPair
from spectrim.linalg import Fold

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


def plain_of(module: Any) -> type[nn.Module]:
    """Return the torch class of the not transposed convolution with as many dimensions."""
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(module.kernel_size) - 1]


def geometry(module: Any, scheme: Fold) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the geometries (constructor arguments) of the two operations that replace a convolution.

    ``channel``: the layer's own kernel, then 1x1. ``spatial``: a vertical kernel, then a horizontal one.
    """
    own = {name: getattr(module, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    if module.transposed:
        own["output_padding"] = module.output_padding
    if scheme == "channel":
        return own, {"kernel_size": (1,) * len(module.kernel_size)}
    neutral = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
    vertical = {key: value if isinstance(value, str) else (value[0], neutral[key]) for key, value in own.items()}
    horizontal = {key: value if isinstance(value, str) else (neutral[key], value[1]) for key, value in own.items()}
    return vertical, horizontal


def second_kind(module: Any, scheme: Fold) -> type[nn.Module]:
    """Return the class of the second operation; the first has the layer's own class."""
    return plain_of(module) if scheme == "channel" else base_of(module)


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


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: type[nn.Module], groups: int, padding_mode: str, shape: dict[str, Any]
) -> Tensor:
    """Run one convolution of the given geometry; padding modes other than zeros pad first, as torch's layers do."""
    options = {key: value for key, value in shape.items() if key != "kernel_size"}
    if padding_mode != "zeros":
        sides = padded_sides(options["padding"], shape["kernel_size"], options["dilation"])
        x = F.pad(x, [side for pair in reversed(sides) for side in pair], mode=padding_mode)
        options["padding"] = 0
    return cast(Tensor, CONVOLUTIONS[kind](x, weight, bias, groups=groups, **options))


class FactorizedConv(OneWeight):
    """A convolution whose folded kernel is ``U diag(|S|) Vh``; with groups, block by block at one common rank.

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
