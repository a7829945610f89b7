"""Distortion as discarded energy relative to the scale at which normalization layers read it."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.budget.distortion.base import _relative
from spectrim.forms import Factors, Form
from spectrim.forms.derived import scaled_spectrum
from spectrim.layers.uses import Features, Side
from spectrim.layers.watching import features_read, features_written, runs_factors
from spectrim.linalg.spectral import tail_energy
from spectrim.metrics.calls import watched
from spectrim.surgery.decompositions import Decompositions


@dataclass(frozen=True, eq=False)
class NormalizedEnergy:
    """Spectral energy of ``diag(d) W diag(c)``, relative to the whole: the weight in the scale of the normalization around it.

    A BatchNorm undoes a scaling of the outputs before it, so the network's function does not change, but `SpectralEnergy` does. Each output
    feature is therefore weighted by the factor of the normalization after it, and each input feature by the gain of the normalization
    before it:

    - ``d = |gamma| / sqrt(var + eps)`` of a BatchNorm that reads the layer's output (its running variance); of an InstanceNorm, a
      GroupNorm, or a BatchNorm without running statistics, with the variance measured on `inputs`; ``d = |gamma|`` of a LayerNorm or
      RMSNorm, whose one scale for all features cancels in a relative energy.
    - ``c = |gamma|`` of the norm whose output is the layer's input (pre-norm transformers).

    The norms are found by running the model once: such a norm reads the numbers that the layer wrote, in the same memory and not
    written to since (so a permutation between them changes nothing, and an activation, in place or not, separates them). Where a layer runs
    several times, squares are averaged over the norms found. Weights without a norm beside them, gates of recurrent layers and packed
    projections of different inputs have ``d = c = 1``. Norms are torch's own, and any class called ``...RMSNorm`` or ``...LayerNorm``
    with a one-dimensional ``weight``; one whose gain is ``1 + weight`` is taken for one with ``weight``.

    Args:
        inputs: one batch: a tensor, a tuple of arguments or a dict of keyword arguments.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, eps=0.0)).eval()
        >>> _ = model[0].weight.data.copy_(torch.diag(torch.tensor([2.0, 1.0])))
        >>> _ = model[1].running_var.copy_(torch.tensor([4.0, 1.0]))
        >>> [round(distortion, 6) for distortion in NormalizedEnergy(torch.ones(1, 2))(factorize(model))["0"].tolist()]
        [1.0, 0.5, 0.0]

    Source: ours; the factor is that of folding a BatchNorm into the layer before it (Jacob et al., arXiv 1712.05877, section 3.2).
    """

    inputs: Any = field(repr=False)

    def __call__(self, model: nn.Module, /) -> dict[str, Tensor]:
        """Return the distortions, in [0, 1].

        Args:
            model: factorized; it runs once in eval mode.
        """
        return normalized_energy(model, Decompositions(model), self.inputs)


def normalized_energy(model: nn.Module, decomposed: Decompositions, inputs: Any) -> dict[str, Tensor]:
    """Return the distortions of `NormalizedEnergy`; a weight without a norm beside it has its plain energy, from what is at hand.

    Args:
        model: factorized; it runs once in eval mode.
        decomposed: of this model.
        inputs: one batch.
    """
    scales, distortions = _normalizations(model, inputs), {}
    for name, factors in decomposed.factors.items():
        rows, columns = scales.get((factors, "rows"), []), scales.get((factors, "columns"), [])
        distortions[name] = _relative(_scaled(factors, rows, columns) if rows or columns else decomposed.tail(name)).cpu()
    return distortions


def _scaled(factors: Form, rows: list[Tensor], columns: list[Tensor]) -> Tensor:
    """Return the squared error at every rung of a weight in the scales of the norms beside it."""
    out, in_ = factors.shape
    d = _averaged(rows, (*factors.lead, out), factors.device)
    c = _averaged(columns, (*factors.lead, in_), factors.device)
    return tail_energy(scaled_spectrum(factors, d, c)) if isinstance(factors, Factors) else factors.tail(d.square(), c.square())


# What a normalization reads and writes

BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


CHANNEL_NORMS = (*BATCH, *INSTANCE, nn.GroupNorm)


LAYER_NORMS = ("LayerNorm", "RMSNorm")


Memory = tuple[int, ...]


Scales = dict[tuple[Form, Side], list[Tensor]]


def _normalizations(model: nn.Module, inputs: Any) -> Scales:
    """Run the model once; return the scales found for the rows and the columns of each weight."""
    scales: Scales = defaultdict(list)
    written: dict[Memory, Features] = {}
    gains: dict[Memory, Tensor] = {}
    alive: list[Tensor] = []  # so that no two of them are ever in the same memory

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _is_norm(module):
            for read in features_read(module, args, kwargs):
                gain = gains.get(_memory(read.tensor, read.axis))
                if gain is not None:
                    scales[read.factors, read.side].append(gain)
            return
        given: Any = args[0] if args else next(iter(kwargs.values()), None)
        axis = _channel_axis(module)
        found = written.get(_memory(given, axis)) if isinstance(given, Tensor) and given.dim() > 1 else None
        if found is not None:
            scales[found.factors, found.side].append(_scale(module, given, axis))

    def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if _is_norm(module):
            if isinstance(output, Tensor) and output.dim() > 1:
                axis = _channel_axis(module)
                alive.append(output)
                gains[_memory(output, axis)] = _gain(module, output.shape[axis], output.device)
            return
        for made in features_written(module, output):
            alive.append(made.tensor)
            written[_memory(made.tensor, made.axis)] = made

    hooked = [module for module in model.modules() if runs_factors(module) or _is_norm(module)]
    watched(model, inputs, hooked, before, after)
    return scales


def _memory(x: Tensor, axis: int) -> Memory:
    """Return what two tensors share that hold the same numbers, with the features along the same memory, and not written to in between."""
    return (x.untyped_storage()._cdata, int(x.storage_offset()), x.numel(), x._version, x.shape[axis], x.stride(axis))


def _is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes features and multiplies each by one weight, or by none."""
    if isinstance(module, CHANNEL_NORMS):
        return True
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith(LAYER_NORMS) and (weight is None or (isinstance(weight, Tensor) and weight.dim() == 1))


