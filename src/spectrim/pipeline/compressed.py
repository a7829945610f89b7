"""`Compressed`: what `compress` made, and what it cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from spectrim.forms.form import Size
from spectrim.layers import named_factors
from spectrim.metrics.figures import curve, figure, frame, ratios
from spectrim.metrics.measurement import Measurement, compare_table
from spectrim.metrics.table import Summarized
from spectrim.metrics.verdict import Verdict, has_loops, verdict
from spectrim.protocols import Latencies
from spectrim.storage.pack import Packed
from spectrim.surgery.coverage import Coverage
from spectrim.training.history import History

SPLITS = {"validation": "validation split", "calibration": "calibration set"}
"""What scores are on, in words."""


@dataclass
class Compressed(Summarized):
    """What `compress` made, and what it cost.

    Attributes:
        model: `torch.nn` layers (two in place of one are a `PlainPair`), in eval mode, for deployment.
        low: the same network before `merge`, factorized: to train on, to cut further, to `save`.
        measured: ``dense`` and ``final``: costs, latency side by side, and loss and accuracy as in `scores`.
        scores: loss and accuracy by stage: ``dense``, ``squeezed``, ``cut``, ``recalibrated``, ``corrected``, ``final``, ``rounded``;
            skipped stages are missing. On the evaluation split, or without one on the calibration set.
        cut: how the cut was made.
        teacher: the distillation used (the fields of `Distillation`); None without one.
        history: of the fine-tuning; empty without epochs.
        coverage: each layer: factorized, or why not; and what `merge` wrote.
        settings: the arguments, as plain data.
        dropped: scores of the stages that were tried and not kept, because the loss was not lower.
        notes: cut methods that were not tried, and why.
        split: what scores are on: ``validation`` (the data given as `eval_data`) or ``calibration`` (training examples).
        tried: with a budget that has ``max_drop`` or ``max_loss_rise``: each budget that was tried, its scores, and whether it was allowed.
        latency: the table by which ranks were chosen; for other budgets of the same network.
        packed: with a budget of coded bytes: the sizes of the file that `pack` writes of `model`, and of each tensor in it.
    """

    model: nn.Module = field(repr=False)
    low: nn.Module = field(repr=False)
    measured: dict[str, Measurement]
    scores: dict[str, dict[str, float]]
    cut: str
    teacher: dict[str, Any] | None
    history: History
    coverage: Coverage
    settings: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    split: str = "calibration"
    tried: list[dict[str, Any]] = field(default_factory=list)
    packed: Packed | None = None
    latency: Latencies | None = field(default=None, repr=False)

    @property
    def verdict(self) -> Verdict:
        """Smaller, faster here, level in accuracy? And what to try next; in words."""
        return self.verdict_on(self.measured, SPLITS[self.split])

    def verdict_on(self, measured: Mapping[str, Measurement], split: str) -> Verdict:
        """Return the verdict by other measurements of the two networks, as on the test split.

        Args:
            measured: ``dense`` and ``final``.
            split: what accuracy and loss were measured on, in words.
        """
        trained, cut = bool(self.history.epochs), "kept" if "fine-tuned" in self.dropped else ""
        return verdict(measured["dense"], measured["final"], loops=has_loops(self.model), trained=trained, cut=cut, split=split)

    @property
    def ranks(self) -> dict[str, Size]:
        """The rank of each factorized weight; `prune` takes it."""
        return {name: factors.size for name, factors in named_factors(self.low)}

    @property
    def report(self) -> dict[str, Any]:
        """Everything but the networks, as plain data for JSON."""
        measured = {name: entry.to_dict() for name, entry in self.measured.items()}
        measured["final"]["ranks"] = self.ranks
        rest: dict[str, Any] = {
            "scores": self.scores,
            "cut": self.cut,
            "teacher": self.teacher,
            "history": self.history.to_dict(),
            "settings": self.settings,
            "dropped": self.dropped,
            "notes": self.notes,
            "split": self.split,
            "tried": self.tried,
            "verdict": self.verdict.to_dict(),
        }
        if self.packed is not None:
            rest["packed"] = self.packed.to_dict()
        return measured | rest | {"coverage": [vars(line) for line in self.coverage]}

    def summary(self) -> str:
        """Return a table of the dense and the low-rank network side by side, and the verdict as its last line."""
        name = "low-rank" if self.packed is None else "rounded"
        return f"{compare_table({'dense': self.measured['dense'], name: self.measured['final']})}\n{self.verdict}"

    def to_pandas(self) -> Any:
        """Return the measurements as a pandas data frame, a row for each network."""
        rows = ({"network": name} | entry.to_dict() for name, entry in self.measured.items())
        return frame([{key: value for key, value in row.items() if key != "ranks"} for row in rows], "network")

    def plot(self) -> Any:
        """Return a matplotlib figure: what is kept of each cost, the scores of each stage, and where budgets were searched, those."""
        dense, final = self.measured["dense"], self.measured["final"]
        costs = {"bytes": "size_bytes", "parameters": "params", "MACs": "macs", "latency": "latency_s"}
        coded = {} if final.coded_bytes is None else {"coded file": final.coded_bytes / dense.size_bytes}
        kept = {
            name: getattr(final, key) / getattr(dense, key) for name, key in costs.items() if getattr(dense, key) and getattr(final, key)
        }
        kept |= coded
        merit = "accuracy" if dense.accuracy is not None else "loss"
        tried = [(one["budget"], one[merit]) for one in self.tried if merit in one]
        made, axes = figure(3 if tried else 2)
        ratios(axes[0], kept, title="kept of the dense network")
        stages = [(index, found[merit]) for index, found in enumerate(self.scores.values())]
        curve(axes[1], stages, title=f"{merit} on the {SPLITS[self.split]}", x="", y=merit)
        axes[1].set_xticks(range(len(stages)), list(self.scores), rotation=30)
        if tried:
            unit = next(iter(tried[0][0]))
            points = [(budget[unit], value) for budget, value in tried]
            curve(axes[2], points, title="budgets that were tried", x=f"{unit}, fraction of dense", y=merit)
        return made

    def stages(self) -> str:
        """Return one line for each stage that was scored, kept or not, how the cut was made, and the distillation."""
        relative = self.settings.get("measure") == "RelativeDistance"

        def told(name: str, value: float) -> str:
            return f"{100 * value:.2g} % of the output's variance lost" if relative and name == "loss" else f"{name} {value:.4g}"

        def line(stage: str, found: Mapping[str, float], end: str = "") -> str:
            return f"{stage:15}" + ", ".join(told(name, value) for name, value in found.items()) + end

        lines = [line(stage, found) for stage, found in self.scores.items()]
        why = {"fine-tuned": " (not kept: worse than the cut)"}
        why["refit held out"] = " (not refitted: no better on a quarter of the examples that was left out)"
        lines += [line(stage, found, why.get(stage, " (not kept: the loss is not lower)")) for stage, found in self.dropped.items()]
        ways = {"weight": "logits", "features": "intermediate features"}
        by = [way for name, way in ways.items() if (self.teacher or {}).get(name)]
        taught = [f"distilled from the dense network: {' and '.join(by)}"] if by else []
        searched = [
            f"tried {', '.join(f'{name}={value:.4g}' for name, value in one['budget'].items())}: {one['words']}"
            + (": allowed" if one["kept"] else ": not allowed")
            for one in self.tried
        ]
        return "\n".join([*searched, f"cut: {self.cut}", *self.notes, *taught, *lines])
