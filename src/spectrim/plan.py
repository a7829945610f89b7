"""What each budget would give, before any training: spectra, harms, costs and a table of budgets."""

import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spectrim.allocate import Budget, _Cost, _costs, allocate
from spectrim.calibration import Calibration, calibrate
from spectrim.costs import RankCosts, rank_costs, spectra
from spectrim.errors import FormatError, SettingError
from spectrim.factorize import Scheme, factorize, merge
from spectrim.files import write_text
from spectrim.importance import LossSensitivity, NormalizedEnergy, SpectralEnergy, WhitenedEnergy
from spectrim.layers import named_factors
from spectrim.measure import batch_size_of, call_model, evaluate, evaluating, first_examples, inputs_of, markdown_table, measure
from spectrim.protocols import Latencies, LayerFilter
from spectrim.prune import prune
from spectrim.surgery import LayerCoverage, coverage

BUDGETS = (0.8, 0.65, 0.5, 0.4, 0.33, 0.25, 0.2)
"""Fractions of the dense network that a plan tries."""

DIGITS = 7
"""Significant digits of the spectra and harms that a plan holds."""

FORMAT = 1


@dataclass(frozen=True)
class WeightPlan:
    """One factorized weight.

    Attributes:
        name: as in `named_factors`.
        kind: class of the dense layer.
        scheme: how the kernel is folded.
        shape: ``(out, in)`` of one block.
        blocks: groups of a convolution.
        spectrum: singular values, descending; blocks pooled.
        harms: for each importance, entry ``r`` is the harm of keeping ``r`` values; the last is 0.
        macs: entry ``r - 1`` is the multiply-accumulates for one example at rank ``r``, as `merge` will write it.
        params: the same for stored parameters.
        seconds: the same for a call on the whole batch; None without a latency table.
        dense_macs: of the dense weight.
        dense_params: of the dense weight.
        dense_seconds: of the dense weight.
        break_even: the largest rank at which two operations cost less than one dense operation.
        element_bytes: of one stored number.
        multiple: ranks are multiples of it.
    """

    name: str
    kind: str
    scheme: str
    shape: tuple[int, int]
    blocks: int
    spectrum: tuple[float, ...]
    harms: Mapping[str, tuple[float, ...]]
    macs: tuple[float, ...]
    params: tuple[int, ...]
    seconds: tuple[float, ...] | None
    dense_macs: float
    dense_params: int
    dense_seconds: float | None
    break_even: int
    element_bytes: int
    multiple: int = 1


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that stays dense whatever the budget, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Totals:
    """What a network, or a part of one, costs and achieves; None stands for what was not measured.

    Attributes:
        macs: multiply-accumulates for one example.
        params: stored numbers, tied ones once.
        size_bytes: of the state dict.
        latency_s: seconds of one call on the whole batch, as the latency table predicts.
        output_error: ``||f_r(x) - f(x)|| / ||f(x)||`` over the examples that judge.
        loss: mean over targets.
        accuracy: fraction in [0, 1].
    """

    macs: int
    params: int
    size_bytes: int
    latency_s: float | None = None
    output_error: float | None = None
    loss: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class BudgetPlan:
    """What one budget would give.

    Attributes:
        budget: the limits given, by the fields of `Budget`.
        ranks: for `prune`; empty when the budget cannot be met.
        totals: of the merged network right after the cut; None when the budget cannot be met.
        problem: why not, with the smallest budget that can.
    """

    budget: Mapping[str, float]
    ranks: Mapping[str, int] = field(default_factory=dict)
    totals: Totals | None = None
    problem: str = ""


