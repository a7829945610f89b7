"""Geometry of convolutions: dimensions, memory formats, sizes, paddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectrim.linalg.fold import Fold

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
