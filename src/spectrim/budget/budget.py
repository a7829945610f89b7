"""`Budget`: what the whole network may keep."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from spectrim.checks import check
from spectrim.errors import SettingError, SpectrimError

FRACTIONS = {"macs": "macs", "params": "params", "size": "size", "latency": "latency", "tiles": "tiles", "tile_reads": "tile_reads"}
"""Fields of a budget that are fractions of the dense network, and the cost that each limits."""


ABSOLUTE = {"size_bytes": "size", "latency_s": "latency", "tile_count": "tiles"}
"""Fields of a budget that have a unit, and the cost that each limits."""


DROPS = ("max_drop", "max_loss_rise")
"""Fields of a budget that say how much worse the network may be."""


UNITS = {"coded_bytes": "bytes", "size_bytes": "bytes", "latency_s": "seconds", "tile_count": "tiles"}


CODED = "coded_bytes"
"""Field of a budget that ranks alone do not decide: by forms that are pruned or rounded, or by rounding after the cut."""


FEWEST_BYTES = 1000
"""Numbers of coded bytes below 1 are fractions; from this on they are bytes."""


MOST = 2**63
"""Above every number of bytes and tiles."""


class BudgetError(SettingError):
    """Limits that no network reaches, alone or together.

    Examples:
        >>> print(BudgetError("no ranks satisfy macs=0.4 and params=0.2 together; relax one of them"))
        Budget: no ranks satisfy macs=0.4 and params=0.2 together; relax one of them
    """

    def __init__(self, problem: str) -> None:
        SpectrimError.__init__(self, f"Budget: {problem}")


class FloorError(BudgetError):
    """A limit below the cheapest network of ranks.

    Examples:
        >>> print(FloorError("macs", got=0.1, rule="at least 0.2000 for this network"))
        Budget: macs must be at least 0.2000 for this network, got 0.1
    """

    def __init__(self, field: str, *, got: object, rule: str, hint: str = "") -> None:
        SettingError.__init__(self, "Budget", field, got=got, rule=rule, hint=hint)


def as_budget(budget: "Budget | float | Mapping[str, Any] | None", verb: str, *, drops: bool = False, coded: bool = False) -> "Budget":
    """Return a budget as people write it: a `Budget`, a fraction of the multiply-accumulates, or a dict of a budget's fields.

    Args:
        budget: in any of these forms.
        verb: that was called, for errors.
        drops: whether it may say how much worse the network may be.
        coded: whether it may limit the bytes of the coded file.

    Raises:
        SettingError: for anything else.

    Examples:
        >>> as_budget(0.5, "compress"), as_budget({"params": 0.3}, "compress")
        (Budget(macs=0.5), Budget(params=0.3))
    """
    check(verb, budget=budget)
    if isinstance(budget, Budget):
        return _within(budget, verb, drops, coded)
    if not isinstance(budget, Mapping):
        return Budget(macs=float(budget or 0.0))
    names = [field.name for field in fields(Budget)]
    if unknown := [name for name in budget if name not in names]:
        raise SettingError(verb, "budget", got=dict(budget), rule=f"a dict with the keys {names}", hint=f"{unknown[0]!r} is none of them")
    return _within(Budget(**budget), verb, drops, coded)


def _within(budget: "Budget", verb: str, drops: bool, coded: bool) -> "Budget":
    """Return a budget; refuse coded bytes where nothing is rounded, and drops where nothing is scored."""
    if budget.coded_bytes is not None and not coded:
        rule = "without coded_bytes, which compress meets by rounding after the cut"
        hint = "round_to(model, data, coded_bytes) rounds a network; allocate chooses bits of what constrain(low, bits=32) returns"
        raise SettingError(verb, "budget", got=budget, rule=rule, hint=hint)
    if budget.drops and not drops:
        rule = f"without {' and '.join(budget.drops)}, which compress and the prune key of a recipe search for"
        raise SettingError(verb, "budget", got=budget, rule=rule)
    return budget


@dataclass(frozen=True, repr=False)
class Budget:
    """What the whole network may keep, in any combination; at least one.

    Args:
        macs: fraction of the multiply-accumulates of the dense network, in (0, 1].
        params: fraction of its stored parameters, in (0, 1].
        size: fraction of its bytes, in (0, 1], as `measure` counts them: parameters and buffers, two bytes for each in half precision.
        latency: fraction of the seconds that it takes, in (0, 1]; `allocate` then needs a latency table.
        size_bytes: bytes, at least 1.
        latency_s: seconds for one call on the table's batch, above 0.
        tiles: fraction of the crossbar tiles of the dense network, in (0, 1]; `allocate` then needs ``crossbars``, which say their size.
            With one size of tiles it is the fraction of cells, converters and area, too.
        tile_reads: fraction of the reads of tiles for one example, in (0, 1], and so of the energy.
        tile_count: tiles, at least 1, both of each pair and all slices counted.
        max_drop: points of accuracy, at least 0, by which the network may be worse than the dense one on the validation split: `compress`
            then looks for the smallest network that is not. 0.5 allows 92.0 % to fall to 91.5 %. Other limits hold as well.
        max_loss_rise: the same for the loss, as a fraction of the dense network's, at least 0; 0.05 allows 5 % more.
        coded_bytes: of the coded file that `pack` writes: a fraction of the dense network's bytes, in (0, 1), or a number of bytes of at
            least 1000. `compress` rounds the weights for it, after the cut that other limits ask for.

    Raises:
        SettingError: for a fraction outside (0, 1], for a number of bytes, seconds or points that is none, or when nothing is limited.

    Examples:
        >>> Budget(macs=0.4)
        Budget(macs=0.4)
        >>> Budget(params=0.5, latency_s=0.002)
        Budget(params=0.5, latency_s=0.002)
    """

    macs: float | None = None
    params: float | None = None
    size: float | None = None
    latency: float | None = None
    size_bytes: float | int | None = None
    latency_s: float | None = None
    tiles: float | None = None
    tile_reads: float | None = None
    tile_count: float | int | None = None
    max_drop: float | None = None
    max_loss_rise: float | None = None
    coded_bytes: float | int | None = None

    def __post_init__(self) -> None:
        hint = "Budget(macs=0.4) keeps 40 %"
        if not self.asked:
            raise SettingError("Budget", f"one of {', '.join(f.name for f in fields(self))}", got=None, rule="given", hint=hint)
        for name, value in self.asked.items():
            if isinstance(value, bool) or not isinstance(value, Real):
                raise SettingError("Budget", name, got=value, rule="a number", hint=hint)
            if name in FRACTIONS and not 0 < value <= 1:
                hint = next((f"write {other}= for {unit}" for other, unit in UNITS.items() if FRACTIONS[name] == ABSOLUTE.get(other)), hint)
                raise SettingError("Budget", name, got=value, rule="the fraction kept, in (0, 1]", hint=hint)
            if name in DROPS and not 0 <= value < math.inf:
                what = "points of accuracy" if name == "max_drop" else "a fraction of the loss"
                raise SettingError("Budget", name, got=value, rule=f"{what}, at least 0", hint="Budget(max_drop=0.5)")
        if self.size_bytes is not None and not 1 <= self.size_bytes < MOST:
            raise SettingError("Budget", "size_bytes", got=self.size_bytes, rule="bytes, at least 1", hint="Budget(size=0.4) keeps 40 %")
        if self.latency_s is not None and not 0 < self.latency_s < math.inf:
            raise SettingError("Budget", "latency_s", got=self.latency_s, rule="seconds, above 0", hint="Budget(latency=0.4) keeps 40 %")
        if self.tile_count is not None and not 1 <= self.tile_count < MOST:
            raise SettingError("Budget", "tile_count", got=self.tile_count, rule="tiles, at least 1", hint="Budget(tiles=0.3) keeps 30 %")
        if self.coded_bytes is not None and not (0 < self.coded_bytes < 1 or FEWEST_BYTES <= self.coded_bytes < MOST):
            rule = f"a fraction in (0, 1), or a number of bytes of at least {FEWEST_BYTES}"
            raise SettingError("Budget", CODED, got=self.coded_bytes, rule=rule, hint="Budget(coded_bytes=0.07)")

    @property
    def limits(self) -> dict[str, float | int]:
        """What is limited and ranks decide: field to value."""
        return {name: value for name, value in self.asked.items() if name not in (*DROPS, CODED)}

    @property
    def drops(self) -> dict[str, float]:
        """How much worse the network may be: field to value."""
        return {name: getattr(self, name) for name in DROPS if getattr(self, name) is not None}

    @property
    def asked(self) -> dict[str, float | int]:
        """All that is given: field to value."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in self.asked.items())})"


def _number(owner: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SettingError(owner, f"budget[{name!r}]", got=value, rule="a number")
    return value