def _channel_axis(norm: nn.Module) -> int:
    """Return the axis of a norm's features."""
    return 1 if isinstance(norm, CHANNEL_NORMS) else -1


def _gain(norm: Any, features: int, device: torch.device) -> Tensor:
    weight = getattr(norm, "weight", None)
    return torch.ones(features, dtype=torch.float64, device=device) if weight is None else weight.detach().double().abs()


def _scale(norm: Any, x: Tensor, axis: int) -> Tensor:
    """Return what a norm multiplies each feature by, up to a factor that is the same for all."""
    gain = _gain(norm, x.shape[axis], x.device)
    if not isinstance(norm, CHANNEL_NORMS):
        return gain
    if isinstance(norm, BATCH) and norm.running_var is not None:
        variance = norm.running_var.double()
    elif isinstance(norm, BATCH):
        variance = x.double().transpose(0, 1).flatten(1).var(-1, correction=0)
    else:
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else x.shape[1]
        variance = x.double().reshape(len(x), groups, -1).var(-1, correction=0).mean(0).repeat_interleave(x.shape[1] // groups)
    return gain / (variance + norm.eps).clamp(min=1e-300).sqrt()


def _averaged(scales: list[Tensor], shape: Sequence[int], device: torch.device) -> Tensor:
    """Return the root of the mean square of the scales found, folded as one side ``(*blocks, size)`` of a weight; ones for none.

    Args:
        scales: each of one entry for every feature.
        shape: of that side; each feature has several neighboring entries there (those of the kernel's axes).
        device: of the weight.
    """
    if not scales:
        return torch.ones(shape, dtype=torch.float64, device=device)
    mean = torch.stack(scales).square().mean(0).sqrt().to(device, torch.float64)
    return mean.repeat_interleave(math.prod(shape) // mean.numel()).reshape(shape)
