"""Quaternion layers: four real features are one quaternion, and a weight multiplies quaternions, not real numbers."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONV = (F.conv1d, F.conv2d, F.conv3d)


def hamilton(column: Tensor) -> Tensor:
    """Return the real matrix that multiplies as a matrix of quaternions does from the left, ``(4 m, 4 n, ...)``.

    ``[[a, -b, -c, -d], [b, a, -d, c], [c, d, a, -b], [d, -c, b, a]]`` for the parts ``a + b i + c j + d k``.

    Args:
        column: its first block column, the parts on top of each other, ``(4 m, n, ...)``.

    Examples:
        >>> hamilton(torch.tensor([[0.0], [1.0], [0.0], [0.0]])) @ torch.tensor([0.0, 0.0, 1.0, 0.0])  # i j = k
        tensor([0., 0., 0., 1.])
    """
    a, b, c, d = column.chunk(4)
    others = (torch.cat([-b, a, d, -c]), torch.cat([-c, -d, a, b]), torch.cat([-d, c, -b, a]))
    return torch.cat([column, *others], 1)


class QuaternionLayer(nn.Module):
    """Base of the quaternion layers: a weight of a quarter of the real layer's numbers, and a real bias.

    Args:
        shape: of the weight, ``(out, in / 4, ...)``: the four parts of ``out / 4`` rows of quaternions on top of each other.
        bias: whether there is one.
        device, dtype: of the parameters.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, shape: Sequence[int], bias: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as real layers of torch do: uniform within ``1 / sqrt(fan in)``."""
        bound = 1 / math.sqrt(4 * math.prod(self.weight.shape[1:]))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def real_weight(self) -> Tensor:
        """Return the weight of the real layer that computes the same, ``(out, in, ...)``."""
        return hamilton(self.weight)

    def settings_with(self, second: Any) -> dict[str, Any]:
        """Return the attributes of the layer that this one and another, applied behind it, stand for."""
        raise NotImplementedError

    def shape_with(self, second: Any) -> tuple[int, ...]:
        """Return the shape of the weight of both."""
        return (second.weight.shape[0], *self.weight.shape[1:])

    def product_with(self, second: Any) -> Tensor:
        """Return the weight of both, one after the other; the second one has no taps."""
        return (hamilton(second.weight.flatten(1)) @ self.weight.flatten(1)).reshape(self.shape_with(second))


class QLinear(QuaternionLayer):
    """``y = W x + b`` of quaternions; a quarter of the numbers of a real layer of as many features, and as many multiplications.

    The features of a quaternion are a quarter of all apart: first the real parts, then those of ``i``, ``j`` and ``k``.

    Args:
        in_features: real ones, divisible by 4.
        out_features: real ones, divisible by 4.
        bias: a real number for each output.
        device, dtype: of the parameters.

    Raises:
        ValueError: for features that are not divisible by 4.

    Examples:
        >>> layer = QLinear(8, 12)
        >>> layer(torch.ones(2, 8)).shape, tuple(layer.weight.shape)
        (torch.Size([2, 12]), (12, 2))

    Source: Gaudet and Maida, arXiv 1712.04604; names and order of the features as in hTorch.
    Deviation: drawn as `nn.Linear` is; the bias is real.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        _check("QLinear", in_features=in_features, out_features=out_features)
        super().__init__((out_features, in_features // 4), bias, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        return F.linear(input, self.real_weight(), self.bias)

    def settings_with(self, second: Any) -> dict[str, Any]:
        """Return inputs of the first and outputs of the second layer."""
        return {"in_features": self.in_features, "out_features": second.out_features}

    def extra_repr(self) -> str:
        """Sizes for the module's printout."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QConv(QuaternionLayer):
    """Base of the quaternion convolutions: taps are matrices of quaternions; padded with zeros, of one group.

    Args:
        in_channels: real ones, divisible by 4: first all real parts, then those of ``i``, ``j`` and ``k``.
        out_channels: real ones, divisible by 4.
        kernel_size: one number, or one for each axis.
        stride: as `kernel_size`.
        padding: as `kernel_size`, or ``"same"`` or ``"valid"``.
        dilation: as `kernel_size`.
        bias: a real number for each output channel.
        device, dtype: of the parameters.

    Raises:
        ValueError: for channels that are not divisible by 4.
    """

    axes: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        _check(type(self).__name__, in_channels=in_channels, out_channels=out_channels)
        taps = self._each(kernel_size)
        super().__init__((out_channels, in_channels // 4, *taps), bias, device, dtype)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, taps
        self.stride, self.dilation = self._each(stride), self._each(dilation)
        self.padding = padding if isinstance(padding, str) else self._each(padding)

    def _each(self, value: int | Sequence[int]) -> tuple[int, ...]:
        given = (value,) * self.axes if isinstance(value, int) else tuple(value)
        if len(given) != self.axes:
            raise ValueError(f"{type(self).__name__}: one number, or {self.axes} of them; got {value}")
        return given

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(batch, in_channels, size...)`` or ``(in_channels, size...)``."""
        return self.convolved(input, self.real_weight(), self.bias)

    def convolved(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with a real weight, by the settings of this layer."""
        output: Tensor = CONV[self.axes - 1](input, weight, bias, self.stride, self.padding, self.dilation)
        return output

    def settings_with(self, second: Any) -> dict[str, Any]:
        """Return the settings of the first one: the second one has no taps."""
        own = ("in_channels", "kernel_size", "stride", "padding", "dilation")
        return {name: getattr(self, name) for name in own} | {"out_channels": second.out_channels}

    def extra_repr(self) -> str:
        """Settings for the module's printout."""
        shown = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{shown}, padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}"


class QConv1d(QConv):
    """A `QConv` along one axis.

    Examples:
        >>> QConv1d(4, 8, 3)(torch.ones(1, 4, 9)).shape
        torch.Size([1, 8, 7])
    """

    axes = 1


class QConv2d(QConv):
    """A `QConv` of images.

    Examples:
        >>> layer = QConv2d(4, 8, 3, padding=1)
        >>> layer(torch.ones(1, 4, 9, 9)).shape, tuple(layer.weight.shape)
        (torch.Size([1, 8, 9, 9]), (8, 1, 3, 3))
    """

    axes = 2


class QConv3d(QConv):
    """A `QConv` of volumes."""

    axes = 3


def _check(owner: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 4 or size % 4:
            raise ValueError(f"{owner}: {name} must be a positive multiple of 4, the parts of a quaternion; got {size}")
