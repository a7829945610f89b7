"""The log of each epoch."""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from spectrim.forms.form import ranks_in
from spectrim.layers import named_factors
from spectrim.layers.sharded import reshard, whole, whole_sides
from spectrim.linalg.spectral import orthogonality_defect
from spectrim.metrics.figures import frame
from spectrim.metrics.table import Summarized, markdown_table


@dataclass
class History(Summarized):
    """The log of a training run.

    Attributes:
        epochs: one line for each: ``loss`` (the task's, with the teacher's share when distilling; mean over batches), one entry for each
            penalty (what it added), ``mean_rank``, ``learning_rate`` of the last step, ``examples_per_s``, ``seconds``, and ``eval_*``
            from the validation split.
        cuts: one entry for each cut of a schedule that changed a rank: ``step``, the number of optimizer steps before it, ``epoch``, the
            same in epochs (1.5: halfway through the second one), and ``ranks`` after it.
        layers: of a factorized model, one entry for each epoch: ``ranks`` and ``defects`` by the names of `named_factors`, at its end. The
            defect is the larger of `linalg.orthogonality_defect` of ``U`` and of ``Vh^T``. Empty for a dense model; the first epochs are
            missing where they were resumed from a checkpoint that does not hold them.
        best: with ``fit(keep_best=...)``, the epoch whose weights the model has: ``epoch`` (counted from 1), ``monitor`` and ``value``.
        stopped: when a callback ended training: ``epoch`` after which (counted from 1) and ``epochs``, those that were asked for.
    """

    epochs: list[dict[str, float]] = field(default_factory=list)
    cuts: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    stopped: dict[str, Any] | None = None

    @property
    def last(self) -> dict[str, float]:
        """The last line; empty before the first epoch."""
        return self.epochs[-1] if self.epochs else {}

    def summary(self) -> str:
        """Return a table with a row for each epoch, as text."""
        names = list(dict.fromkeys(name for line in self.epochs for name in line if name != "mean_rank" or line[name]))
        rows = [
            [str(number), *(f"{line[name]:.4g}" if name in line else "" for name in names)] for number, line in enumerate(self.epochs, 1)
        ]
        return markdown_table(rows, ["epoch", *names]) if rows else "no epochs"

    def to_pandas(self) -> Any:
        """Return the epochs as a pandas data frame, a row for each, counted from 1."""
        return frame([{"epoch": number} | line for number, line in enumerate(self.epochs, 1)], "epoch")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; ``best`` and ``stopped`` where there are."""
        ends = {name: value for name, value in (("best", self.best), ("stopped", self.stopped)) if value is not None}
        return {"epochs": self.epochs, "cuts": self.cuts, "layers": self.layers, **ends}


def mean_rank(model: nn.Module) -> float:
    """Return the mean rank over the factorized weights; 0 for a dense model."""
    ranks = ranks_in(factors.size for _, factors in named_factors(model))
    return sum(ranks) / len(ranks) if ranks else 0.0


def layer_lines(model: nn.Module) -> list[dict[str, Any]]:
    """Return one entry of `History.layers`; none for a dense model."""
    ranks, defects = {}, {}
    for name, factors in named_factors(model):
        sides = whole_sides(factors)
        sides = [side.cpu() if side.device.type == "mps" else side for side in sides]  # which has no float64
        ranks[name], defects[name] = factors.size, max(map(orthogonality_defect, sides), default=0.0)
    return [{"ranks": ranks, "defects": defects}] if ranks else []


def largest_gradient(model: nn.Module) -> tuple[str, float]:
    """Return the name of the parameter with the largest gradient norm, and that norm; a norm that is not finite counts as largest."""
    reshard(model)
    norms = {name: float(whole(p.grad.float().norm())) for name, p in model.named_parameters() if p.grad is not None}
    if not norms:
        return "(no gradient yet)", 0.0
    name = max(norms, key=lambda key: norms[key] if math.isfinite(norms[key]) else math.inf)
    return name, norms[name]
