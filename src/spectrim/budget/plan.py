"""`plan`: the result of each budget, predicted without training."""

import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from spectrim.budget.budget import Budget, as_budget
from spectrim.budget.costs import calls
from spectrim.budget.cut_to import Workbench
from spectrim.budget.judge import Judge
from spectrim.budget.ladder import Ladder, ladder
from spectrim.budget.plan_rows import BudgetPlan, SkippedLayer, Totals, WeightPlan
from spectrim.budget.plan_table import Plan
from spectrim.budget.priced import priced
from spectrim.budget.promise import cut_totals, recounted, whole_and_fixed
from spectrim.budget.schemes import AMONG, at_budget
from spectrim.budget.ways import WAYS, Way
from spectrim.checks import check, naming, outside_inference_mode, unwrapped
from spectrim.checks.heap import heap_set_aside
from spectrim.checks.words import worded
from spectrim.errors import SettingError
from spectrim.forms.form import rung_of
from spectrim.layers import named_factors
from spectrim.layers.exchanged import Writing
from spectrim.metrics.inputs import batch_size_of
from spectrim.protocols import Latencies, Where
from spectrim.runtimes.crossbar import Crossbars
from spectrim.surgery.calibrate import calibrate
from spectrim.surgery.coverage import LayerCoverage, coverage
from spectrim.surgery.exchange import duplicate
from spectrim.surgery.factorize import Scheme, factorize
from spectrim.surgery.moments import Calibration
from spectrim.surgery.readers import leaving_readers, with_reasons
from spectrim.surgery.select import layer_filter

BUDGETS = (0.8, 0.65, 0.5, 0.4, 0.33, 0.25, 0.2)
"""Fractions of the dense network that a plan tries."""


TRIED = ("plain", "normalized", "whitened", "sensitive")
"""The ways that a plan compares at the middle budget."""


DIGITS = 7
"""Significant digits of the spectra and distortions that a plan holds."""


