"""How `compress` chooses among the ways to cut."""

from typing import Literal

from spectrim.budget.cut_to import CutNetwork

Cut = Literal["auto", "plain", "whitened", "sensitive", "mixed", "both", "curved"]
"""What ``cut=`` takes: a name in `spectrim.budget.ways.WAYS`, or the choice among them."""


LEVEL = 1.25
"""With training to come, mixed ranks may start this much worse than the best of the other cuts.

With a large loss gap, from a loss this much higher, unless sensitive ranks start best: in trials mixed ones ended above whitened ones on
ResNet-8 and ResNet-20, and level with or below sensitive ones on a language model. With a small one, with this much more added to the dense
network's loss: on LeNet-5 they ended above sensitive ones. What hardly changes the loss when it is cut can still be what training would
have used.
"""


def allowed_for_mixed(best: CutNetwork, dense: float, far: bool) -> float:
    """Return the largest loss from which mixed ranks may start to be chosen instead of the best start.

    Args:
        best: the best of the other cuts.
        dense: loss of the dense network.
        far: whether the loss gap of that cut is large.
    """
    loss = best.last["loss"]
    if not far:
        return max(loss, dense + LEVEL * (loss - dense))
    return loss if best.way == "sensitive" else LEVEL * loss
