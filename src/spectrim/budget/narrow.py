"""`narrow`: fewer hidden units, chosen and made up for on calibration inputs."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spectrim.budget.budget import ABSOLUTE, FRACTIONS, Budget, BudgetError, as_budget
from spectrim.budget.knapsack import _knapsack, _Limit
from spectrim.checks import check, outside_inference_mode, unwrapped
from spectrim.errors import LayerError, SettingError
from spectrim.linalg.elimination import Elimination, eliminate, refitted
from spectrim.metrics.batch import BatchDims
from spectrim.metrics.calls import watched
from spectrim.metrics.distance import relative_distance, with_outputs
from spectrim.metrics.inputs import batch_size_of, first_examples, inputs_of, one_example
from spectrim.metrics.macs import count_macs
from spectrim.metrics.measurement import size_bytes_of
from spectrim.metrics.table import Summarized, markdown_table
from spectrim.protocols import Where
from spectrim.surgery.calibrate import calibrate
from spectrim.surgery.factorize import factorize
from spectrim.surgery.hidden_units import HiddenUnits, hidden_units, matrix_of
from spectrim.surgery.moments import Calibration
from spectrim.surgery.narrowed import Kept, narrowed
from spectrim.surgery.same_function import same_function
from spectrim.surgery.select import layer_filter

COUNTED = ("macs", "params", "size", "size_bytes")
"""What a budget of `narrow` can limit: what is known without a clock."""


@dataclass(frozen=True, eq=False)
class Narrowed(Summarized):
    """A network with fewer hidden units.

    Attributes:
        model: ordinary layers of the same classes as before, some of them narrower.
        units: all that were found, those that lost none included.
        widths: how many stay, by the name of the layer that reads them.
        predicted: what the loss rises by to second order, by the same names.
        refused: names of readers whose units could not be left out, and why.
    """

    model: nn.Module
    units: Sequence[HiddenUnits]
    widths: Mapping[str, int]
    predicted: Mapping[str, float]
    refused: Mapping[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Return a table of the layers, and why others were left alone."""
        rows = [
            [units.reader, ", ".join(units.makers), f"{self.widths[units.reader]} of {units.count}", f"{self.predicted[units.reader]:.2g}"]
            for units in self.units
            if units.reader in self.widths
        ]
        table = markdown_table(rows, ["read by", "made by", "units kept", "predicted rise of the loss"])
        return "\n".join([table, *(f"- left alone: what `{name}` reads: {why}" for name, why in self.refused.items())])


@outside_inference_mode
def narrow(
    model: nn.Module,
    data: Iterable[Any],
    budget: Budget | float | Mapping[str, Any],
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    where: Where | None = None,
    examples: int = 1024,
    example_inputs: Any = None,
    batch_dims: BatchDims | None = None,
    progress: bool = False,
) -> Narrowed:
    """Return a network with fewer hidden units within a budget: narrower layers of the same classes, without training.

    Hidden units are what `hidden_units` finds: the features inside a feed-forward block, the channels between two convolutions. Of each
    group they are left out one after another, each time the one without which the outputs of the layer that reads them change least once
    its weight is refitted (`eliminate`), in the second moments of its inputs and of the gradients at its outputs. One knapsack over all
    groups chooses how many stay, so that the predicted rise of the loss is smallest. The reader's weight is the refitted one, and its
    bias takes up the mean.

    It is a way to cut that ranks do not have: a unit costs its rows in all layers that make it and its columns in the one that reads it.
    `compress` takes it before ranks with ``narrow=``.

    Args:
        model: dense; left untouched.
        data: batches ``(inputs, target)``, without a loss also bare inputs.
        budget: what the whole network may keep, see `Budget`: ``macs``, ``params``, ``size`` or ``size_bytes``, or a fraction of the
            multiply-accumulates.
        loss: ``(output, target) -> scalar``; without one it is the distance of the outputs, which needs no labels.
        where: selects layers that read hidden units, see `factorize`.
        examples: of `data` to use, from its beginning.
        example_inputs: one batch for costs; the first example of `data` when omitted.
        batch_dims: states the batch axes, see `compress`.
        progress: whether to show a progress bar of the calibration, on a terminal.

    Raises:
        SettingError: for an argument outside its range, or a budget that no widths meet.
        LayerError: when the network has no hidden units, or its outputs change when they are left out.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> made = narrow(model, [torch.randn(256, 8)], 0.5)
        >>> made.widths, made.model[0]
        ({'2': 32}, Linear(in_features=8, out_features=32, bias=True))

    Source: Kurtic, Frantar and Alistarh, arXiv 2302.04089 (order and refit); Lin et al., arXiv 2408.09632 (one treatment of the layers
    of a feed-forward block).
    Deviation: a metric on the outputs of the reader, all groups by one knapsack on the predicted loss, groups found by themselves.
    """
    check("narrow", model=model, batches=data, example_inputs=example_inputs, where=where, examples=examples)
    model, budget = unwrapped(model), as_budget(budget, "narrow")
    if other := [name for name in budget.limits if name not in COUNTED]:
        raise SettingError("narrow", "budget", got=other[0], rule=f"limits of {', '.join(COUNTED)}")
    chosen = layer_filter(where, model, "narrow")
    known = first_examples(data, examples, dims=batch_dims)
    if loss is None:
        known = with_outputs(model, known)
        loss = relative_distance(known)
    inputs = one_example(known, model, dims=batch_dims, owner="narrow") if example_inputs is None else example_inputs
    units = [found for found in hidden_units(model, inputs) if chosen is None or chosen(found.reader, model.get_submodule(found.reader))]
    if not units:
        hint = "narrow leaves out features that one layer alone reads, behind elementwise operations; compress cuts ranks instead"
        raise LayerError(type(model).__name__, "has no hidden units that can be left out", hint=hint)
    readers = {found.reader for found in units}
    low = factorize(model, "dense", where=lambda name, module: name in readers)
    calibration = calibrate(low, known, loss, examples=None, batch_dims=batch_dims, progress=progress)
    refused = {name: calibration.skipped.get(name, "no gradient reaches it") for name in sorted(readers - set(calibration.outputs))}
    found = {one.reader: _Group.of(one, model, calibration) for one in units if one.reader not in refused}
    costs = _Costs.of(model, inputs, list(found.values()))
    return _proved(model, inputs_of(known[0]), budget, found, costs, units, refused)


