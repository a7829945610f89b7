"""The verdict of a run, by its measurements and the numbers of its stages."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from spectrim.metrics.measurement import Measurement
from spectrim.metrics.verdict import Verdict, has_loops, verdict, worse_than


def verdict_of_run(measured: Mapping[str, Measurement], final: nn.Module, numbers: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """Return the verdict on the final network of a run.

    Args:
        measured: ``dense`` and ``final``, on the test split.
        final: the merged network.
        numbers: of the stages.
    """
    cut, tuned = numbers["3-prune"], numbers["4-finetune"]
    trained = bool(tuned.get("epochs"))
    lost = trained and worse_than(measured["final"], cut.get("val") or cut["val_cut"], by=tuned["val"])
    return verdict(
        measured["dense"], measured["final"], loops=has_loops(final), trained=trained, cut="better" if lost else "", split="test split"
    )
