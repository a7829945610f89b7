"""`narrow`: fewer hidden units, chosen and made up for on calibration inputs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.budget.budget import Budget, BudgetError, as_budget
from spectrim.budget.distortion.loss import VANISHING
from spectrim.budget.widths import Costs, Group
from spectrim.checks import check, outside_inference_mode, unwrapped
from spectrim.errors import LayerError, SettingError
from spectrim.metrics.batch import BatchDims
from spectrim.metrics.distance import relative_distance, with_outputs
from spectrim.metrics.evaluate import evaluate
from spectrim.metrics.inputs import first_examples, inputs_of, one_example
from spectrim.metrics.table import Summarized, markdown_table
from spectrim.protocols import Where
from spectrim.surgery.calibrate import calibrate
from spectrim.surgery.factorize import factorize
from spectrim.surgery.features import matrix_of
from spectrim.surgery.hidden_units import HiddenUnits, hidden_units
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
        predicted: what the loss is expected to rise by, by the same names.
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
    points: int = 3,
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
        points: widths of each group at which the loss is measured, >= 0; the prediction follows these. 0 measures none, and trusts it.
        example_inputs: one batch for costs; the first example of `data` when omitted.
        batch_dims: states the batch axes, see `compress`.
        progress: whether to show a progress bar of the calibration, on a terminal.

    Raises:
        SettingError: for an argument outside its range, or a budget that no widths meet.
        LayerError: when the network has no hidden units, or its outputs change when they are left out.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> made = narrow(model, [torch.randn(256, 8)], 0.5)
        >>> made.widths, made.model[0]
        ({'2': 32}, Linear(in_features=8, out_features=32, bias=True))

    Source: Kurtic, Frantar and Alistarh, arXiv 2302.04089 (order and refit); Lin et al., arXiv 2408.09632 (one treatment of the layers
    of a feed-forward block).
    Deviation: a metric on the outputs of the reader, all groups by one knapsack on the predicted loss, groups found by themselves.
    """
    check("narrow", model=model, batches=data, example_inputs=example_inputs, where=where, examples=examples)
    if isinstance(points, bool) or not isinstance(points, int) or points < 0:
        raise SettingError("narrow", "points", got=points, rule="an integer of at least 0")
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
    if _vanishes(model, calibration):  # as on targets that are the network's own outputs: curvature from random directions instead
        pairs = with_outputs(model, known)
        calibration = calibrate(low, pairs, relative_distance(pairs), examples=None, batch_dims=batch_dims)
    refused = {name: calibration.skipped.get(name, "no gradient reaches it") for name in sorted(readers - set(calibration.outputs))}
    found = {one.reader: Group.of(one, model, calibration) for one in units if one.reader not in refused}
    if points:
        found = _measured(model, known, loss, found, points, batch_dims)
    costs = Costs.of(model, inputs, list(found.values()))
    return _proved(model, inputs_of(known[0]), budget, found, costs, units, refused)


def _vanishes(model: nn.Module, calibration: Calibration) -> bool:
    """Whether the loss has no slope to speak of at any reader, see `VANISHING`."""
    shares = []
    for name, metric in calibration.outputs.items():
        layer = model.get_submodule(name)
        weight = matrix_of(layer).flatten(1).double()
        outputs = float(((weight @ calibration.inputs[name]) * weight).sum())
        shares.append(float(metric.diagonal().sum()) ** 0.5 / max(outputs, 1e-300) ** 0.5 / torch.finfo(matrix_of(layer).dtype).eps)
    return bool(shares) and max(shares) < VANISHING


def _measured(
    model: nn.Module, known: Sequence[Any], loss: Callable[[Any, Any], Tensor], found: dict[str, Group], points: int, dims: BatchDims | None
) -> dict[str, Group]:
    """Return the groups with rises of the loss that follow measured ones, of one group at a time."""
    dense = evaluate(model, known, loss, batch_dims=dims)["loss"]

    def rise(kept: Kept) -> float:
        made = narrowed(model, {kept.units.reader: kept}, by_zeros=True)
        return evaluate(made, known, loss, batch_dims=dims)["loss"] - dense

    return {name: group.measured(rise, points) for name, group in found.items()}


def _proved(
    model: nn.Module, batch: Any, budget: Budget, found: dict[str, "Group"], costs: "Costs", units: Sequence[HiddenUnits], refused: Any
) -> Narrowed:
    """Choose widths, leave the other units out, and leave groups alone with which the network does not compute what it should."""
    while True:
        try:
            widths = costs.within(budget, found, model)
            kept = {name: group.at(widths[name]) for name, group in found.items() if widths[name] < group.units.count}
            made = _checked(model, kept, batch)
        except BudgetError as error:
            if not refused:
                raise
            shown = "; ".join(f"'{name}': {why}" for name, why in refused.items())
            raise BudgetError(f"{str(error).removeprefix('Budget: ')}. Left alone is what these read: {shown}") from error
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
