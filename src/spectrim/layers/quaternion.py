"""Factorized quaternion layers: two of them in place of one, through fewer quaternions."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectrim.forms.quaternion import QuaternionFactors
from spectrim.layers.exchanged import Share
from spectrim.layers.geometry import padded_sides
from spectrim.layers.weights import ROWS_SIZE, OneWeight
from spectrim.linalg.fold import Fold
from spectrim.plain.chain import PlainPair
from spectrim.plain.quaternion import QConv1d, QConv2d, QConv3d, QLinear, hamilton

Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class FactorizedQuaternion(OneWeight):
    """A quaternion layer whose folded weight ``(out, in / 4 taps)`` is ``U diag(S) Vh`` of quaternions.

    Multiply-accumulates are real ones: 16 for each product of quaternions, of which a weight stores 4 numbers.
    """

    @classmethod
    def schemes(cls, module: Any) -> tuple[Fold, ...]:
        """Its own."""
        return ("quaternion",)

    @classmethod
    def fold(cls, module: Any, name: str, weight: Tensor, scheme: Fold) -> Tensor:
        """Put all taps on the input side."""
        return weight.flatten(1)

    @classmethod
    def unfold(cls, module: Any, name: str, matrix: Tensor, scheme: Fold) -> Tensor:
        """Give the taps back their axes."""
        return matrix.reshape(-1, cls.inputs(module) // 4, *getattr(module, "kernel_size", ()))

    @classmethod
    def inputs(cls, module: Any) -> int:
        """Return the number of real features that are read."""
        raise NotImplementedError

    def run_whole(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the layer with a real weight."""
        raise NotImplementedError

    def run_second(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the second of two operations with a real weight, which has no taps."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Map real features, as the dense layer does."""
        module: Any = self
        factors = self.factors_of("weight")
        if not factors.rounds and self.composes("weight", input.shape):
            return self.run_dense("weight", input.shape, lambda weight: self.run_whole(input, hamilton(weight), module.bias))
        right, left = factors.chain()
        first = hamilton(self._kernel(right))
        between = factors.run(0, partial(self.run_whole, bias=None), input, first)
        second = hamilton(left.reshape(*left.shape, *(1 for _ in first.shape[2:])))
        return factors.run(1, partial(self.run_second, bias=module.bias), between, second)

    def _kernel(self, right: Tensor) -> Tensor:
        return self.unfold(self, "weight", right, self.scheme)

    def pieces(self, rank: int, bias: bool) -> tuple[Any, Any]:
        """Return two layers on the meta device, through so many quaternions."""
        raise NotImplementedError

    def split(self, share: Share, paying: Collection[str]) -> nn.Module | None:
        """Two quaternion layers, the bias in the second."""
        if "weight" not in paying:
            return None
        factors = self.factors_of("weight")
        bias: nn.Parameter | None = getattr(self, "bias", None)
        right, left = factors.written()
        first, second = self.pieces(factors.rank, bias is not None)
        first.weight = share(factors, "right", self._kernel(right))
        second.weight = share(factors, "left", left.reshape(second.weight.shape))
        if bias is not None:
            second.bias = bias
        return PlainPair(first, second)

    def params_written(self, name: str, rank: int | None, site: str) -> dict[str, int]:
        """Two tensors, which layers with the same weight share."""
        if rank is None:
            return super().params_written(name, rank, site)
        form: Any = self.factors_of(name)
        assert isinstance(form, QuaternionFactors)
        out, in_ = form.shape
        return {"left": rank * out, "right": rank * in_}


class FactorizedQLinear(FactorizedQuaternion, QLinear):
    """A factorized `QLinear`."""

    dense_kinds = (QLinear,)

    @classmethod
    def inputs(cls, module: Any) -> int:
        """Return the input features."""
        return int(module.in_features)

    @classmethod
    def work(cls, module: Any, name: str, scheme: Fold, size: Any, shape: Sequence[int] | None) -> float:
        """``out * in`` real ones, or ``4 rank (out + in)``, for each row of the input."""
        out, in_ = module.out_features, module.in_features
        return float((1 if shape is None else math.prod(shape[:-1])) * (out * in_ if size is None else 4 * size * (out + in_)))

    def run_whole(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply."""
        return F.linear(input, weight, bias)

    def run_second(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply."""
        return F.linear(input, weight, bias)

    def pieces(self, rank: int, bias: bool) -> tuple[QLinear, QLinear]:
        """Return two `QLinear`."""
        return QLinear(self.in_features, 4 * rank, False, "meta"), QLinear(4 * rank, self.out_features, bias, "meta")


class FactorizedQConv(FactorizedQuaternion):
    """A factorized quaternion convolution: all taps in the first of two, the second one without."""

    @classmethod
    def inputs(cls, module: Any) -> int:
        """Return the input channels."""
        return int(module.in_channels)

    @classmethod
    def work(cls, module: Any, name: str, scheme: Fold, size: Any, shape: Sequence[int] | None) -> float:
        """``out * in * taps`` real ones at each output position, or ``4 rank (out + in * taps)``."""
        width = module.in_channels * math.prod(module.kernel_size)
        out = module.out_channels
        return float(positions(module, shape) * (out * width if size is None else 4 * size * (out + width)))

    def run_whole(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve by the settings of the layer."""
        module: Any = self
        output: Tensor = module.convolved(input, weight, bias)
        return output

    def run_second(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve without taps."""
        run: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        output: Tensor = run(input, weight, bias)
        return output

    def pieces(self, rank: int, bias: bool) -> tuple[Any, Any]:
        """Return two convolutions."""
        module: Any = self
        own = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        first = self.dense_kinds[0](module.in_channels, 4 * rank, module.kernel_size, **own, bias=False, device="meta")
        return first, self.dense_kinds[0](4 * rank, module.out_channels, 1, bias=bias, device="meta")

    def input_rows(self, x: Tensor, output_shape: Sequence[int], scheme: Fold | None = None) -> Iterator[Tensor]:
        """Yield the patches, ``(1, n, in * taps)``: what the real matrix of the folded weight is multiplied with."""
        module: Any = self
        axes = len(module.kernel_size)
        x = x if x.dim() == axes + 2 else x.unsqueeze(0)
        sides = padded_sides(module.padding, module.kernel_size, module.dilation)
        width = module.in_channels * math.prod(module.kernel_size)
        part = max(1, ROWS_SIZE // max(1, width * math.prod(output_shape[-axes:])))
        for images in torch.split(x, part):
            patches = F.pad(images, [side for pair in reversed(sides) for side in pair])
            for axis, (size, stride, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
                patches = patches.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
            yield patches.movedim(1, 1 + axes).reshape(1, -1, width)

    def output_rows(self, y: Tensor, input_shape: Sequence[int]) -> Iterator[Tensor]:
        """Yield the outputs, ``(1, n, out)``, in the order of `input_rows`."""
        module: Any = self
        axes = len(module.kernel_size)
        y = y if y.dim() == axes + 2 else y.unsqueeze(0)
        width = module.in_channels * math.prod(module.kernel_size)
        for images in torch.split(y, max(1, ROWS_SIZE // max(1, width * math.prod(y.shape[2:])))):
            yield images.movedim(1, -1).reshape(1, -1, y.shape[1])


class FactorizedQConv1d(FactorizedQConv, QConv1d):
    """A factorized `QConv1d`."""

    dense_kinds = (QConv1d,)


class FactorizedQConv2d(FactorizedQConv, QConv2d):
    """A factorized `QConv2d`."""

    dense_kinds = (QConv2d,)


class FactorizedQConv3d(FactorizedQConv, QConv3d):
    """A factorized `QConv3d`."""

    dense_kinds = (QConv3d,)


def positions(module: Any, shape: Sequence[int] | None) -> int:
    """Return the output positions of a convolution on an input of a shape, the batch included; 1 without a shape."""
    if shape is None:
        return 1
    axes = len(module.kernel_size)
    sides = padded_sides(module.padding, module.kernel_size, module.dilation)
    along = zip(shape[-axes:], sides, module.kernel_size, module.stride, module.dilation, strict=True)
    counts: list[int] = [(size + sum(side) - dilation * (taps - 1) - 1) // stride + 1 for size, side, taps, stride, dilation in along]
    return math.prod(counts) * math.prod(shape[: -axes - 1])
