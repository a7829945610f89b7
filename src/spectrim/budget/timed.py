"""`LatencyTable`: what was timed, and what follows for ranks."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from spectrim.budget.latency_cache import timing_of
from spectrim.budget.timing import Backend, Timing
from spectrim.checks.words import check_words
from spectrim.errors import FormatError, LayerError, SettingError
from spectrim.layers import FactorizedLayer, sites

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
    def from_dict(cls, fields: Mapping[str, Any]) -> "LatencyTable":
        """Return the table that `to_dict` described.

        Raises:
            FormatError: when it is not such a dict.
        """
        try:
            timings = {key: timing_of(entry) for key, entry in fields["timings"].items()}
            weights = {name: TimedWeight(**{**entry, "calls": tuple(entry["calls"])}) for name, entry in fields["weights"].items()}
            table = cls(**{**fields, "timings": timings, "weights": weights})
            missing = [call for weight in weights.values() for call in weight.calls if call not in timings]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError("LatencyTable", f"is not what to_dict wrote ({error!r})") from error
        if missing:
            raise FormatError("LatencyTable", f"holds no timing of {missing[0]!r}")
        return table

    def _weight(self, name: str) -> TimedWeight:
        if name not in self.weights:
            raise LayerError(name, "is not in the latency table", hint=AGAIN)
        return self.weights[name]

    def _dense(self, weight: TimedWeight) -> float:
        return sum(self.timings[call].dense_s for call in weight.calls)

    def _pair(self, weight: TimedWeight, rank: int) -> float:
        return sum(self.timings[call].at(rank) for call in weight.calls)


AGAIN = "make the table of this model: latency_table(model, inputs)"


def describe(layer: FactorizedLayer, weight: str) -> str:
    """Return a layer's kind, settings, sizes, dtype and device as text; its rank does not matter."""
    factors = layer.factors_of(weight)
    out, in_ = factors.shape
    sizes = f"{factors.blocks}x{out}x{in_} {factors.dtype} {factors.device.type}".replace("torch.", "")
    return f"{layer.dense_kind.__name__}({layer.extra_repr()}) {weight} {sizes}"
