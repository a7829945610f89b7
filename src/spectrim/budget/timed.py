"""`LatencyTable`: what was timed, and what follows for ranks."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

from torch import nn

from spectrim.budget.latency_cache import timing_of
from spectrim.budget.timing import Backend, Timing
from spectrim.checks.words import check_words
from spectrim.errors import FormatError, LayerError, SettingError
from spectrim.layers import FactorizedLayer, sites

LONGEST_S, LARGEST = 1e6, 2**24
"""Seconds and ranks in a file beyond which it is taken for damaged."""

MARGIN = 0.05
"""A pair is written where it takes at least this share less time than the dense layer: less than that may be noise."""


@dataclass(frozen=True)
class TimedWeight:
    """One factorized weight in a `LatencyTable`.

    Attributes:
        layer: describes the layer, its sizes and its weight, to tell whether a table fits a model.
        calls: the key in `LatencyTable.timings` of each time it runs; empty where it was not timed.
        multiple: ranks are multiples of this.
        most: the largest rank at which a pair takes fewer multiply-accumulates than the dense operation.
        share: part of the dense seconds that is this weight's own; the rest belongs to other weights of the layer.
        untimed: why there are no seconds; multiply-accumulates decide then.
    """

    layer: str
    calls: tuple[str, ...]
    multiple: int
    most: int
    share: float = 1.0
    untimed: str = ""


@dataclass(frozen=True)
class LatencyTable:
    """Measured seconds of every factorized weight of a model; what `merge`, `allocate` and `coverage` take as ``latency``.

    Args:
        backend: what ran the layers.
        threads: CPU threads.
        machine: what they ran on.
        timings: by operation, as text: the layer, its sizes, its input.
        weights: by the names of `coverage`.
        margin: share of the dense seconds that a pair must save, in [0, 1).
        dense_s: seconds of one call of the whole dense network; None where it was not timed.
        dense_untimed: why not.

    Raises:
        SettingError: for a `margin` outside its range.
    """

    backend: Backend
    threads: int
    machine: Mapping[str, str]
    timings: Mapping[str, Timing]
    weights: Mapping[str, TimedWeight]
    margin: float = MARGIN
    dense_s: float | None = None
    dense_untimed: str = ""

    def __post_init__(self) -> None:
        check_words(self)
        if not 0 <= self.margin < 1:
            raise SettingError("LatencyTable", "margin", got=self.margin, rule="in [0, 1)")

    def break_even(self, name: str) -> int:
        """Return the largest rank, a multiple, up to which the pair is faster than dense by the margin; 0 when there is none.

        A pair that takes as many multiply-accumulates as the dense operation is never written, however fast.

        Raises:
            LayerError: for a weight that is not in the table.
        """
        weight = self._weight(name)
        if not weight.calls:
            return weight.most
        most, dense = 0, self._dense(weight)
        for rank in range(weight.multiple, weight.most + 1, weight.multiple):
            if self._pair(weight, rank) > (1 - self.margin) * dense:
                break
            most = rank
        return most

    def seconds(self, name: str, rank: int | None) -> float | None:
        """Return the seconds of one weight for a call of the model: as a pair of `rank`, or dense for None; None if it was not timed."""
        weight = self._weight(name)
        if not weight.calls:
            return None
        dense = self._dense(weight)
        return weight.share * dense + (0.0 if rank is None else self._pair(weight, rank) - dense)

    def multiple(self, name: str) -> int:
        """Return the number that a rank of one weight should be a multiple of."""
        return self._weight(name).multiple

    def limits(self, model: nn.Module) -> dict[str, int]:
        """Return the break-even rank of each factorized weight of a model, by the names of `coverage`.

        Raises:
            LayerError: when the table was made of another model.
        """
        found: dict[str, int] = {}
        for site in sites(model):
            timed, present = self._weight(site.name).layer, describe(site.layer, site.key)
            if timed != present:
                raise LayerError(site.name, f"was timed as {timed} and is {present}", hint=AGAIN)
            found[site.name] = self.break_even(site.name)
        return found

    def verdict(self, name: str, rank: int) -> str:
        """Say what `merge` writes for one weight of `rank`, and why."""
        weight, limit = self._weight(name), self.break_even(name)
        form, sign = ("two layers", "<=") if rank <= limit else ("one dense layer", ">")
        if not weight.calls:
            return f"merges to {form} (rank {rank} {sign} {limit}, by multiply-accumulates: {weight.untimed})"
        dense = self._dense(weight)
        ranks = sorted({rank for call in weight.calls for rank in self.timings[call].ranks if rank <= weight.most})
        if limit == 0:
            best = max(ranks, key=lambda r: dense / self._pair(weight, r), default=None)
            why = f" ({dense / self._pair(weight, best):.2f}x at rank {best})" if best else ""
            return f"dense: no rank is faster than dense on this machine{why}"
        ratio = f"; as two {dense / self._pair(weight, rank):.2f}x as fast" if rank <= weight.most else ""
        return f"merges to {form} (rank {rank} {sign} {limit}{ratio})"

    def to_dict(self) -> dict[str, Any]:
        """Return the table as a dict that `json.dumps` takes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], owner: str = "LatencyTable") -> "LatencyTable":
        """Return the table that `to_dict` described.

        Args:
            fields: plain data.
            owner: named in errors.

        Raises:
            FormatError: when it is not such a dict, or a number is outside its bounds.
        """
        try:
            timings = {str(key): timing_of(entry) for key, entry in fields["timings"].items()}
            weights = {str(name): TimedWeight(**{**entry, "calls": tuple(entry["calls"])}) for name, entry in fields["weights"].items()}
            table = cls(**{**fields, "timings": timings, "weights": weights})
            missing = [call for weight in weights.values() for call in weight.calls if call not in timings]
            wrong = _wrong(table)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(owner, f"is not what LatencyTable.to_dict wrote ({error!r})") from error
        if missing:
            raise FormatError(
                owner, f"holds no timing of {missing[0]!r}", hint="a run on the device that was stopped goes on: start it again"
            )
        if wrong:
            raise FormatError(owner, f"holds {wrong}")
        return table

    def __str__(self) -> str:
        """Describe the device, and for each weight what `merge` writes up to which rank."""
        device = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        whole = self.dense_untimed or f"the dense network takes {1e3 * (self.dense_s or 0):.3f} ms"
        lines = [f"{self.backend}, {self.threads} thread(s), {device}", whole]
        for name, weight in self.weights.items():
            told = (
                weight.untimed
                or f"{1e3 * (self.seconds(name, None) or 0):.3f} ms dense, a pair is faster up to rank {self.break_even(name)}"
            )
            lines.append(f"{name or '(model)'}: {told}")
        return "\n".join(lines)

    def _weight(self, name: str) -> TimedWeight:
        if name not in self.weights:
            raise LayerError(name, "is not in the latency table", hint=AGAIN)
        return self.weights[name]

    def _dense(self, weight: TimedWeight) -> float:
        return sum(self.timings[call].dense_s for call in weight.calls)

    def _pair(self, weight: TimedWeight, rank: int) -> float:
        return sum(self.timings[call].at(rank) for call in weight.calls)


