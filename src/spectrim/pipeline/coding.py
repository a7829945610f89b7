"""The last step of `compress` under a limit on coded bytes: the weights on levels, so that the file is small enough."""

from dataclasses import replace
from typing import Any

from torch import nn

from spectrim.budget.budget import CODED, FEWEST_BYTES, Budget, BudgetError
from spectrim.budget.rounding.round_to import Rounded, round_to
from spectrim.errors import SettingError
from spectrim.metrics.measurement import size_bytes_of
from spectrim.pipeline.compressed import Compressed
from spectrim.pipeline.judge import Judge, scores_of_measurement
from spectrim.protocols import Where
from spectrim.storage.pack import Packed
from spectrim.surgery.coverage import coverage
from spectrim.surgery.exchange import duplicate
from spectrim.training.history import History


def allowed_bytes(budget: Budget, dense: nn.Module) -> int:
    """Return the bytes that the coded file may take: a fraction is one of the dense network's bytes, as `measure` counts them.

    Args:
        budget: with ``coded_bytes``.
        dense: the network.

    Examples:
        >>> allowed_bytes(Budget(coded_bytes=0.1), nn.Linear(99, 100)), allowed_bytes(Budget(coded_bytes=2000), nn.Linear(9, 9))
        (4000, 2000)
    """
    assert budget.coded_bytes is not None
    return int(budget.coded_bytes * size_bytes_of(dense) if budget.coded_bytes < 1 else budget.coded_bytes)


def rounded(network: nn.Module, judge: Judge, budget: Budget, examples: int, *, progress: bool) -> tuple[Rounded, list[str]]:
    """Return a merged network rounded to the budget's coded bytes, and notes; BatchNorms are folded where the network can be traced.

    Args:
        network: merged, or dense; it is left untouched.
        judge: with the dense network and the calibration set.
        budget: with ``coded_bytes``.
        examples: in the calibration set.
        progress: whether to show progress.

    Raises:
        BudgetError: when no steps meet it.
        SettingError: for a network that cannot be rounded.
    """
    limit, notes = allowed_bytes(budget, judge.model), []
    goal: float = limit if limit >= FEWEST_BYTES else limit / size_bytes_of(network)
    try:
        try:
            made = round_to(network, judge.known, goal, examples=examples, progress=progress)
        except SettingError as error:
            if error.field != "fold":
                raise
            notes.append("BatchNorms are not folded: the network cannot be traced")
            made = round_to(network, judge.known, goal, examples=examples, fold=False, progress=progress)
    except SettingError as error:
        if error.field != CODED:
            raise
        raise BudgetError(f"{CODED}={budget.coded_bytes:g} allows {limit:,} bytes; it must be {error.rule}") from error
    check_size(budget, limit, made.packed)
    notes.append(f"rounded: the outputs on the calibration set changed by {made.unexplained:.2%} of their variance")
    return made, notes


def check_size(budget: Budget, limit: int, packed: Packed) -> None:
    """Raise a BudgetError for a coded file that is too large; the file is what counts."""
    if packed.coded_bytes > limit:
        raise BudgetError(f"{CODED}={budget.coded_bytes:g} allows {limit:,} bytes, and the coded file has {packed.coded_bytes:,}")


def with_levels(
    made: Compressed, judge: Judge, budget: Budget, inputs: Any, examples: int, *, joint: bool = False, progress: bool
) -> Compressed:
    """Return what `compress` made with its network rounded to the budget's coded bytes, and measured again.

    Args:
        made: with a merged or dense network.
        judge: of the call.
        budget: with ``coded_bytes``.
        inputs: one batch.
        examples: in the calibration set.
        joint: whether to round the dense network, too, with ranks, zeros and steps by one knapsack, and to keep that where its loss is
            lower.
        progress: whether to show progress.
    """
    found, notes = rounded(made.model, judge, budget, examples, progress=progress)
    if joint and (other := _together(judge, budget, examples, progress)) is not None:
        losses = judge(found.model)["loss"], judge(other.model)["loss"]
        better = losses[1] < losses[0]
        found = other if better else found
        notes.append(
            f"one knapsack over ranks, zeros and steps gives a loss of {losses[1]:.4g}, ranks first and then steps {losses[0]:.4g}: "
            f"the {'first' if better else 'second'} is kept"
        )
    measured = judge.measured(found.model, inputs, made.latency)
    sizes = {name: getattr(found.packed, name) for name in ("coded_bytes", "data_bytes", "index_bytes")}
    measured["final"] = replace(measured["final"], **sizes)
    scores = made.scores | {"rounded": scores_of_measurement(measured["final"])}
    return replace(made, model=found.model, measured=measured, scores=scores, notes=[*made.notes, *notes], packed=found.packed)


def _together(judge: Judge, budget: Budget, examples: int, progress: bool) -> Rounded | None:
    """Return the dense network whose ranks and steps one knapsack has chosen; None where it cannot be rounded so, or does not fit."""
    limit = allowed_bytes(budget, judge.model)
    if limit < FEWEST_BYTES:
        return None
    try:
        found = round_to(judge.model, judge.known, replace(budget, coded_bytes=limit), examples=examples, progress=progress)
    except SettingError:
        return None
    return found if found.packed.coded_bytes <= limit else None


def uncut(judge: Judge, where: Where | None, inputs: Any, settings: dict[str, Any], split: str) -> Compressed:
    """Return the dense network as `compress` would return a cut one, where nothing is to be cut.

    Args:
        judge: of the call.
        where: selects layers, for the list of what could be factorized.
        inputs: one batch.
        settings: of the call.
        split: what scores are on.
    """
    model, lines = duplicate(judge.model).eval(), coverage(judge.model, where, inputs=inputs)
    return Compressed(model, duplicate(model), {}, {"dense": judge.dense}, "none", None, History(), lines, settings, split=split)
