"""Factorized convolutions in one, two and three dimensions, plain and transposed."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectrim import linalg
from spectrim.layers.base import OneWeight, Share
from spectrim.layers.factors import Factors
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


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: type[nn.Module], groups: int, padding_mode: str, shape: dict[str, Any]
) -> Tensor:
    """Run one convolution of the given geometry; padding modes other than zeros pad first, as torch's layers do."""
    options = {key: value for key, value in shape.items() if key != "kernel_size"}
    if padding_mode != "zeros":
        padding = options["padding"]
        if padding == "valid":
            sides = [(0, 0)] * len(shape["kernel_size"])
        elif padding == "same":
            spans = [d * (k - 1) for d, k in zip(options["dilation"], shape["kernel_size"], strict=True)]
            sides = [(span // 2, span - span // 2) for span in spans]
        else:
            sides = [(p, p) for p in padding]
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
        """Reshape the two factors to the kernels of the two operations."""
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
        return first.flatten(0, 1).contiguous(), second.flatten(0, 1).contiguous()

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
        first, second = (self.laid_out(kernel) for kernel in self._kernels(*factors.balanced()))
        one, two = geometry(module, self.scheme)
        middle, common = factors.blocks * self.rank, {"groups": module.groups, "device": "meta"}
        head: Any = base_of(self)(module.in_channels, middle, bias=False, padding_mode=module.padding_mode, **one, **common)
        tail: Any = second_kind(self, self.scheme)(
            middle, module.out_channels, bias=module.bias is not None, padding_mode=self._second_mode(), **two, **common
        )
        head.weight, tail.weight = share(factors, "first", first), share(factors, "second", second)
        if module.bias is not None:
            tail.bias = module.bias
        return nn.Sequential(head, tail)


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
