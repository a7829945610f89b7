"""Layers that compute on crossbars, and `on_crossbars`, which programs them in a copy of a network."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.checks import check, unwrapped
from spectrim.errors import LayerError
from spectrim.layers import is_factorized
from spectrim.layers.forwards import leads_to_forward_of, runs_forward_of
from spectrim.layers.geometry import convolve, whole
from spectrim.plain.exchanged import class_of
from spectrim.runtimes.crossbar.device import Device
from spectrim.runtimes.crossbar.mapping import Mapping
from spectrim.surgery.exchange import duplicate

MAPPED = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""What is mapped: the matrix of outputs by inputs and taps, its bias stays digital."""

DIGITAL = (nn.Embedding, nn.EmbeddingBag, nn.PReLU)
"""Layers with parameters of two axes or more, or a table, that multiply nothing."""


def base_of(module: nn.Module) -> type[nn.Module] | None:
    """Return the class in `MAPPED` whose forward a layer runs; None for another forward, and for a pair of layers in place of one."""
    base = next((kind for kind in MAPPED if isinstance(module, kind)), None)
    if base is None or next(module.children(), None) is not None or getattr(module, "groups", 1) > 1:
        return None
    return base if runs_forward_of(module, base) or leads_to_forward_of(type(module), base) else None


def mapped_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that are mapped, each once.

    Raises:
        LayerError: where other products with weights would stay digital, so that the network would say too little; or where there are none.
    """
    found: list[nn.Module] = []
    for name, module in model.named_modules():
        if is_factorized(module):
            raise LayerError(name, "is factorized", hint="merge(model) writes the layers that are mapped")
        if base_of(module) is not None:
            found.append(module)
        elif not isinstance(module, DIGITAL) and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
            what = f"is a {type(module).__name__}{' with groups' if getattr(module, 'groups', 1) > 1 else ''}"
            hint = "linear layers and 1-D and 2-D convolutions without groups are, with torch's own forward"
            raise LayerError(name or "(model)", f"{what}, which is not mapped to crossbars", hint=hint)
    if not found:
        raise LayerError(type(model).__name__, "has no linear layer and no convolution to map")
    return found


class Converted:
    """What a layer does behind converters or with read noise; its weight is that of the programmed cells."""

    _device: Device
    _mapping: Mapping
    _noise: torch.Generator

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer: inputs rounded by the converters of the rows, the sums of each tile by those of its columns."""
        layer, weight, x = cast(Any, self), self._read(), rounded(input, self._device.input_bits)
        linear = isinstance(layer, nn.Linear)
        if self._device.output_bits >= 32:
            exact: Tensor = F.linear(x, weight, layer.bias) if linear else convolve(x, weight, layer.bias, whole(layer), layer.groups)
            return exact
        y: Any = sum(rounded(part, self._device.output_bits) for part in self._tiles(x, weight))
        if layer.bias is None:
            return cast(Tensor, y)
        return cast(Tensor, y + (layer.bias if linear else layer.bias.reshape(-1, *[1] * len(layer.kernel_size))))

    def _read(self) -> Tensor:
        weight: Tensor = cast(Any, self).weight
        if not self._device.read_noise:
            return weight
        return weight * (1 + self._device.read_noise * torch.randn(weight.shape, generator=self._noise, dtype=weight.dtype))

    def _tiles(self, x: Tensor, weight: Tensor) -> Any:
        """Yield the sums of each band of rows of the crossbars; tiles beside each other have columns that are rounded alike."""
        layer, flat = cast(Any, self), weight.flatten(1)
        for start in range(0, flat.shape[1], self._mapping.rows):
            band = torch.zeros_like(flat)
            band[:, start : start + self._mapping.rows] = flat[:, start : start + self._mapping.rows]
            if isinstance(layer, nn.Linear):
                yield F.linear(x, band)
            else:
                yield convolve(x, band.reshape(weight.shape), None, whole(layer), layer.groups)


def programmed(weight: Tensor, device: Device, mapping: Mapping, generator: torch.Generator) -> Tensor:
    """Return the weight that the cells hold after programming: one draw. What has no cells is exactly zero, see `Mapping.built`."""
    levels, step = mapping.levels(weight.flatten(1), device)
    held = device.programmed(levels, generator)
    slices = 2.0 ** (device.bits * torch.arange(len(held), dtype=torch.float64))
    difference = (held[:, 0] - held[:, 1]) / device.step
    made = torch.where(mapping.built(weight.flatten(1)), (slices[:, None, None] * difference).sum(0) * step, 0)
    return made.reshape(weight.shape).to(weight.dtype)


def rounded(x: Tensor, bits: int) -> Tensor:
    """Return the nearest of ``2^bits - 1`` levels, zero among them, up to the largest magnitude."""
    if bits >= 32:
        return x
    step = x.detach().abs().amax() / max(2 ** (bits - 1) - 1, 1)
    return x if not step else (x / step).round() * step


def on_crossbars(model: nn.Module, device: Device, mapping: Mapping | None = None, *, seed: int = 0) -> nn.Module:
    """Return a copy in which linear layers and convolutions run on crossbars that were programmed once; everything else stays digital.

    A merged low-rank layer takes two arrays, one after the other. Layers stay the objects that the rest of the copy refers to; a weight
    that is tied to another one is programmed apart.

    Args:
        model: dense or merged, on the CPU; it is left untouched.
        device: see `Device`; or one of `PRESETS`.
        mapping: see `Mapping`; its defaults when omitted.
        seed: of the draw.

    Raises:
        LayerError: for a factorized model, and as `mapped_layers`: where other products would stay digital.

    Examples:
        >>> model = nn.Linear(4, 3)
        >>> x, ideal = torch.randn(2, 4), on_crossbars(model, Device(), Mapping(bits=8))
        >>> bool((ideal(x) - F.linear(x, Mapping(bits=8).quantized(model.weight), model.bias)).abs().max() < 1e-6)
        True
    """
    check("on_crossbars", model=model)
    model, mapping, generator = unwrapped(model), mapping or Mapping(), torch.Generator().manual_seed(seed)
    model = duplicate(model)
    for layer in cast(list[Any], mapped_layers(model)):
        layer.weight = nn.Parameter(programmed(layer.weight.detach(), device, mapping, generator), layer.weight.requires_grad)
        noise = int(torch.randint(2**31, (1,), generator=generator))  # drawn for any device: programming does not depend on reads
        if device.read_noise or min(device.input_bits, device.output_bits) < 32:
            base = base_of(layer)
            layer.__dict__ |= {"_device": device, "_mapping": mapping}
            layer.__dict__["_noise"] = torch.Generator().manual_seed(noise)
            layer.__class__ = class_of(Converted, type(layer), cast(Any, base))
    return model