def _wrong(table: LatencyTable) -> str:
    """Return what of a table from a file is outside its bounds."""
    seconds = [s for timing in table.timings.values() for s in (timing.dense_s, *timing.pair_s)] + [table.dense_s or 1.0]
    if table.backend not in get_args(Backend) or type(table.threads) is not int or table.threads < 1:
        return f"an unknown backend or number of threads ({table.backend!r}, {table.threads!r})"
    if not table.machine or not all(isinstance(word, str) for pair in table.machine.items() for word in pair):
        return "no name of the device that was timed"
    if not all(0 < s < LONGEST_S for s in seconds):
        return f"seconds outside (0, {LONGEST_S:g})"
    if any(tuple(sorted(set(timing.ranks))) != timing.ranks or min(timing.ranks, default=1) < 1 for timing in table.timings.values()):
        return "ranks that do not ascend from 1 on"
    for name, weight in table.weights.items():
        if type(weight.multiple) is not int or type(weight.most) is not int or not (weight.multiple >= 1 and 0 <= weight.most <= LARGEST):
            return f"impossible ranks of {name!r}"
        if not 0 <= weight.share <= 1:
            return f"a share outside [0, 1] of {name!r}"
    return ""


AGAIN = "make the table of this model: latency_table(model, inputs)"


def describe(layer: FactorizedLayer, weight: str) -> str:
    """Return a layer's kind, settings, sizes, dtype and device as text; its rank does not matter."""
    factors = layer.factors_of(weight)
    out, in_ = factors.shape
    sizes = f"{factors.blocks}x{out}x{in_} {factors.dtype} {factors.device.type}".replace("torch.", "")
    return f"{layer.dense_kind.__name__}({layer.extra_repr()}) {weight} {sizes}"
