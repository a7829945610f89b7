"""`Plan`: a table of weights and budgets, its file and its text."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectrim.budget.plan_rows import BudgetPlan, SkippedLayer, Totals, WeightPlan
from spectrim.errors import FormatError
from spectrim.files import make_folder, read_json, write_json
from spectrim.forms.form import Size, ranks_in, shown
from spectrim.metrics.figures import curve, figure, frame
from spectrim.metrics.table import html_of, markdown_table

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """What `plan` found: plain data. ``print(plan)`` shows the budgets and the layers.

    Attributes:
        weights: every factorized weight.
        skipped: every other layer with parameters.
        importance: name of the distortions that the budgets below were met with: of those that the data allow, the one whose cut was
            best at the middle budget. Each weight's `distortions` holds the others too.
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

    def _repr_html_(self) -> str:
        return html_of(str(self))

    def plot(self) -> Any:
        """Return a matplotlib figure: output error, and accuracy or loss, against the MACs of each budget; right after the cut."""
        met = [(row.totals.macs / self.dense.macs, row.totals) for row in self.budgets if row.totals is not None]
        merits = {"output_error": "relative output error", "accuracy": "accuracy", "loss": "loss"}
        known = [name for name in merits if any(getattr(totals, name) is not None for _, totals in met)]
        made, axes = figure(max(1, len(known)))
        for place, name in zip(axes, known, strict=False):
            points = [(kept, float(getattr(totals, name))) for kept, totals in met if getattr(totals, name) is not None]
            dense = getattr(self.dense, name)
            whole = [] if dense is None else [(1.0, float(dense))]
            curve(place, [*points, *whole], title=f"{merits[name]} after the cut", x="MACs, fraction of dense", y=merits[name])
        return made

    def to_pandas(self) -> Any:
        """Return the budgets as a pandas data frame, a row for each: its limits and its totals."""
        limits = ({f"budget_{name}": value for name, value in row.budget.items()} for row in self.budgets)
        totals = ({} if row.totals is None else vars(row.totals) for row in self.budgets)
        return frame([limit | {"problem": row.problem} | found for limit, found, row in zip(limits, totals, self.budgets, strict=True)])

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
        make_folder(path.parent)
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read what `save` wrote.

        Args:
            path: of the file.

        Raises:
            FormatError: when it is not a plan.
        """
        values = read_json(Path(path), "pass what spectrim plan --out wrote")
        if "weights" not in values:
            raise FormatError(path, "is not a plan", hint="pass what spectrim plan --out wrote")
        return cls.from_dict(values)


def _weight_from(entry: Mapping[str, Any]) -> WeightPlan:
    names = ("shape", "spectrum", "macs", "params")
    seconds = None if entry["seconds"] is None else tuple(entry["seconds"])
    distortions = {name: tuple(values) for name, values in entry["distortions"].items()}
    sizes = entry.get("sizes") and tuple(tuple(size) for size in entry["sizes"])
    more = {"seconds": seconds, "distortions": distortions, "sizes": sizes}
    return WeightPlan(**{**entry, **{name: tuple(entry[name]) for name in names}, **more})


def _budget_from(entry: Mapping[str, Any]) -> BudgetPlan:
    ranks = {name: tuple(size) if isinstance(size, list) else size for name, size in entry["ranks"].items()}
    return BudgetPlan(**{**entry, "ranks": ranks, "totals": None if entry["totals"] is None else Totals(**entry["totals"])})


# Texts


def budget_name(limits: Mapping[str, float]) -> str:
    """Return a budget in words.

    Args:
        limits: by the fields of `Budget`.

    Examples:
        >>> budget_name({"macs": 0.5, "params": 0.25})
        '50 % macs, 25 % params'
    """
    fractions = ("macs", "params", "size", "latency", "tiles", "tile_reads")
    return ", ".join(
        f"{100 * value:g} % {name.replace('_', ' ')}" if name in fractions else f"{name} {value:g}" for name, value in limits.items()
    )


def _budget_table(found: Plan) -> str:
    titles = ("budget", "MACs", "parameters", "bytes", "tiles", "tile reads", "latency", "output error", "loss", "accuracy", "ranks")
    rows = [_cells("dense", found.dense, found.dense, {})]
    problems = []
    for row in found.budgets:
        name = budget_name(row.budget)
        if row.totals is None:
            problems.append(f"{name}: cannot be met. {row.problem}")
        else:
            cut = {weight.name: size for weight in found.weights if weight.is_cut(size := row.ranks[weight.name])}
            rows.append(_cells(name, row.totals, found.dense, cut))
    kept = [index for index in range(len(titles)) if index < 4 or any(row[index] for row in rows)]
    table = markdown_table([[row[index] for index in kept] for row in rows], [titles[index] for index in kept])
    return "\n".join([f"ranks by {found.importance}; right after the cut, without training", table, *problems])


def _cells(name: str, totals: Totals, dense: Totals, ranks: Mapping[str, Size]) -> list[str]:
    def part(value: int | None, whole: int | None) -> str:
        if value is None:
            return ""
        return f"{value:,.0f} ({100 * value / whole:.1f} %)" if whole else f"{value:,.0f}"

    return [
        name,
        part(totals.macs, dense.macs),
        part(totals.params, dense.params),
        part(totals.size_bytes, dense.size_bytes),
        part(totals.tiles, dense.tiles),
        part(totals.tile_reads, dense.tile_reads),
        "" if totals.latency_s is None else f"{1e3 * totals.latency_s:.3f} ms",
        "" if totals.output_error is None else f"{100 * totals.output_error:.2f} %",
        "" if totals.loss is None else f"{totals.loss:.4f}",
        "" if totals.accuracy is None else f"{100 * totals.accuracy:.2f} %",
        f"{min(ranks_in(ranks.values()))} to {max(ranks_in(ranks.values()))}" if ranks else "",
    ]


def _layer_table(found: Plan) -> str:
    met = [row for row in found.budgets if row.totals is not None]
    titles = ["layer", "kind", "scheme", "matrix", "held", "break-even", *(f"at {budget_name(row.budget)}" for row in met)]
    rows = []
    for weight in found.weights:
        blocks = f"{weight.blocks} x " if weight.blocks > 1 else ""
        cells = [shown(size) if weight.is_cut(size := row.ranks[weight.name]) else "dense" for row in met]
        matrix = f"{blocks}{weight.shape[0]} x {weight.shape[1]}"
        limits = [weight.shown(len(weight.macs)), weight.shown(weight.break_even)]
        rows.append([weight.name or "(model)", weight.kind, weight.scheme, matrix, *limits, *cells])
    skipped = [f"{layer.name or '(model)'} ({layer.kind}) stays dense: {layer.reason}" for layer in found.skipped]
    return "\n".join([markdown_table(rows, titles), *skipped])
