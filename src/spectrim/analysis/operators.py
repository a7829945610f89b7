"""`Convolution`: a layer as the linear operator that it applies, without its bias."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectrim.errors import LayerError, SettingError
from spectrim.layers import is_factorized, kind_of
from spectrim.layers.base import share_nothing
from spectrim.layers.geometry import PLAIN, TRANSPOSED, padded_sides
from spectrim.layers.reader import FactorizedReader
from spectrim.plain.chain import PlainPair, of_one_group
from spectrim.plain.quaternion import QConv, QLinear, QuaternionLayer
from spectrim.plain.reader import PlainReader

CONV = (None, F.conv1d, F.conv2d, F.conv3d)
PADDED = {"zeros": "constant", "circular": "circular"}
"""Padding modes that make a linear operator whose norm the symbol bounds, and what `F.pad` calls them."""

HINT = "convolutions that are not transposed and linear layers are taken, also of quaternions: dense, factorized or merged"


@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution without bias; with no axes, the product with a matrix.

    Args:
        kernel: ``(out, in / groups, taps...)`` with zero to three axes of taps.
        stride: one integer >= 1 for each axis, or one for all.
        padding: as torch's convolutions take it: ``"same"``, ``"valid"``, an integer or one for each axis.
        dilation: as `stride`.
        groups: blocks of channels.
        padding_mode: ``"zeros"`` or ``"circular"``.

    Raises:
        SettingError: for another padding mode, or a kernel that is not of this shape.

    Examples:
        >>> Convolution(torch.ones(4, 3, 3, 3))(torch.ones(1, 3, 8, 8)).shape
        torch.Size([1, 4, 8, 8])
    """

    kernel: Tensor
    stride: int | Sequence[int] = 1
    padding: str | int | Sequence[int] = "same"
    dilation: int | Sequence[int] = 1
    groups: int = 1
    padding_mode: str = "zeros"

    def __post_init__(self) -> None:
        if not (2 <= self.kernel.dim() <= 5 and self.kernel.is_floating_point() and len(self.kernel) % self.groups == 0):
            rule = "a floating-point tensor (out, in / groups, taps...) with zero to three axes of taps, out divisible by groups"
            raise SettingError("Convolution", "kernel", got=tuple(self.kernel.shape), rule=rule)
        if self.padding_mode not in PADDED:
            raise SettingError("Convolution", "padding_mode", got=self.padding_mode, rule="'zeros' or 'circular'")

    @property
    def axes(self) -> int:
        """Number of axes of taps."""
        return self.kernel.dim() - 2

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride along each axis."""
        return each(self.stride, self.axes)

    @property
    def dilations(self) -> tuple[int, ...]:
        """Dilation along each axis."""
        return each(self.dilation, self.axes)

    @property
    def sides(self) -> list[tuple[int, int]]:
        """How much is padded before and behind each axis."""
        padding = self.padding if isinstance(self.padding, str) else each(self.padding, self.axes)
        return padded_sides(padding, self.kernel.shape[2:], self.dilations)

    @property
    def spans(self) -> list[int]:
        """By how many positions the kernel reads beyond one, along each axis."""
        return [d * (k - 1) for d, k in zip(self.dilations, self.kernel.shape[2:], strict=True)]

    @property
    def periodic(self) -> bool:
        """Whether the operator commutes with cyclic shifts by its stride: it is circular and pads as much as its kernel spans."""
        return [sum(pair) for pair in self.sides] == self.spans and (self.padding_mode == "circular" or not any(self.spans))

    def blocks(self) -> Tensor:
        """Return the kernel as ``(groups, out / groups, in / groups, taps...)``."""
        return self.kernel.reshape(self.groups, -1, *self.kernel.shape[1:])

    def of_group(self, group: int) -> "Convolution":
        """Return the convolution of one block of channels."""
        return replace(self, kernel=self.blocks()[group], groups=1)

    def scaled(self, factors: Tensor) -> "Convolution":
        """Multiply each output channel by a factor ``(out,)``."""
        return replace(self, kernel=self.kernel * factors.to(self.kernel).reshape(-1, *[1] * (self.kernel.dim() - 1)))

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it to ``(batch, in, size...)``."""
        run = CONV[self.axes]
        if run is None:
            return x @ self.kernel.mT
        padded = F.pad(x, [side for pair in reversed(self.sides) for side in pair], mode=PADDED[self.padding_mode])
        return run(padded, self.kernel, None, self.strides, 0, self.dilations, self.groups)


