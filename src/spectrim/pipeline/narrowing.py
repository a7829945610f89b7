"""`compress(narrow=...)`: fewer hidden units before ranks, and which share of them is best."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any, ParamSpec

from torch import nn

from spectrim.budget.budget import CODED, FRACTIONS, Budget
from spectrim.budget.narrow import COUNTED, narrow
from spectrim.budget.widths import costs_of
from spectrim.errors import LayerError, SettingError, SpectrimError
from spectrim.metrics.batch import BatchDims
from spectrim.pipeline.compressed import Compressed
from spectrim.pipeline.judge import Judge
from spectrim.pipeline.store import Store
from spectrim.protocols import Where

P = ParamSpec("P")

RULE = "a share in (0, 1], or several of them to choose from, where 1 leaves the network as wide as it is"


def shares_of(value: Any) -> list[float]:
    """Return the shares of ``narrow=``; empty for None.

    Raises:
        SettingError: for anything else than shares.
    """
    shares = [] if value is None else [value] if isinstance(value, Real) or not isinstance(value, Sequence) else list(value)
    wrong = [share for share in shares if isinstance(share, bool) or not isinstance(share, Real) or not 0 < float(share) <= 1]
    if wrong or (value is not None and not shares) or len(set(shares)) < len(shares):
        raise SettingError("compress", "narrow", got=value, rule=RULE)
    return [float(share) for share in shares]


def unit_of(budget: Budget) -> str:
    """Return the field of a budget that ``narrow=`` is a share of.

    Raises:
        SettingError: for limits that only a clock or a crossbar knows, as fractions of the dense network.
    """
    limits = [name for name in budget.limits if name != CODED]
    if not limits or (other := [name for name in limits if name in FRACTIONS and name not in COUNTED]):
        rule = "left out where nothing but coded_bytes is limited" if not limits else f"left out with a fraction of {other[0]}"
        raise SettingError("compress", "narrow", got=budget, rule=rule, hint="latency_s= and tile_count= are no fractions")
    return next((name for name in ("macs", "params", "size") if name in limits), "macs")


def check_narrow(value: Any, budget: Budget, calibration: Any, latency: Any) -> float:
    """Return the share of ``narrow=``; 1 where nothing is to be left out.

    Raises:
        SettingError: for what is no share, a budget that it cannot be a share of, or a calibration or table of the network as it is.
    """
    share = next(iter(shares_of(value)), 1.0)
    if share < 1:
        unit_of(budget)
        for name, given in (("calibration", calibration), ("latency", latency)):
            if given is not None:
                hint = "narrow(model, ...) first, and give what was made of its network"
                raise SettingError("compress", name, got=type(given).__name__, rule="left out with narrow", hint=hint)
    return share


def narrower(
    judge: Judge, share: float, budget: Budget, inputs: Any, where: Where | None, dims: BatchDims | None
) -> tuple[nn.Module, Budget, list[str]]:
    """Return a network with fewer hidden units, what the budget means as fractions of it, and a note.

    Args:
        judge: with the dense network, the loss and the calibration set.
        share: of the cost that the budget limits, which the narrower network keeps.
        budget: for the whole network.
        inputs: one batch.
        where: selects the layers that are cut, and so the readers of hidden units.
        dims: states the batch axes.

    Raises:
        BudgetError: for a share that no widths meet.
        LayerError: for a network without hidden units.
    """
    field, model = unit_of(budget), judge.model
    made = narrow(
        model, judge.known, Budget(**{field: share}), judge.loss, where=where, examples=EVERY, example_inputs=inputs, batch_dims=dims
    )
    costs = [costs_of(network, inputs) for network in (model, made.model)]
    ratios = {name: costs[0][unit] / costs[1][unit] for name, unit in FRACTIONS.items() if unit in costs[0]}
    own = {name: min(1.0, value * ratios[name]) for name, value in budget.limits.items() if name in ratios}
    widths = ", ".join(f"{name} {made.widths[name]} of {one.count}" for one in made.units if (name := one.reader) in made.widths)
    return made.model, replace(budget, **own), [f"narrowed first, to {share:g} of the {field}; units read by {widths}"]


EVERY = 2**40
"""Examples: all of the calibration set."""


def narrowing(compress: Callable[P, Compressed]) -> Callable[P, Compressed]:
    """Let `compress` take several shares of ``narrow=``: it is called for each, and what is best after the cut is kept; a decorator.

    Best is, as for the ways to cut, the highest accuracy where there is one and nothing is trained, else the lowest loss, on the data that
    choose. A share that cannot be met is left out, and a note says why; the first error is raised when none can.
    """
    signature = inspect.signature(compress)

    @functools.wraps(compress)
    def called(*args: P.args, **kwargs: P.kwargs) -> Compressed:
        given = dict(signature.bind(*args, **kwargs).arguments)
        shares = shares_of(given.pop("narrow", None))
        if len(shares) < 2:
            return compress(**(given | {"narrow": shares[0] if shares else None}))  # type: ignore[call-arg]
        folder, made, errors = given.get("folder"), dict[float, Compressed](), dict[float, SpectrimError]()
        for share in shares:
            inside = {} if folder is None else {"folder": Path(folder) / f"narrow{share:g}"}
            try:
                made[share] = compress(**(given | inside | {"narrow": share}))  # type: ignore[call-arg]
            except (SettingError, LayerError) as error:
                errors[share] = error
        if not made:
            raise next(iter(errors.values()))
        best = min(made, key=lambda share: _rank(made[share], trained=bool(given.get("epochs"))))
        shown = ", ".join(f"{share:g} {_said(one)}" for share, one in made.items())
        found = made[best]
        found.notes.append(f"narrowed to several shares, {best:g} is kept: {shown}")
        found.notes += [f"not narrowed to {share:g}: {error}" for share, error in errors.items()]
        found.settings = found.settings | {"narrow": shares}
        if folder is not None:
            Store(Path(folder)).finish(found)
        return found

    return called


def _rank(made: Compressed, trained: bool) -> tuple[float, float]:
    last = list(made.scores.values())[-1]
    return (0.0 if trained else -last.get("accuracy", 0.0)), last["loss"]


def _said(made: Compressed) -> str:
    last = list(made.scores.values())[-1]
    return f"(loss {last['loss']:.4g}" + (f", accuracy {last['accuracy']:.4f})" if "accuracy" in last else ")")
