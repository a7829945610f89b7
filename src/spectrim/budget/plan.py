"""`plan`: what each budget would give, before any training."""

import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spectrim.budget.allocate import allocate
from spectrim.budget.budget import Budget, as_budget
from spectrim.budget.costs import RankCosts, rank_costs, spectra
from spectrim.budget.distortion.energy import SpectralEnergy, WhitenedEnergy
from spectrim.budget.distortion.loss import LossSensitivity
from spectrim.budget.distortion.normalized import NormalizedEnergy
from spectrim.budget.plan_table import BudgetPlan, Plan, SkippedLayer, Totals, WeightPlan
from spectrim.budget.prices import _Cost, _costs
from spectrim.checks import check, naming, unwrapped
from spectrim.errors import SettingError
from spectrim.layers import named_factors
from spectrim.metrics.evaluate import evaluate
from spectrim.metrics.inputs import batch_size_of, call_model, evaluating, first_examples, inputs_of
from spectrim.metrics.measurement import measure
from spectrim.protocols import Latencies, Where
from spectrim.surgery.calibrate import Calibration, calibrate
from spectrim.surgery.coverage import LayerCoverage, coverage
from spectrim.surgery.factorize import Scheme, factorize
from spectrim.surgery.merge import merge
from spectrim.surgery.prune import prune
from spectrim.surgery.select import layer_filter

BUDGETS = (0.8, 0.65, 0.5, 0.4, 0.33, 0.25, 0.2)
"""Fractions of the dense network that a plan tries."""


DIGITS = 7
"""Significant digits of the spectra and harms that a plan holds."""


@naming
def plan(
    model: nn.Module,
    inputs: Any,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    budgets: Sequence[float | Budget] = BUDGETS,
    scheme: Scheme = "auto",
    where: Where | None = None,
    latency: Latencies | None = None,
    eval_data: Iterable[Any] | None = None,
    examples: int = 512,
    progress: bool = False,
) -> Plan:
    """Say what each budget would give, without training: spectra, harms, costs, and the network right after each cut.

    For each budget the ranks of `allocate`, counts of the network that `merge` writes, and the relative error of its output,
    ``||f_r(x) - f(x)|| / ||f(x)||``. Training and BatchNorm recalibration afterwards make a network better than the table says.

    Args:
        model: dense, or factorized at any rank; it is left untouched.
        inputs: one batch of inputs; costs are for one example of it.
        data: batches ``(inputs, target)`` for calibration, or bare inputs when `loss` is omitted. With it ranks and cuts go by the
            change of the layers' outputs, with `loss` too by the loss; without it by the weights alone.
        loss: called as ``loss(output, target)``, gives the mean over targets.
        budgets: fractions of the multiply-accumulates kept, in (0, 1], or `Budget` values.
        scheme: as for `factorize`; of no effect on a factorized model.
        where: as for `factorize`, and for the reasons of what is skipped.
        latency: a `LatencyTable` of the factorized model; adds predicted seconds, and decides what is split.
        eval_data: batches that judge the cut networks; `data` when omitted, and `inputs` without that.
        examples: how many of `data` and of `eval_data` are used at most, >= 1.
        progress: whether to show progress, on stderr.

    Returns:
        The plan; plain data.

    Raises:
        SettingError: for `loss` without `data`, for a fraction outside (0, 1], or for `examples` below 1. A budget that no ranks meet is
            no error: its row says the smallest that can be met.
        LayerError: when nothing can be factorized, or when `latency` is of another model.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> found = plan(model, torch.randn(8, 16), budgets=[0.5])
        >>> found.budgets[0].totals.macs <= 0.5 * found.dense.macs
        True
        >>> Plan.from_dict(found.to_dict()) == found
        True
    """
    check(
        "plan", optional=("batches_again", "loss"), model=model, inputs=inputs, batches_again=data, loss=loss, budgets=budgets, where=where
    )
    check("plan", latency=latency, eval_batches=eval_data, examples=examples)
    model = unwrapped(model)
    where = layer_filter(where, model, "plan")
    if loss is not None and data is None:
        raise SettingError("plan", "loss", got=loss, rule="given together with data", hint="plan(model, inputs, data, loss)")
    wanted = [as_budget(budget, "plan") for budget in budgets]
    held = model if next(named_factors(model), None) else factorize(model, scheme, where, example_inputs=inputs, progress=progress)
    judge = _Judge.of(held, inputs, data if eval_data is None else eval_data, loss, examples)
    calibration = None if data is None else calibrate(held, data, loss, examples=examples, progress=progress)
    ways = _ways(held, inputs, calibration)
    try_ = partial(_row, held, inputs=inputs, latency=latency, judge=judge)
    name, known = _best(ways, try_, wanted)
    shown = track(wanted, "budgets", console=Console(stderr=True), transient=True, disable=not progress)
    rows = [known[budget] if budget in known else try_(budget, ways[name]) for budget in shown]
    costs = _costs(held, {"macs", "params", "size"} | ({"latency"} if latency else set()), inputs, latency)
    lines = coverage(held, where, inputs=inputs, latency=latency)
    weights = _weights(held, rank_costs(held, inputs, latency), lines, {name: way.harms for name, way in ways.items()}, latency)
    dense, fixed = _totals(costs, judge.judged(held))
    rows = [_predicted(row, weights, fixed) for row in rows]
    skipped = tuple(SkippedLayer(line.name, line.kind, line.reason) for line in lines if not line.factorized)
    settings = _settings(model, inputs, latency, examples=None if data is None else examples)
    return Plan(weights, skipped, name, dense, fixed, tuple(rows), settings)