def each(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Return one integer for each axis."""
    return (value,) * axes if isinstance(value, int) else tuple(value)


def operators_of(layer: Any) -> tuple[Convolution, ...]:
    """Return the convolutions that a layer applies one after the other: one for a dense layer, two for a pair of factors.

    Args:
        layer: a convolution or linear layer, dense, factorized or merged; a `Convolution`; or a kernel, padded with zeros to the same size.

    Returns:
        Kernels detached, in float64; those of a `Convolution` or a tensor keep their gradient.

    Raises:
        LayerError: for any other layer, one whose class has a forward that is not torch's, and weights that are not finite.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> [tuple(part.kernel.shape) for part in operators_of(factorize(nn.Conv2d(4, 8, 3), "spatial"))]
        [(12, 4, 3, 1), (8, 12, 1, 3)]
    """
    if isinstance(layer, Convolution):
        return (_finite(replace(layer, kernel=layer.kernel.double())),)
    if isinstance(layer, Tensor):
        return (_finite(Convolution(layer.double() if layer.is_floating_point() else layer)),)
    if isinstance(layer, nn.Module) and not has_operator(layer) and not isinstance(layer, nn.Embedding):
        raise LayerError(type(layer).__name__, "has no operator that is known here", hint=HINT)
    pair: nn.Module | None = layer if isinstance(layer, PlainPair) else None
    if isinstance(layer, nn.Module) and is_factorized(layer) and not isinstance(layer, nn.Embedding):
        keys = [key for key, _ in layer.named_factors()]
        pair = layer.split(share_nothing, keys) if keys == ["weight"] else None
    if isinstance(pair, PlainPair) and not isinstance(pair[0], nn.Embedding):
        return _of_equal_groups(tuple(part for half in pair for part in operators_of(half)))
    if isinstance(layer, nn.Linear):
        return (_finite(Convolution(layer.weight.detach().double() + 0)),)
    if isinstance(layer, QLinear):
        return (_finite(Convolution(layer.real_weight().detach().double())),)
    if isinstance(layer, QConv):
        return (_finite(Convolution(layer.real_weight().detach().double(), layer.stride, layer.padding, layer.dilation)),)
    if not isinstance(layer, PLAIN) or isinstance(layer, TRANSPOSED):
        raise LayerError(type(layer).__name__, "has no operator that is known here", hint=HINT)
    if layer.padding_mode not in PADDED:
        raise LayerError(type(layer).__name__, f"pads by {layer.padding_mode!r}, which has no symbol", hint="zeros and circular have one")
    kernel = layer.weight.detach().double() + 0  # composed, where it is made of parts
    return (_finite(Convolution(kernel, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)),)


def has_operator(layer: nn.Module) -> bool:
    """Whether a layer does nothing but apply its weight: a forward in its class or on the layer that is not torch's may do more."""
    own: Any = getattr(type(layer), "_own", type(layer))  # of what was exchanged
    kind = kind_of(layer)
    if kind is FactorizedReader or isinstance(layer, PlainReader) or (is_factorized(layer) and layer.unobserved):
        return False
    known = (nn.Linear, *PLAIN, *TRANSPOSED, QuaternionLayer, PlainPair)
    base: Any = getattr(type(layer), "_base", None) or (kind.base_of(own) if kind else None)
    base = base or next((one for one in known if isinstance(layer, one)), None)
    same = all(getattr(own, name, None) is getattr(base, name, None) for name in ("forward", "__call__", "_conv_forward"))
    return (is_factorized(layer) or isinstance(layer, known)) and base is not None and same and "forward" not in vars(layer)


def _finite(part: Convolution) -> Convolution:
    if not bool(torch.isfinite(part.kernel).all()):
        raise LayerError("kernel", "holds NaN or infinite values", hint="load the last good checkpoint")
    return part


def _of_equal_groups(parts: tuple[Convolution, ...]) -> tuple[Convolution, ...]:
    """Return parts of which some are depthwise as parts of one group each."""
    if len({part.groups for part in parts}) == 1:
        return parts
    return tuple(replace(part, kernel=of_one_group(part.kernel, part.groups), groups=1) for part in parts)


def of_group(parts: Sequence[Convolution], group: int) -> tuple[Convolution, ...]:
    """Return what the parts do to one block of channels."""
    return tuple(part.of_group(group) for part in parts)


def apply(parts: Sequence[Convolution], x: Tensor) -> Tensor:
    """Apply the parts one after the other."""
    for part in parts:
        x = part(x)
    return x


def basis(channels: int, size: Sequence[int]) -> Tensor:
    """Return the unit vectors of the inputs, ``(n, channels, size...)`` with ``n = channels * size...``, in float64."""
    count = channels * int(torch.tensor(size).prod())
    return torch.eye(count, dtype=torch.float64).reshape(count, channels, *size)