@dataclass(frozen=True)
class Plan:
    """What `plan` found: plain data. ``print(plan)`` shows the budgets and the layers.

    Attributes:
        weights: every factorized weight.
        skipped: every other layer with parameters.
        importance: name of the harms that the budgets below were met with: of those that the data allow, the one whose cut was best at the
            middle budget. Each weight's `harms` holds the others too.
        dense: totals of the dense network; its loss and accuracy are those of the network that was given.
        fixed: the part of them that no rank changes.
        budgets: one row for each.
        settings: what the numbers depend on: model, batch, examples, versions, latency table.
    """

    weights: tuple[WeightPlan, ...]
    skipped: tuple[SkippedLayer, ...]
    importance: str
    dense: Totals
    fixed: Totals
    budgets: tuple[BudgetPlan, ...]
    settings: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{_budget_table(self)}\n\n{_layer_table(self)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a dict that `json.dumps` takes; `from_dict` is its inverse."""
        return {
            "format": FORMAT,
            **vars(self),
            "weights": [dict(vars(weight)) for weight in self.weights],
            "skipped": [dict(vars(layer)) for layer in self.skipped],
            "dense": dict(vars(self.dense)),
            "fixed": dict(vars(self.fixed)),
            "budgets": [{**vars(row), "totals": row.totals and dict(vars(row.totals))} for row in self.budgets],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """Return the plan that `to_dict` described.

        Raises:
            FormatError: when it is not such a dict.
        """
        try:
            if values["format"] != FORMAT:
                raise FormatError("Plan", f"has format {values['format']!r}", hint=f"this version reads {FORMAT}")
            return cls(
                tuple(_weight_from(entry) for entry in values["weights"]),
                tuple(SkippedLayer(**entry) for entry in values["skipped"]),
                str(values["importance"]),
                Totals(**values["dense"]),
                Totals(**values["fixed"]),
                tuple(_budget_from(entry) for entry in values["budgets"]),
                dict(values["settings"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError("Plan", f"is not what to_dict wrote ({error!r})") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, under a temporary name first.

        Args:
            path: of the file.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read what `save` wrote.

        Args:
            path: of the file.

        Raises:
            FormatError: when it is not a plan.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise FormatError(path, f"is not JSON ({error})", hint="pass what spectrim plan --out wrote") from error
        if not isinstance(values, dict) or "weights" not in values:
            raise FormatError(path, "is not a plan", hint="pass what spectrim plan --out wrote")
        return cls.from_dict(values)


def plan(
    model: nn.Module,
    inputs: Any,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    budgets: Sequence[float | Budget] = BUDGETS,
    scheme: Scheme = "auto",
    where: LayerFilter | None = None,
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
    if loss is not None and data is None:
        raise SettingError("plan", "loss", got=loss, rule="given together with data", hint="plan(model, inputs, data, loss)")
    if examples < 1:
        raise SettingError("plan", "examples", got=examples, rule=">= 1")
    wanted = [budget if isinstance(budget, Budget) else Budget(macs=budget) for budget in budgets]
    held = model if next(named_factors(model), None) else factorize(model, scheme, where, progress=progress)
    judge = _Judge.of(held, inputs, data if eval_data is None else eval_data, loss, examples)
    calibration = None if data is None else calibrate(held, data, loss, examples=examples, progress=progress)
    ways = _ways(held, inputs, calibration)
    try_ = partial(_row, held, inputs=inputs, latency=latency, judge=judge)
    name, known = _best(ways, try_, wanted)
    shown = track(wanted, "budgets", console=Console(stderr=True), transient=True, disable=not progress)
    rows = [known[budget] if budget in known else try_(budget, ways[name]) for budget in shown]
    costs = _costs(held, {"macs", "params", "size"} | ({"latency"} if latency else set()), inputs, latency)
    lines = coverage(held, where, latency=latency)
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
    found = measure(merged, inputs, latency=False)
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
        "batch": batch_size_of(inputs),
        "examples": examples,
        "latency": json.loads(json.dumps(table, default=dict)) if latency else None,
        "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
    }


def _weight_from(entry: Mapping[str, Any]) -> WeightPlan:
    names = ("shape", "spectrum", "macs", "params")
    seconds = None if entry["seconds"] is None else tuple(entry["seconds"])
    harms = {name: tuple(values) for name, values in entry["harms"].items()}
    return WeightPlan(**{**entry, **{name: tuple(entry[name]) for name in names}, "seconds": seconds, "harms": harms})


def _budget_from(entry: Mapping[str, Any]) -> BudgetPlan:
    return BudgetPlan(**{**entry, "totals": None if entry["totals"] is None else Totals(**entry["totals"])})


# Texts


def budget_name(limits: Mapping[str, float]) -> str:
    """Return a budget in words.

    Args:
        limits: by the fields of `Budget`.

    Examples:
        >>> budget_name({"macs": 0.5, "params": 0.25})
        '50 % macs, 25 % params'
    """
    fractions = ("macs", "params", "size", "latency")
    return ", ".join(f"{100 * value:g} % {name}" if name in fractions else f"{name} {value:g}" for name, value in limits.items())


def _budget_table(found: Plan) -> str:
    titles = ("budget", "MACs", "parameters", "bytes", "latency", "output error", "loss", "accuracy", "ranks")
    rows = [_cells("dense", found.dense, found.dense, {})]
    problems = []
    for row in found.budgets:
        name = budget_name(row.budget)
        if row.totals is None:
            problems.append(f"{name}: cannot be met. {row.problem}")
        else:
            rows.append(_cells(name, row.totals, found.dense, row.ranks))
    kept = [index for index in range(len(titles)) if index < 4 or any(row[index] for row in rows)]
    table = markdown_table([[row[index] for index in kept] for row in rows], [titles[index] for index in kept])
    return "\n".join([f"ranks by {found.importance}; right after the cut, before any training", table, *problems])


def _cells(name: str, totals: Totals, dense: Totals, ranks: Mapping[str, int]) -> list[str]:
    def part(value: int, whole: int) -> str:
        return f"{value:,.0f} ({100 * value / whole:.1f} %)" if whole else f"{value:,.0f}"

    return [
        name,
        part(totals.macs, dense.macs),
        part(totals.params, dense.params),
        part(totals.size_bytes, dense.size_bytes),
        "" if totals.latency_s is None else f"{1e3 * totals.latency_s:.3f} ms",
        "" if totals.output_error is None else f"{100 * totals.output_error:.2f} %",
        "" if totals.loss is None else f"{totals.loss:.4f}",
        "" if totals.accuracy is None else f"{100 * totals.accuracy:.2f} %",
        f"{min(ranks.values())} to {max(ranks.values())}" if ranks else "",
    ]


def _layer_table(found: Plan) -> str:
    met = [row for row in found.budgets if row.totals is not None]
    titles = ["layer", "kind", "scheme", "matrix", "held", "break-even", *(f"at {budget_name(row.budget)}" for row in met)]
    rows = []
    for weight in found.weights:
        blocks = f"{weight.blocks} x " if weight.blocks > 1 else ""
        ranks = [row.ranks[weight.name] for row in met]
        cells = ["dense" if rank > weight.break_even else str(rank) for rank in ranks]
        matrix = f"{blocks}{weight.shape[0]} x {weight.shape[1]}"
        rows.append([weight.name or "(model)", weight.kind, weight.scheme, matrix, str(len(weight.macs)), str(weight.break_even), *cells])
    skipped = [f"{layer.name or '(model)'} ({layer.kind}) stays dense: {layer.reason}" for layer in found.skipped]
    return "\n".join([markdown_table(rows, titles), *skipped])