@dataclass(frozen=True)
class _Way:
    """Harms that have been computed already, which make this an importance, and the calibration that the cut belonging to them needs."""

    harms: Mapping[str, Tensor]
    calibration: Calibration | None = None

    def __call__(self, model: nn.Module) -> Mapping[str, Tensor]:
        return self.harms


@dataclass(frozen=True)
class _Judge:
    """The examples that judge a cut network, and what the network said before."""

    batches: Sequence[Any]
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    loss: Callable[[Any, Any], Tensor] | None

    @classmethod
    def of(cls, model: nn.Module, inputs: Any, data: Iterable[Any] | None, loss: Any, examples: int) -> "_Judge":
        batches = [] if data is None else first_examples(data, examples)
        given = [inputs_of(batch) for batch in batches] or [inputs]
        with evaluating(model):
            return cls(batches, given, [call_model(model, x) for x in given], loss)

    def judged(self, model: nn.Module) -> dict[str, float]:
        """Return the error of the output, and loss and accuracy where there is a loss."""
        wrong = whole = 0.0
        with evaluating(model):
            for x, before in zip(self.inputs, self.outputs, strict=True):
                for new, old in zip(_numbers(call_model(model, x)), _numbers(before), strict=True):
                    wrong += float((new - old).square().sum())
                    whole += float(old.square().sum())
        error = math.sqrt(wrong / whole) if whole else math.inf * wrong if wrong else 0.0
        return {"output_error": error} | (evaluate(model, self.batches, self.loss) if self.loss and self.batches else {})


def _numbers(output: Any) -> list[Tensor]:
    """Return the real tensors in whatever a model returns, in float64."""
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf.detach().double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _ways(model: nn.Module, inputs: Any, calibration: Calibration | None) -> dict[str, _Way]:
    """Return the harms by every importance that the data at hand allow."""
    ways = {"SpectralEnergy": _Way(SpectralEnergy()(model)), "NormalizedEnergy": _Way(NormalizedEnergy(inputs)(model))}
    if calibration is not None:
        ways["WhitenedEnergy"] = _Way(WhitenedEnergy(calibration)(model), replace(calibration, outputs={}, slopes={}))
        if calibration.outputs:
            ways["LossSensitivity"] = _Way(LossSensitivity(calibration)(model), calibration)
    return ways


