"""How many hidden units of each group stay: what they cost, what leaving them out loses, and the best choice within limits."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spectrim.budget.budget import ABSOLUTE, FRACTIONS, Budget, BudgetError
from spectrim.budget.knapsack import _knapsack, _Limit
from spectrim.linalg.elimination import Elimination, eliminate, refitted
from spectrim.metrics.calls import watched
from spectrim.metrics.inputs import batch_size_of
from spectrim.metrics.macs import count_macs
from spectrim.metrics.measurement import size_bytes_of
from spectrim.surgery.features import matrix_of
from spectrim.surgery.hidden_units import HiddenUnits
from spectrim.surgery.moments import Calibration
from spectrim.surgery.narrowed import Kept, narrowed

LEAST = 1e-2
"""Share of a predicted rise of the loss that a measured one counts as at least: also where the loss falls."""


@dataclass(frozen=True, eq=False)
class Group:
    """Hidden units with their order, and what their reader is to be refitted to."""

    units: HiddenUnits
    found: Elimination
    weight: Tensor
    moment: Tensor
    mean: Tensor | None
    losses: tuple[float, ...]

    @classmethod
    def of(cls, units: HiddenUnits, model: nn.Module, calibration: Calibration) -> "Group":
        """Return the units of a network in the order in which its calibration leaves them out."""
        weight = matrix_of(model.get_submodule(units.reader)).flatten(1)
        moment, metric = calibration.inputs[units.reader], calibration.outputs[units.reader]
        found = eliminate(weight, moment, metric, taps=weight.shape[1] // units.count)
        losses = tuple(error / 2 for error in found.errors)
        return cls(units, found, weight, moment, calibration.means.get(units.reader), losses)

    def lost(self, width: int) -> float:
        """Return the rise of the loss that is expected at a width."""
        return self.losses[self.found.widths.index(width)]

    def measured(self, rise: Callable[[Kept], float], points: int) -> "Group":
        """Return the group with rises that follow a few measured ones: what is predicted, times a factor that changes from point to point.

        Args:
            rise: of the loss where these units stay, measured.
            points: how many widths are measured, evenly between all units and none.
        """
        places = sorted({round(len(self.losses) * point / (points + 1)) for point in range(1, points + 1)} - {0, len(self.losses)})
        known = [place for place in places if self.losses[place] > 0]
        if not known:
            return self
        found = [max(rise(self.at(self.found.widths[place])), LEAST * self.losses[place]) for place in known]
        factors = np.log([value / self.losses[place] for value, place in zip(found, known, strict=True)])
        every = np.exp(np.interp(np.arange(len(self.losses)), known, factors))
        losses = np.maximum.accumulate(every * np.asarray(self.losses))
        return replace(self, losses=tuple(losses.tolist()))

    def at(self, width: int) -> Kept:
        """Return what stays at a width, with the refitted weight."""
        places = self.found.kept(width).to(self.weight.device)
        taps = self.weight.shape[1] // self.units.count
        columns = (places[:, None] * taps + torch.arange(taps, device=places.device)).flatten()
        weight = refitted(self.weight, self.moment, columns)
        shift = None
        if self.mean is not None:
            mean = self.mean.double()
            shift = self.weight.double() @ mean - weight @ mean[columns]
        return Kept(self.units, places, weight, shift)


@dataclass(frozen=True)
class Costs:
    """What a hidden unit of each group costs, and the whole network, by unit of cost."""

    each: dict[str, dict[str, float]]
    whole: dict[str, float]
    inputs: Any

    @classmethod
    def of(cls, model: nn.Module, inputs: Any, groups: Sequence[Group]) -> "Costs":
        """Return the costs of a network's hidden units, by one run of it."""
        batch = batch_size_of(inputs, model=model, unknown=1)
        modules = dict(model.named_modules())
        names = {modules[name]: name for group in groups for name in (*group.units.makers, *group.units.through, group.units.reader)}
        sizes: dict[str, int] = {}
        watched(model, inputs, names, after=lambda layer, args, kwargs, output: sizes.update({names[layer]: output.numel()}))
        each = {}
        for group in groups:
            count, cost = group.units.count, {"macs": 0.0, "params": 0.0, "size": 0.0}
            for name in (*group.units.makers, *group.units.through):
                layer: Any = modules[name]
                own = [entry for entry in layer._parameters.values() if entry is not None]
                tensors = own + [entry for entry in layer._buffers.values() if entry is not None and entry.dim()]
                if layer.weight is not None and layer.weight.dim() > 1:
                    cost["macs"] += sizes[name] / count * layer.weight.numel() / count / batch
                cost["params"] += sum(entry.numel() for entry in own) / count
                cost["size"] += sum(entry.nbytes for entry in tensors) / count
            weight = matrix_of(modules[group.units.reader])
            columns = weight.numel() / count
            cost["macs"] += sizes[group.units.reader] / len(weight) * columns / batch
            cost["params"] += columns
            cost["size"] += columns * weight.itemsize
            each[group.units.reader] = cost
        return cls(each, costs_of(model, inputs), inputs)

    def within(self, budget: Budget, groups: Mapping[str, Group], model: nn.Module) -> dict[str, int]:
        """Return widths whose network keeps the limits, with the least predicted loss.

        Costs of groups that share a layer (the reader of one makes the next) do not quite add up: the network is counted, and limits are
        tightened by what is too much.
        """
        limits = {name: value * self.whole[FRACTIONS[name]] if name in FRACTIONS else float(value) for name, value in budget.limits.items()}
        tight = dict(limits)
        while True:
            widths = self._chosen(budget, groups, tight)
            kept = {name: group.at(widths[name]) for name, group in groups.items() if widths[name] < group.units.count}
            counted = costs_of(narrowed(model, kept), self.inputs)
            over = {name: counted[(FRACTIONS | ABSOLUTE)[name]] - limits[name] for name in limits}
            if all(excess <= 1e-9 * max(1.0, limits[name]) for name, excess in over.items()):
                return widths
            tight = {name: most - max(0.0, over[name]) for name, most in tight.items()}

    def _chosen(self, budget: Budget, groups: Mapping[str, Group], limits: Mapping[str, float]) -> dict[str, int]:
        rows = []
        for name, most in limits.items():
            unit = (FRACTIONS | ABSOLUTE)[name]
            left = [[width * self.each[reader][unit] for width in group.found.widths] for reader, group in groups.items()]
            fixed = self.whole[unit] - sum(max(costs) for costs in left)
            least = fixed + sum(min(costs) for costs in left)
            if most < least:
                share = f"at least {math.ceil(least / self.whole[unit] * 1e4) / 1e4:.4f} of the network's {unit}"
                raise BudgetError(f"{name}={budget.limits[name]:g} cannot be met by fewer hidden units: {share}; cut ranks as well")
            rows.append(_Limit(name, np.concatenate(left), most - fixed, self.whole[unit], f"{name}={budget.limits[name]:g}"))
        losses = [torch.tensor(group.losses, dtype=torch.float64) for group in groups.values()]
        typical = float(torch.stack([loss.max() for loss in losses]).mean()) if losses else 1.0
        picked = _knapsack(losses, rows, typical) if losses else []
        return {reader: group.found.widths[place] for (reader, group), place in zip(groups.items(), picked, strict=True)}


def costs_of(model: nn.Module, inputs: Any) -> dict[str, float]:
    """Return multiply-accumulates of one example, parameters and bytes of a network.

    Args:
        model: any network.
        inputs: one batch.
    """
    batch = batch_size_of(inputs, model=model, unknown=1)
    params = {id(parameter): float(parameter.numel()) for parameter in model.parameters()}
    macs, size = float(count_macs(model, inputs, batch_size=batch)), float(size_bytes_of(model))
    return {"macs": macs, "params": sum(params.values()), "size": size}