@outside_inference_mode
@naming
@heap_set_aside()
@worded
def plan(
    model: nn.Module,
    inputs: Any,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    budgets: Sequence[float | Budget | Mapping[str, float]] = BUDGETS,
    scheme: Scheme = "auto",
    writing: Writing = "pair",
    where: Where | None = None,
    latency: Latencies | None = None,
    crossbars: Crossbars | None = None,
    eval_data: Iterable[Any] | None = None,
    examples: int = 512,
    calibration: Calibration | None = None,
    progress: bool = False,
) -> Plan:
    """Predict the result of each budget, without training: spectra, distortions, costs, and the network right after each cut.

    For each budget the ranks of `allocate`, the costs of the network that `merge` writes (by formulas that are checked by counting, see
    `ladder`; where they are wrong, each network is counted), and the relative error of its output,
    ``||f_r(x) - f(x)|| / ||f(x)||``. Training and BatchNorm recalibration afterwards make a network better than the table says.

    Args:
        model: dense, or factorized at any rank; it is left untouched.
        inputs: one batch of inputs; costs are for one example of it.
        data: batches ``(inputs, target)`` for calibration, or bare inputs when `loss` is omitted. With it ranks and cuts go by the
            change of the layers' outputs, with `loss` too by the loss; without it by the weights alone.
        loss: called as ``loss(output, target)``, gives the mean over targets.
        budgets: fractions of the multiply-accumulates kept, in (0, 1], `Budget` values, or dicts of their fields.
        scheme: as for `factorize`; ``auto`` and ``all`` choose at the middle budget, as in `compress`; of no effect on a factorized model.
        writing: as for `factorize`; of no effect on a factorized model.
        where: as for `factorize`, and for the reasons of what is skipped.
        latency: a `LatencyTable` of the factorized model; adds predicted seconds, and decides what is split.
        crossbars: `spectrim.runtimes.crossbar.Crossbars`; adds tiles and their reads, and allows budgets of them.
        eval_data: batches on which the cut networks are evaluated; `data` when omitted, and `inputs` without that.
        examples: how many of `data` and of `eval_data` are used at most, >= 1.
        calibration: of the factorized model, made by `calibrate`; replaces a new one from `data`.
        progress: whether to show progress, on stderr.

    Returns:
        The plan; plain data.

    Raises:
        SettingError: for `loss` without `data`, for a fraction outside (0, 1], or for `examples` below 1. A budget that no ranks meet is
            no error: its row says the smallest that can be met.
        LayerError: when nothing can be factorized, when `latency` is of another model, or when the factorized network, or one with pairs of
            layers, does not compute what the dense one does (see `same_function`).

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
    check("plan", latency=latency, crossbars=crossbars, eval_batches=eval_data, examples=examples)
    model = unwrapped(model)
    where = layer_filter(where, model, "plan")
    if loss is not None and data is None:
        raise SettingError("plan", "loss", got=loss, rule="given together with data", hint="plan(model, inputs, data, loss)")
    wanted = [as_budget(budget, "plan") for budget in budgets]
    dense = None if next(named_factors(model), None) else model
    held = duplicate(model) if dense is None else factorize(model, scheme, where, example_inputs=inputs, writing=writing, progress=progress)
    if dense is None:
        used, left = calls(held, inputs), dict[str, str]()
        prices = ladder(held, inputs, latency, crossbars=crossbars, check=True, own=True, used=used)
    else:
        build, price = partial(factorize, model, scheme, example_inputs=inputs, writing=writing), partial(priced, model, inputs, latency)
        held, (used, prices), left = leaving_readers(held, build, partial(price, crossbars, inputs))
    _check_inputs(prices, latency)
    if dense is not None and scheme in AMONG and latency is None and calibration is None and wanted:
        held, prices = at_budget(held, wanted[len(wanted) // 2], inputs, prices, dense, used, among=AMONG[scheme])
    held.eval()
    judge = Judge.of(held, inputs, data if eval_data is None else eval_data, loss, examples)
    if calibration is None and data is not None:
        calibration = calibrate(held, data, loss, examples=examples, progress=progress)
    bench = Workbench(held, inputs, calibration, latency=latency, prices=prices)
    ways = _ways(bench, calibration)
    try_ = partial(_row, bench, judge=judge, seen={})
    name, known = _best(ways, try_, wanted)
    shown = track(wanted, "budgets", console=Console(stderr=True), transient=True, disable=not progress)
    rows = [known[budget] if budget in known else try_(budget, ways[name]) for budget in shown]
    bench.restore()
    lines = with_reasons(coverage(held, where, inputs=inputs, latency=latency), left)
    distortions = {way: bench.distortions(ways[way]) for way in ways}
    weights = _weights(bench, lines, distortions)
    whole, fixed = whole_and_fixed(prices.units)
    whole = replace(whole, loss=judge.scores.get("loss"), accuracy=judge.scores.get("accuracy"))
    rows = [_predicted(row, weights, fixed) for row in rows]
    skipped = tuple(SkippedLayer(line.name, line.kind, line.reason) for line in lines if not line.factorized)
    settings = _settings(model, inputs, latency, examples=None if data is None else examples)
    settings |= {} if crossbars is None else {"crossbars": repr(crossbars)}
    return Plan(weights, skipped, name, whole, fixed, tuple(rows), settings)


def _check_inputs(prices: Ladder, latency: Latencies | None) -> None:
    """Raise when a latency table was made with another batch; a table without the seconds of the whole network predicts none."""
    if latency is not None and "latency" in prices.missing and "another batch" in str(prices.missing["latency"]):
        raise prices.missing["latency"]


def _ways(bench: Workbench, calibration: Calibration | None) -> dict[str, Way]:
    """Return the ways that the data at hand allow, by the name of their importance; a loss without gradients allows no sensitivities."""
    found = {}
    for name in TRIED:
        way = WAYS[name]
        if way.able(calibration):
            try:
                bench.distortions(way)
            except SettingError:
                if way.needs != "loss":
                    raise
            else:
                found[way.importance] = way
    return found


def _best(
    ways: Mapping[str, Way], try_: Callable[[Budget, Way], BudgetPlan], budgets: Sequence[Budget]
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


def _row(bench: Workbench, budget: Budget, way: Way, *, judge: Judge, seen: dict[Any, dict[str, float]]) -> BudgetPlan:
    """Cut to one budget and evaluate the network, unless the same cut was seen before."""
    try:
        ranks = bench.ranks(budget, way)
    except SettingError as error:
        return BudgetPlan(budget.limits, problem=str(error))
    totals, cut = cut_totals(bench.decomposed.factors, ranks, bench.prices), (way.metric, tuple(ranks.values()))
    if cut not in seen or bench.prices.corrected:
        bench.cut(ranks, way)
        if bench.prices.corrected:  # where formulas were wrong once, every network is counted
            totals = recounted("plan", budget, bench.network, bench.inputs, bench.prices)
        seen[cut] = judge.judged(bench.network)
    return BudgetPlan(budget.limits, ranks, _judged(totals, seen[cut]))


def _judged(totals: Totals, scores: Mapping[str, float]) -> Totals:
    return replace(totals, output_error=scores["output_error"], loss=scores.get("loss"), accuracy=scores.get("accuracy"))


def _predicted(row: BudgetPlan, weights: Sequence[WeightPlan], fixed: Totals) -> BudgetPlan:
    """Add the seconds that the latency table predicts."""
    if row.totals is None or fixed.latency_s is None:
        return row
    seconds = fixed.latency_s + sum(weight.seconds[rung_of(row.ranks[weight.name]) - 1] for weight in weights if weight.seconds)
    return replace(row, totals=replace(row.totals, latency_s=seconds))


def _weights(bench: Workbench, lines: Iterable[LayerCoverage], distortions: Mapping[str, Mapping[str, Tensor]]) -> tuple[WeightPlan, ...]:
    by_name, found = {line.name: line for line in lines}, []
    for name, factors in named_factors(bench.network):
        line, cost = by_name[name], bench.prices.weights[name]
        found.append(
            WeightPlan(
                name,
                line.kind,
                str(line.scheme),
                factors.shape,
                factors.blocks,
                _rounded(bench.decomposed.spectrum(name)),
                {method: _rounded(table[name]) for method, table in distortions.items()},
                cost.macs,
                cost.params,
                cost.seconds,
                cost.dense_macs,
                cost.dense_params,
                cost.dense_seconds,
                rung_of(line.break_even or 0),
                factors.dtype.itemsize,
                bench.latency.multiple(name) if bench.latency else 1,
                None if isinstance(factors.full_size, int) else factors.path(),
            )
        )
    return tuple(found)


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.{DIGITS}g}") for value in values.tolist())


def _settings(model: nn.Module, inputs: Any, latency: Latencies | None, *, examples: int | None) -> dict[str, Any]:
    table = {name: getattr(latency, name) for name in ("backend", "threads", "machine") if hasattr(latency, name)}
    return {
        "model": type(model).__name__,
        "batch": batch_size_of(inputs, model=model, unknown=1),
        "examples": examples,
        "latency": json.loads(json.dumps(table, default=dict)) if latency else None,
        "versions": {name: version(name) for name in ("spectrim", "torch")} | {"python": platform.python_version()},
    }
