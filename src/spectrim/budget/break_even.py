"""`break_even`: the share of weights up to which a pruned layer pays, by its bytes and by the clock."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.checks import check, unwrapped
from spectrim.checks.words import worded
from spectrim.errors import SettingError
from spectrim.layers import named_layers
from spectrim.metrics.calls import watched
from spectrim.metrics.clock import compare_latency

__all__ = ["BreakEven", "break_even", "paying"]

DENSITIES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Shares of entries that are not zero at which the sparse product is timed."""


@dataclass(frozen=True)
class BreakEven:
    """Where a pruned layer begins to pay.

    Attributes:
        bytes: largest share of kept entries at which their values and positions take fewer bits than all values.
        clock: largest share at which the sparse product took no longer than the dense layer; 0 where it always did, or where there is none.
        dense_s: seconds of the dense layer on the inputs it was given.
        sparse_s: seconds of the sparse product by the share of kept entries; empty where there is none.
    """

    bytes: float
    clock: float
    dense_s: float
    sparse_s: Mapping[float, float]


class _Product(nn.Module):
    """A layer as a product with a random matrix in compressed rows; a convolution on its unfolded input."""

    def __init__(self, layer: Any, density: float) -> None:
        super().__init__()
        self.layer = layer
        weight = layer.weight.detach().flatten(1).float()
        kept = torch.zeros(weight.numel(), dtype=torch.bool)
        generator = torch.Generator().manual_seed(0)
        kept[torch.randperm(len(kept), generator=generator)[: max(1, round(density * len(kept)))]] = True
        with warnings.catch_warnings(action="ignore"):  # torch calls compressed rows a beta
            self.matrix = torch.where(kept.reshape(weight.shape), weight.cpu(), 0.0).to_sparse_csr()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return (self.matrix @ x.flatten(0, -2).T).T
        layer = self.layer
        columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return self.matrix @ columns.transpose(0, 1).flatten(1)


@torch.no_grad()
def break_even(model: nn.Module, inputs: Any, *, bits: int = 32, min_time: float = 0.02) -> dict[str, BreakEven]:
    """Measure, for each linear layer and convolution, how many of its weights may be kept if pruning is to pay.

    Pruning without structure saves bytes only where values and positions together take fewer bits than all values, and time only where a
    sparse product is faster than the dense layer: on most processors at a few percent of the weights. `paying` takes the counts of those
    layers alone, so that the others stay dense. The sparse product is torch's, with weights in compressed rows; convolutions are unfolded.

    Args:
        model: dense or merged, on the CPU. It is left untouched.
        inputs: one batch, as the model is called; its size decides the clock's answer, so give the one that is used later.
        bits: of a kept value, in [1, 32].
        min_time: seconds for which each product is timed, in each of three rounds.

    Returns:
        By the name of the layer. Layers that are not called are left out; those without a sparse product here (groups, one or three
        dimensions, padding by name, other dtypes than float32, a ``forward`` of their own) have a clock of 0.

    Raises:
        SettingError: for bits outside their range, or a factorized network.

    Examples:
        >>> found = break_even(nn.Sequential(nn.Linear(512, 512)), torch.randn(1, 512), bits=2, min_time=0.001)
        >>> round(found["0"].bytes, 2), sorted(found["0"].sparse_s) == list(DENSITIES)
        (0.5, True)

    Source: Ren et al., arXiv 1812.11677, section 5 (layers below the break-even ratio are not pruned).
    Deviation: their ratio is of a circuit; here it is of torch on this machine.
    """
    check("break_even", model=model, inputs=inputs)
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 32:
        raise SettingError("break_even", "bits", got=bits, rule="an integer in [1, 32]")
    model = unwrapped(model)
    if next(named_layers(model), None) is not None:
        raise SettingError("break_even", "model", got="a factorized network", rule="of ordinary layers", hint="call merge(model) first")
    kinds = nn.Linear | nn.modules.conv._ConvNd  # of a merged pair the two layers, not what holds them
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds) and "weight" in layer._parameters}
    given: dict[str, Tensor] = {}
    names: dict[nn.Module, str] = {module: name for name, module in layers.items()}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.setdefault(names[module], (*args, *kwargs.values())[0])

    watched(model, inputs, layers.values(), note)
    return {name: _measured(layers[name], x, bits, min_time) for name, x in given.items()}


def _measured(layer: Any, x: Tensor, bits: int, min_time: float) -> BreakEven:
    forward = type(layer).forward
    plain = forward is nn.Conv2d.forward and layer.groups == 1 and not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
    densities = DENSITIES if (forward is nn.Linear.forward or plain) and layer.weight.dtype == torch.float32 else ()
    runs = {"dense": layer} | {str(density): _Product(layer, density) for density in densities}
    seconds = {name: found.median_s for name, found in compare_latency(runs, x, repeats=3, min_time=min_time, batch_size=1).items()}
    dense, sparse = seconds.pop("dense"), {float(name): value for name, value in seconds.items()}
    return BreakEven(_by_bytes(bits), _crossing(dense, sparse), dense, sparse)


def _by_bytes(bits: int) -> float:
    """Return the share ``d`` at which ``d * bits`` and the entropy of the positions take as much as ``bits``."""
    shares = np.linspace(0.0005, 0.9995, 2000)
    spent = shares * bits - shares * np.log2(shares) - (1 - shares) * np.log2(1 - shares)
    return float(shares[spent < bits].max(initial=0.0))


def _crossing(dense: float, sparse: Mapping[float, float]) -> float:
    """Return the largest share at which the sparse product takes no longer, between two that were timed on a logarithmic scale."""
    shares = sorted(sparse)
    seconds = np.minimum.accumulate([sparse[share] for share in reversed(shares)])[
        ::-1
    ]  # more entries take no less time: the rest is noise
    if not shares or seconds[0] > dense:
        return 0.0
    return float(np.exp(np.interp(math.log(dense), np.log(seconds), np.log(shares)))) if seconds[-1] > dense else shares[-1]


@worded
def paying(
    keep: Mapping[str, int | float], found: Mapping[str, BreakEven], model: nn.Module, by: Literal["bytes", "clock"] = "clock"
) -> dict[str, int | float]:
    """Return the entries of `keep` whose layers pay when so much is kept; the others stay dense.

    Args:
        keep: counts, or fractions as floats, by the name of the layer, as for `constrain` or `spectrim.projections.TopK`.
        found: by `break_even`.
        model: whose layers these are.
        by: what has to pay.

    Examples:
        >>> found = {"0": BreakEven(0.9, 0.05, 1.0, {}), "1": BreakEven(0.9, 0.0, 1.0, {})}
        >>> paying({"0": 4, "1": 0.02}, found, nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10)))
        {'0': 4}
    """
    shares: dict[str, float] = {}
    for name, value in keep.items():
        weight: Any = model.get_submodule(name).weight
        shares[name] = value if isinstance(value, float) else value / weight.numel()
    return {name: value for name, value in keep.items() if name in found and shares[name] <= getattr(found[name], by)}