def _best(
    ways: Mapping[str, _Way], try_: Callable[[Budget, _Way], BudgetPlan], budgets: Sequence[Budget]
) -> tuple[str, dict[Budget, BudgetPlan]]:
    """Return the name of the way that cuts best at the middle one of the budgets that can be met, and that row.

    Best is the lowest loss where there is one, else the lowest error of the output.
    """
    for budget in [budgets[len(budgets) // 2], *budgets] if budgets else []:
        rows = {name: try_(budget, way) for name, way in ways.items()}
        scores = {name: row.totals.output_error if row.totals.loss is None else row.totals.loss for name, row in rows.items() if row.totals}
        if scores:
            best = min(scores, key=lambda name: math.inf if scores[name] is None else float(scores[name] or 0.0))
            return best, {budget: rows[best]}
    return next(iter(ways)), {}


def _row(model: nn.Module, budget: Budget, way: _Way, *, inputs: Any, latency: Latencies | None, judge: _Judge) -> BudgetPlan:
    """Cut to one budget and look at the network."""
    try:
        ranks = allocate(model, budget, inputs, importance=way, latency=latency)
    except SettingError as error:
        return BudgetPlan(budget.limits, problem=str(error))
    merged = merge(prune(model, ranks, calibration=way.calibration), latency=latency)
    found = measure(merged, inputs, latency=False, batch_size=batch_size_of(inputs, model=model, unknown=1))
    assert found.macs is not None
    return BudgetPlan(budget.limits, ranks, Totals(found.macs, found.params, found.size_bytes, **judge.judged(merged)))


def _predicted(row: BudgetPlan, weights: Sequence[WeightPlan], fixed: Totals) -> BudgetPlan:
    """Add the seconds that the latency table predicts."""
    if row.totals is None or fixed.latency_s is None:
        return row
    seconds = fixed.latency_s + sum(weight.seconds[row.ranks[weight.name] - 1] for weight in weights if weight.seconds is not None)
    return replace(row, totals=replace(row.totals, latency_s=seconds))


def _weights(
    model: nn.Module,
    costs: Mapping[str, RankCosts],
    lines: Iterable[LayerCoverage],
    harms: Mapping[str, Mapping[str, Tensor]],
    latency: Latencies | None,
) -> tuple[WeightPlan, ...]:
    values, by_name, found = spectra(model), {line.name: line for line in lines}, []
    for name, factors in named_factors(model):
        line, cost = by_name[name], costs[name]
        found.append(
            WeightPlan(
                name,
                line.kind,
                str(line.scheme),
                factors.shape,
                factors.blocks,
                _rounded(values[name]),
                {method: _rounded(table[name]) for method, table in harms.items()},
                cost.macs,
                cost.params,
                cost.seconds,
                cost.dense_macs,
                cost.dense_params,
                cost.dense_seconds,
                int(line.break_even or 0),
                factors.dtype.itemsize,
                latency.multiple(name) if latency else 1,
            )
        )
    return tuple(found)


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.{DIGITS}g}") for value in values.tolist())


def _totals(costs: Mapping[str, _Cost], judged: Mapping[str, float]) -> tuple[Totals, Totals]:
    """Return the totals of the dense network, and of the part of it that no rank changes."""
    seconds = costs.get("latency")
    dense, fixed = (
        Totals(
            round(getattr(costs["macs"], part)),
            round(getattr(costs["params"], part)),
            round(getattr(costs["size"], part)),
            None if seconds is None else getattr(seconds, part),
        )
        for part in ("whole", "fixed")
    )
    return replace(dense, loss=judged.get("loss"), accuracy=judged.get("accuracy")), fixed


def _settings(model: nn.Module, inputs: Any, latency: Latencies | None, *, examples: int | None) -> dict[str, Any]:
    names = ("spectrim", "torch")
    table = {name: getattr(latency, name) for name in ("backend", "threads", "machine") if hasattr(latency, name)}
    return {
        "model": type(model).__name__,
        "batch": batch_size_of(inputs, model=model, unknown=1),
        "examples": examples,
        "latency": json.loads(json.dumps(table, default=dict)) if latency else None,
        "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
    }
