"""The rows of a `Plan`: weights, layers that stay dense, budgets, totals."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from spectrim.forms.form import Size, rung_of, shown


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
        distortions: for each importance, entry ``r`` is the distortion of keeping ``r`` values; the last is 0.
        macs: entry ``r - 1`` is the multiply-accumulates for one example at rank ``r``, as `merge` will write it.
        params: the same for stored parameters.
        seconds: the same for a call on the whole batch; None without a latency table.
        dense_macs: of the dense weight.
        dense_params: of the dense weight.
        dense_seconds: of the dense weight.
        break_even: the largest rank at which two operations cost less than one dense operation.
        element_bytes: of one stored number.
        multiple: ranks are multiples of it.
        sizes: the size at each rung, for a form with several ranks; None where a rung is a rank.
    """

    name: str
    kind: str
    scheme: str
    shape: tuple[int, int]
    blocks: int
    spectrum: tuple[float, ...]
    distortions: Mapping[str, tuple[float, ...]]
    macs: tuple[float, ...]
    params: tuple[int, ...]
    seconds: tuple[float, ...] | None
    dense_macs: float
    dense_params: int
    dense_seconds: float | None
    break_even: int
    element_bytes: int
    multiple: int = 1
    sizes: tuple[tuple[int, ...], ...] | None = None

    def is_cut(self, size: Size) -> bool:
        """Return whether smaller operations take the place of the dense one."""
        return rung_of(size) <= self.break_even

    def shown(self, rung: int) -> str:
        """Return the size of a rung as text."""
        return str(rung) if self.sizes is None or not rung else shown(self.sizes[rung - 1])


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
        output_error: ``||f_r(x) - f(x)|| / ||f(x)||`` over the evaluation examples.
        loss: mean over targets.
        accuracy: fraction in [0, 1].
        tiles: crossbars, where they were given.
        tile_reads: products of one input with one tile, for one example.
    """

    macs: int
    params: int
    size_bytes: int
    latency_s: float | None = None
    output_error: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    tiles: int | None = None
    tile_reads: int | None = None


@dataclass(frozen=True)
class BudgetPlan:
    """The predicted result of one budget.

    Attributes:
        budget: the limits given, by the fields of `Budget`.
        ranks: for `prune`; empty when the budget cannot be met.
        totals: of the merged network right after the cut; None when the budget cannot be met.
        problem: why not, with the smallest budget that can.
    """

    budget: Mapping[str, float]
    ranks: Mapping[str, Size] = field(default_factory=dict)
    totals: Totals | None = None
    problem: str = ""
