"""`verdict`: what a smaller network is worth beside the dense one, in words."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from spectrim.metrics.measurement import Measurement
from spectrim.plain.recurrent import PlainRecurrent

CHANCE = 1.25
"""A dense network is taken to be at chance up to this multiple of the accuracy of a constant answer, and within its standard errors."""


UNSTEADY = 0.5
"""Seconds whose interquartile range is a larger share of their median are not compared: other work ran on the machine."""


@dataclass(frozen=True)
class Verdict:
    """What a smaller network is worth, in words; prints as one line.

    Attributes:
        size: how much smaller, in bytes.
        speed: how much faster where it was measured, or that this cannot be told.
        quality: whether accuracy (or without one the loss) is level, better or worse.
        next: what to try.
        warnings: what should not be overlooked: slower than dense, worse than its cut, dense at chance.
    """

    size: str
    speed: str
    quality: str
    next: str
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        speed = self.speed[:1].lower() + self.speed[1:]
        parts = [f"{self.size}; {speed}" if speed else self.size, self.quality, *(f"Warning: {text}" for text in self.warnings)]
        return ". ".join(part for part in [*parts, f"Next: {self.next}"] if part) + "."

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Verdict":
        """Return the verdict that `to_dict` described; a TypeError for other fields."""
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else str(value) for name, value in fields.items()}
        return cls(**values)


def verdict(
    dense: Measurement,
    final: Measurement,
    *,
    loops: bool = False,
    trained: bool = False,
    cut: str = "",
    split: str = "validation split",
) -> Verdict:
    """Compare a network with the dense one it was made from.

    A difference in accuracy is called level up to the larger one of the two standard errors ``sqrt(p (1 - p) / n)``; a difference in loss
    up to the larger one of the standard errors over batches. Seconds are called different where the medians differ by more than the
    larger one of the two interquartile ranges, and neither range is more than half of its median.

    Args:
        dense: its measurement.
        final: of the smaller network, timed beside it.
        loops: whether the smaller network has recurrent layers that left torch's fused kernel.
        trained: whether it was fine-tuned.
        cut: ``better`` where fine-tuning ended worse than the cut, ``kept`` where the cut was kept for that reason.
        split: what accuracy and loss were measured on.

    Examples:
        >>> dense = Measurement(1000, 900, 4000, accuracy=0.9, targets=100, latency_s=2e-3, latency_iqr_s=1e-5, batch=1, threads=1)
        >>> final = Measurement(400, 300, 1600, accuracy=0.88, targets=100, latency_s=1e-3, latency_iqr_s=1e-5, batch=1, threads=1)
        >>> found = verdict(dense, final)
        >>> print(found.size)
        2.50x smaller (4,000 to 1,600 B)
        >>> print(found.speed)
        2.00x faster here (2.000 to 1.000 ms, batch 1, 1 thread)
        >>> print(found.quality)
        Accuracy level (90.00 to 88.00 %, within the standard error of 3.2 points on the validation split)
    """
    speed, slower = _speed(dense, final)
    quality, worse = _quality(dense, final, split)
    warnings = []
    chance = _at_chance(dense)
    if chance:
        reached, constant = (f"{100 * (value or 0):.1f} %" for value in (dense.accuracy, dense.chance))
        warnings.append(f"the dense network is at chance ({reached}; a constant answer gives {constant})")
    if slower:
        why = ": its recurrent layers run step by step, outside torch's fused kernel" if loops else ""
        warnings.append(f"slower than the dense network here{why}")
    if (final.coded_bytes or final.size_bytes) > dense.size_bytes:
        warnings.append("larger than the dense network")
    if cut:
        warnings.append("fine-tuning ended worse than the cut" + (", and the cut was kept" if cut == "kept" else ""))
    told = _next(
        bytes_left=_bytes_left(dense, final),
        chance=chance, slower=slower, level_speed=speed.startswith("Speed"),
        unsteady=speed.startswith("Speed not measurable"), loops=loops, worse=worse, trained=trained, lost=bool(cut),
        coded=final.coded_bytes is not None,
    )  # fmt: skip
    return Verdict(_size(dense, final), speed, quality, told, tuple(warnings))


def _size(dense: Measurement, final: Measurement) -> str:
    before, after = dense.size_bytes, final.size_bytes
    if final.coded_bytes:
        parts = f"values {final.data_bytes:,}, positions of zeros {final.index_bytes:,}"
        return f"{before / final.coded_bytes:.2f}x smaller as a coded file ({before:,} to {final.coded_bytes:,} B: {parts})"
    mib = max(before, after) >= 2**19
    texts = f"({before / 2**20:.2f} to {after / 2**20:.2f} MiB)" if mib else f"({before:,} to {after:,} B)"
    if not after or f"{before / after:.2f}" == "1.00":
        return f"As large as the dense network {texts}"
    return f"{before / after:.2f}x smaller {texts}" if after < before else f"{after / before:.2f}x larger {texts}"


def _speed(dense: Measurement, final: Measurement) -> tuple[str, bool]:
    """Return the comparison of seconds in words, empty where there is none, and whether the network is slower."""
    if not (dense.latency_s and final.latency_s) or (dense.batch, dense.threads) != (final.batch, final.threads):
        return "", False
    plural = "" if dense.threads == 1 else "s"
    texts = f"{1e3 * dense.latency_s:,.3f} to {1e3 * final.latency_s:,.3f} ms, batch {dense.batch}, {dense.threads} thread{plural}"
    spread = max(dense.latency_iqr_s or 0.0, final.latency_iqr_s or 0.0)
    steady = all((m.latency_iqr_s or 0.0) <= UNSTEADY * (m.latency_s or 0.0) for m in (dense, final))
    if not steady:
        return f"Speed not measurable, other work ran on this machine ({texts}; interquartile range {1e3 * spread:,.3f} ms)", False
    if abs(dense.latency_s - final.latency_s) <= spread:
        return f"Speed not measurably different here ({texts}; interquartile range {1e3 * spread:,.3f} ms)", False
    ratio = dense.latency_s / final.latency_s
    return (f"{ratio:.2f}x faster here ({texts})", False) if ratio > 1 else (f"{1 / ratio:.2f}x slower here ({texts})", True)


def accuracy_error(measured: Measurement) -> float | None:
    """Return the standard error of an accuracy, ``sqrt(p (1 - p) / n)``; None without the number of labels."""
    if measured.accuracy is None or not measured.targets:
        return None
    return math.sqrt(measured.accuracy * (1 - measured.accuracy) / measured.targets)


def _quality(dense: Measurement, final: Measurement, split: str) -> tuple[str, bool]:
    """Return the comparison of accuracies, or without them of losses, and whether the network is worse."""
    if dense.accuracy is not None and final.accuracy is not None:
        errors = [error for error in (accuracy_error(dense), accuracy_error(final)) if error is not None]
        points, error = 100 * (final.accuracy - dense.accuracy), 100 * max(errors, default=0.0)
        texts = f"{100 * dense.accuracy:.2f} to {100 * final.accuracy:.2f} %"
        unit, name, more, less = " points", "Accuracy", "higher", "lower"
        change, shown = points, f"{abs(points):.2f}"
    elif dense.loss is not None and final.loss is not None:
        error = max(dense.loss_error or 0.0, final.loss_error or 0.0)
        texts, change = f"{dense.loss:.4f} to {final.loss:.4f}", dense.loss - final.loss
        unit, name, more, less, shown = "", "Loss", "lower", "higher", f"{abs(change):.4f}"
    else:
        return "", False
    within = f"the standard error of {error:.{1 if unit else 4}f}{unit} on the {split}"
    if abs(change) <= error or change == 0:
        return f"{name} level ({texts}, within {within})" if error else f"{name} level ({texts})", False
    beyond = f", beyond {within}" if error else ""
    return f"{name} {shown}{unit} {more if change > 0 else less} ({texts}{beyond})", change < 0


def worse_than(found: Measurement, before: Mapping[str, float], *, by: Mapping[str, float] | None = None) -> bool:
    """Return whether a network's accuracy is lower than another's, or its loss higher at a level one; beyond the standard errors.

    Args:
        found: the measurement of the network.
        before: ``loss``, and ``accuracy`` where there is one, of the other network.
        by: the scores of the network on the data of `before`, where those of the measurement are on other data.
    """
    scores = {"loss": found.loss, "accuracy": found.accuracy} if by is None else by
    accuracy, loss = scores.get("accuracy"), scores.get("loss")
    if accuracy is not None and "accuracy" in before:
        change = accuracy - before["accuracy"]
        if abs(change) > (accuracy_error(found) or 0.0):
            return change < 0
    return loss is not None and loss > before["loss"] + (found.loss_error or 0.0)


def _at_chance(dense: Measurement) -> bool:
    if dense.accuracy is None or dense.chance is None:
        return False
    return dense.accuracy <= min(dense.chance + 2 * (accuracy_error(dense) or 0.0), CHANCE * dense.chance)


def _bytes_left(dense: Measurement, final: Measurement) -> str:
    """Return the budget that limits bytes as well, where multiply-accumulates are far fewer and bytes are not; else nothing."""
    if not (dense.macs and final.macs and dense.size_bytes) or final.coded_bytes is not None:
        return ""
    macs, kept = final.macs / dense.macs, final.size_bytes / dense.size_bytes
    return f"Budget(macs={macs:.2g}, size={macs:.2g}), which limits the bytes, too" if macs < 0.95 and kept > 1.3 * macs else ""


def _next(*, bytes_left: str, **told: bool) -> str:
    """Return what to try."""
    by_clock = "a budget by the clock: latency_table and Budget(latency=0.8), or spectrim compress --latency 0.8"
    if told["chance"]:
        return "train the dense network first; compressing it says nothing yet"
    if told["slower"] and told["loops"]:
        return f"leave the recurrent layers out with where=, or {by_clock}"
    if told["slower"]:
        return by_clock
    if told["lost"]:
        return "a lower learning rate or more data for fine-tuning"
    if told["coded"]:
        return "more coded_bytes, or examples= for a larger calibration set" if told["worse"] else "fewer coded_bytes, or pack(model, path)"
    if told["worse"]:
        more = "more epochs" if told["trained"] else "fine-tuning (epochs=)"
        return f"{more}, a larger budget, or Budget(max_drop=1.0) for the smallest network at most 1 point worse"
    smaller = bytes_left or "a smaller budget"
    if told["unsteady"]:
        return f"measure again on an idle machine; {smaller}, or export it (spectrim.export, spectrim export)"
    return f"{by_clock}; or {smaller}" if told["level_speed"] else f"{smaller}, or export it (spectrim.export, spectrim export)"


def has_loops(network: nn.Module) -> bool:
    """Return whether a merged network has recurrent layers that run time steps in a Python loop, outside torch's fused kernel."""
    return any(isinstance(module, PlainRecurrent) and module.loops for module in network.modules())
