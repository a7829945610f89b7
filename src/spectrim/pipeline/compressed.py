"""`Compressed`: what `compress` made, and what it cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from spectrim.forms.form import Size
from spectrim.layers import named_factors
from spectrim.metrics.measurement import Measurement, compare_table
from spectrim.surgery.coverage import Coverage
from spectrim.training.history import History


@dataclass
class Compressed:
    """What `compress` made, and what it cost.

    Attributes:
        model: `torch.nn` layers (two in place of one are a `PlainPair`), in eval mode, for deployment.
        low: the same network before `merge`, factorized: to train on, to cut further, to `save`.
        measured: ``dense`` and ``final``: costs, latency side by side, and loss and accuracy as in `scores`.
        scores: loss and accuracy by stage: ``dense``, ``squeezed``, ``cut``, ``recalibrated``, ``corrected``, ``final``; skipped
            stages are missing. On the evaluation split, or without one on the calibration set.
        cut: how the cut was made.
        teacher: the distillation used (the fields of `Distillation`); None without one.
        history: of the fine-tuning; empty without epochs.
        coverage: each layer: factorized, or why not; and what `merge` wrote.
        settings: the arguments, as plain data.
        dropped: scores of the stages that were tried and not kept, because the loss was not lower.
        notes: cut methods that were not tried, and why.
    """

    model: nn.Module
    low: nn.Module
    measured: dict[str, Measurement]
    scores: dict[str, dict[str, float]]
    cut: str
    teacher: dict[str, Any] | None
    history: History
    coverage: Coverage
    settings: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ranks(self) -> dict[str, Size]:
        """The rank of each factorized weight; `prune` takes it."""
        return {name: factors.size for name, factors in named_factors(self.low)}

    @property
    def report(self) -> dict[str, Any]:
        """Everything but the networks, as plain data for JSON."""
        measured = {name: entry.to_dict() for name, entry in self.measured.items()}
        measured["final"]["ranks"] = self.ranks
        rest = {
            "scores": self.scores,
            "cut": self.cut,
            "teacher": self.teacher,
            "history": self.history.to_dict(),
            "settings": self.settings,
            "dropped": self.dropped,
            "notes": self.notes,
        }
        return measured | rest | {"coverage": [vars(line) for line in self.coverage]}

    def summary(self) -> str:
        """Return a table of the dense and the low-rank network side by side."""
        return compare_table({"dense": self.measured["dense"], "low-rank": self.measured["final"]})

    def stages(self) -> str:
        """Return one line for each stage that was scored, kept or not, how the cut was made, and the distillation."""

        def line(stage: str, found: Mapping[str, float], end: str = "") -> str:
            return f"{stage:14}" + ", ".join(f"{name} {value:.4g}" for name, value in found.items()) + end

        lines = [line(stage, found) for stage, found in self.scores.items()]
        lines += [line(stage, found, " (not kept: the loss is not lower)") for stage, found in self.dropped.items()]
        told = {"weight": "logits", "features": "intermediate features"}
        by = [way for name, way in told.items() if (self.teacher or {}).get(name)]
        taught = [f"distilled from the dense network: {' and '.join(by)}"] if by else []
        return "\n".join([f"cut: {self.cut}", *self.notes, *taught, *lines])