def _proved(
    model: nn.Module, batch: Any, budget: Budget, found: dict[str, "_Group"], costs: "_Costs", units: Sequence[HiddenUnits], refused: Any
) -> Narrowed:
    """Choose widths, leave the other units out, and leave groups alone with which the network does not compute what it should."""
    while True:
        try:
            widths = costs.within(budget, found, model)
            kept = {name: group.at(widths[name]) for name, group in found.items() if widths[name] < group.units.count}
            made = _checked(model, kept, batch)
        except BudgetError:
            raise
        except Exception as error:  # of the network's own code, or outputs that differ
            one_less = {name: group.at(group.found.widths[1]) for name, group in found.items()}
            wrong = {name: why for name, one in one_less.items() if (why := _fails(model, {name: one}, batch))}
            if not wrong:
                raise LayerError(type(model).__name__, f"does not compute the same without hidden units: {error}") from error
            refused |= wrong
            found = {name: group for name, group in found.items() if name not in wrong}
            continue
        predicted = {name: group.lost(widths[name]) for name, group in found.items()}
        return Narrowed(made, units, widths, predicted, refused)


def _checked(model: nn.Module, kept: Mapping[str, Kept], batch: Any) -> nn.Module:
    made = narrowed(model, kept)
    same_function(narrowed(model, kept, by_zeros=True), made, batch, names=("network whose readers take nothing from them", "narrower"))
    return made


def _fails(model: nn.Module, kept: Mapping[str, Kept], batch: Any) -> str:
    """Return why a network without these units alone is not what it should be; empty where it is."""
    try:
        _checked(model, kept, batch)
    except Exception as error:  # whatever the network's own code raises when a layer is narrower than it thinks
        return f"the network needs them all ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return ""


@dataclass(frozen=True, eq=False)
class _Group:
    """Hidden units with their order, and what their reader is to be refitted to."""

    units: HiddenUnits
    found: Elimination
    weight: Tensor
    moment: Tensor
    mean: Tensor | None

    @classmethod
    def of(cls, units: HiddenUnits, model: nn.Module, calibration: Calibration) -> "_Group":
        weight = matrix_of(model.get_submodule(units.reader)).flatten(1)
        moment, metric = calibration.inputs[units.reader], calibration.outputs[units.reader]
        found = eliminate(weight, moment, metric, taps=weight.shape[1] // units.count)
        return cls(units, found, weight, moment, calibration.means.get(units.reader))

    def lost(self, width: int) -> float:
        """Return the predicted rise of the loss."""
        return self.found.errors[self.found.widths.index(width)] / 2

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
class _Costs:
    """What a hidden unit of each group costs, and the whole network, by unit of cost."""

    each: dict[str, dict[str, float]]
    whole: dict[str, float]
    inputs: Any

    @classmethod
    def of(cls, model: nn.Module, inputs: Any, groups: Sequence[_Group]) -> "_Costs":
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

    def within(self, budget: Budget, groups: Mapping[str, _Group], model: nn.Module) -> dict[str, int]:
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

    def _chosen(self, budget: Budget, groups: Mapping[str, _Group], limits: Mapping[str, float]) -> dict[str, int]:
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
        losses = [torch.tensor(group.found.errors, dtype=torch.float64) / 2 for group in groups.values()]
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
