"""The smallest network that is at most so much worse: bisection over budgets."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from spectrim.budget.budget import CODED, FRACTIONS, Budget, BudgetError, as_budget
from spectrim.errors import SettingError
from spectrim.pipeline.compressed import Compressed
from spectrim.pipeline.store import Store
from spectrim.steps import LOGGER

RESOLUTION = 1 / 32
"""Bisection ends when the smallest budget that is allowed is known up to this share of the dense network."""

SMALLEST, NEAR = 32, 1.12
"""Of coded bytes: the smallest budget that is tried is that part of the largest, and bisection ends when it is known up to this factor."""

P = ParamSpec("P")
T = TypeVar("T")
Scores = Mapping[str, float]


def unit_of(budget: Budget, *, by_clock: bool = False) -> str:
    """Return the unit that is made small: the first fraction that is limited, else coded bytes, seconds where there is a table, or MACs.

    Examples:
        >>> unit_of(Budget(max_drop=0.5)), unit_of(Budget(max_drop=0.5, params=0.3)), unit_of(Budget(max_drop=0.5, coded_bytes=0.2))
        ('macs', 'params', 'coded_bytes')
    """
    other = CODED if budget.coded_bytes is not None else "latency" if by_clock else "macs"
    return next((name for name in FRACTIONS if name in budget.limits), other)


def drop_of(budget: Budget, dense: Scores, found: Scores) -> tuple[bool, str]:
    """Return whether a network is worse than the budget allows, and by how much it is, in words.

    Args:
        budget: with ``max_drop``, ``max_loss_rise`` or both.
        dense: scores of the network that is compared with.
        found: scores on the same data.

    Raises:
        SettingError: for ``max_drop`` without an accuracy.

    Examples:
        >>> drop_of(Budget(max_drop=0.5), {"accuracy": 0.9, "loss": 1.0}, {"accuracy": 0.89, "loss": 1.1})
        (True, 'accuracy 1.00 points lower')
    """
    over, words = False, []
    if budget.max_drop is not None:
        if "accuracy" not in dense or "accuracy" not in found:
            hint = "Budget(max_loss_rise=0.05) allows a loss that is 5 % higher"
            raise SettingError("Budget", "max_drop", got=budget.max_drop, rule="left out where there is no accuracy", hint=hint)
        points = 100 * (dense["accuracy"] - found["accuracy"])
        over |= points > budget.max_drop + 1e-9
        words.append(f"accuracy {abs(points):.2f} points {'lower' if points > 0 else 'higher'}" if abs(points) > 1e-9 else "accuracy equal")
    if budget.max_loss_rise is not None:
        rise = found["loss"] / dense["loss"] - 1
        over |= rise > budget.max_loss_rise + 1e-9
        words.append(f"loss {100 * abs(rise):.1f} % {'higher' if rise > 0 else 'lower'}")
    return over, ", ".join(words)


def smallest(
    budget: Budget, unit: str, make: Callable[[Budget], T], scores: Callable[[T], tuple[Scores, Scores]]
) -> tuple[T, list[dict[str, Any]]]:
    """Return what is made for the smallest budget that is not too much worse, and what was tried.

    A share of the dense network is halved again and again, of coded bytes its logarithm; a budget that cannot be met counts as too small.
    Larger networks are taken to be no worse than smaller ones; where one is, the smallest one that was tried and allowed is returned.

    Args:
        budget: its limits hold for every try; that of `unit` is the largest share.
        unit: a fraction of `Budget`.
        make: called with budgets that have limits alone.
        scores: returns the scores of the network compared with, and of what was made, on the same data.

    Raises:
        BudgetError: when even the largest share is too much worse.
    """
    largest = float(budget.asked.get(unit, 1.0))
    if largest > 1:
        raise SettingError("Budget", unit, got=largest, rule=f"a fraction in (0, 1) with {' and '.join(budget.drops)}")
    least, most = largest / SMALLEST if unit == CODED else 0.0, largest
    best: T | None = None
    tried: list[dict[str, Any]] = []

    def attempt(share: float) -> T | None:
        one = replace(budget, max_drop=None, max_loss_rise=None, **{unit: share})
        try:
            made = make(one)
        except BudgetError as error:
            if share == largest:
                raise
            tried.append({"budget": one.asked, "kept": False, "words": f"it cannot be met ({error})"})
            return None
        dense, found = scores(made)
        over, words = drop_of(budget, dense, found)
        tried.append({"budget": one.asked, "kept": not over, "words": words, **found})
        LOGGER.info("tried %r: %s", one, words)
        return None if over else made

    while most / least > NEAR if unit == CODED else most - least > RESOLUTION:
        middle = (least * most) ** 0.5 if unit == CODED else (least + most) / 2
        made = attempt(middle)
        best, least, most = (best, middle, most) if made is None else (made, least, middle)
    if best is None:
        best = attempt(largest)
        if best is None:
            asked = ", ".join(f"{name}={value:g}" for name, value in budget.drops.items())
            raise BudgetError(f"at {unit}={largest:g} the network is too much worse for {asked}: {tried[-1]['words']}; relax one of them")
    return best, tried


def searching(compress: Callable[P, Compressed]) -> Callable[P, Compressed]:
    """Let `compress` take budgets with ``max_drop`` or ``max_loss_rise``: it is called for several budgets; a decorator."""
    signature = inspect.signature(compress)

    @functools.wraps(compress)
    def called(*args: P.args, **kwargs: P.kwargs) -> Compressed:
        given = dict(signature.bind(*args, **kwargs).arguments)
        if isinstance(given.get("loss"), Budget) and given.get("budget") is None:
            given["budget"] = given.pop("loss")
        budget = given.get("budget")
        if not isinstance(budget, Mapping | Budget) or not (budget := as_budget(budget, "compress", drops=True, coded=True)).drops:
            return compress(**given)  # type: ignore[call-arg]
        if given.get("eval_data") is None:
            raise SettingError("compress", "eval_data", got=None, rule=f"a validation split, with {' and '.join(budget.drops)}")
        unit, folder = unit_of(budget, by_clock=given.get("latency") is not None or given.get("backend") is not None), given.get("folder")

        def make(one: Budget) -> Compressed:
            inside = {} if folder is None else {"folder": Path(folder) / "-".join(f"{name}{value:g}" for name, value in one.asked.items())}
            made = compress(**(given | {"budget": one} | inside))  # type: ignore[call-arg]
            if made.latency is not None and given.get("narrow") is None:  # a table is of one network; each width has its own
                given.update(latency=made.latency, backend=None)  # timed once
            return made

        made, tried = smallest(budget, unit, make, lambda made: (made.scores["dense"], list(made.scores.values())[-1]))
        made.settings = made.settings | {"search": repr(budget)}
        made.tried = tried
        if folder is not None:
            Store(Path(folder)).finish(made)
        return made

    return called
