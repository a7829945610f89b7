"""Layers that compute on crossbars, and `on_crossbars`, which exchanges them in a copy of a network."""

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.checks import check, unwrapped
from spectrim.errors import LayerError
from spectrim.layers import is_factorized
from spectrim.layers.geometry import convolve, whole
from spectrim.runtimes.crossbar.device import Device
from spectrim.runtimes.crossbar.mapping import Mapping

MAPPED = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""What is mapped: the matrix of outputs by inputs and taps, its bias stays digital."""

NOT_MAPPED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers with products that are not mapped: a network of which only a part ran on crossbars would say too little."""


def is_mapped(module: nn.Module) -> bool:
    """Whether a module is a layer that is mapped; a pair of layers in place of one is no layer, but each of the two is."""
    return isinstance(module, MAPPED) and next(module.children(), None) is None


def check_mapped(model: nn.Module) -> None:
    """Raise a LayerError unless all products with weights of a network can be mapped, and there are some."""
    named = dict(model.named_modules())
    for name, module in named.items():
        if is_factorized(module):
            raise LayerError(name, "is factorized", hint="merge(model) writes the layers that are mapped")
        if isinstance(module, NOT_MAPPED) or (is_mapped(module) and getattr(module, "groups", 1) > 1):
            kind = f"a {type(module).__name__}{' with groups' if is_mapped(module) else ''}"
            raise LayerError(
                name, f"is {kind}, which is not mapped to crossbars", hint="linear layers and plain 1-D and 2-D convolutions are"
            )
    if not any(map(is_mapped, named.values())):
        raise LayerError(type(model).__name__, "has no linear layer and no convolution to map")


class OnCrossbars(nn.Module):
    """A linear layer or convolution whose products run on the tiles of one programmed device.

    Args:
        layer: dense; its bias stays digital.
        device: its cells and converters.
        mapping: to tiles.
        generator: of the draw.
    """

    weight: Tensor

    def __init__(self, layer: nn.Module, device: Device, mapping: Mapping, generator: torch.Generator) -> None:
        super().__init__()
        self.layer, self.device, self.mapping = copy.deepcopy(layer), device, mapping
        weight = cast(Tensor, layer.weight).detach()
        levels, step = mapping.levels(weight.flatten(1), device)
        held = device.programmed(levels, generator)
        slices = 2.0 ** (device.bits * torch.arange(len(held), dtype=torch.float64))
        difference = (held[:, 0] - held[:, 1]) / device.step
        self.register_buffer("weight", ((slices[:, None, None] * difference).sum(0) * step).reshape(weight.shape).to(weight.dtype))
        self.noise = torch.Generator().manual_seed(int(torch.randint(2**31, (1,), generator=generator)))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer: inputs rounded by the converters of the rows, the sums of each tile by those of its columns."""
        layer, weight, x = cast(Any, self.layer), self._read(), rounded(x, self.device.input_bits)
        if self.device.output_bits >= 32:
            if isinstance(layer, nn.Linear):
                return F.linear(x, weight, layer.bias)
            return convolve(x, weight, layer.bias, whole(layer), layer.groups)
        y = sum(rounded(part, self.device.output_bits) for part in self._tiles(x, weight))
        if layer.bias is None:
            return cast(Tensor, y)
        return cast(Tensor, y + (layer.bias if isinstance(layer, nn.Linear) else layer.bias.reshape(-1, *[1] * len(layer.kernel_size))))

    def _read(self) -> Tensor:
        if not self.device.read_noise:
            return self.weight
        noise = torch.randn(self.weight.shape, generator=self.noise, dtype=self.weight.dtype)
        return self.weight * (1 + self.device.read_noise * noise)

    def _tiles(self, x: Tensor, weight: Tensor) -> Any:
        """Yield the sums of each band of rows of the crossbars; tiles beside each other have columns that are rounded alike."""
        layer, flat = cast(Any, self.layer), weight.flatten(1)
        for start in range(0, flat.shape[1], self.mapping.rows):
            band = torch.zeros_like(flat)
            band[:, start : start + self.mapping.rows] = flat[:, start : start + self.mapping.rows]
            if isinstance(layer, nn.Linear):
                yield F.linear(x, band)
            else:
                yield convolve(x, band.reshape(weight.shape), None, whole(layer), layer.groups)


def rounded(x: Tensor, bits: int) -> Tensor:
    """Return the nearest of ``2^bits - 1`` levels, zero among them, up to the largest magnitude."""
    if bits >= 32:
        return x
    step = x.detach().abs().amax() / max(2 ** (bits - 1) - 1, 1)
    return x if not step else (x / step).round() * step


def on_crossbars(model: nn.Module, device: Device, mapping: Mapping | None = None, *, seed: int = 0) -> nn.Module:
    """Return a copy in which linear layers and convolutions run on crossbars that were programmed once; everything else stays digital.

    A merged low-rank layer takes two arrays, one after the other.

    Args:
        model: dense or merged, on the CPU; it is left untouched.
        device: see `Device`; or one of `PRESETS`.
        mapping: see `Mapping`; its defaults when omitted.
        seed: of the draw.

    Raises:
        LayerError: for a factorized model, for products that are not mapped (`NOT_MAPPED`, groups), or where there are none.

    Examples:
        >>> model = nn.Linear(4, 3)
        >>> x, ideal = torch.randn(2, 4), on_crossbars(model, Device(), Mapping(bits=8))
        >>> bool((ideal(x) - F.linear(x, Mapping(bits=8).quantized(model.weight), model.bias)).abs().max() < 1e-6)
        True
    """
    check("on_crossbars", model=model)
    model, mapping, generator = unwrapped(model), mapping or Mapping(), torch.Generator().manual_seed(seed)
    check_mapped(model)
    mapped: dict[int, nn.Module] = {}

    def exchanged(module: nn.Module) -> nn.Module:
        if is_mapped(module):
            if id(module) not in mapped:
                mapped[id(module)] = OnCrossbars(module, device, mapping, generator).train(module.training)
            return mapped[id(module)]
        for name, child in list(module.named_children()):
            setattr(module, name, exchanged(child))
        return module

    return exchanged(copy.deepcopy(model))
