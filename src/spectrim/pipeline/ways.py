"""How `compress` chooses ranks and factors."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from spectrim.budget.distortion.energy import SpectralEnergy, WhitenedEnergy
from spectrim.budget.distortion.loss import LossSensitivity
from spectrim.protocols import Importance
from spectrim.surgery.calibrate import Calibration

Cut = Literal["auto", "plain", "whitened", "sensitive", "mixed"]


LEVEL = 1.25
"""With training to come, mixed ranks may start this much worse than the best of the other cuts.

Where training has far to go, from a loss this much higher, unless sensitive ranks start best: in trials mixed ones ended above whitened
ones on ResNet-8 and ResNet-20, and level with or below sensitive ones on a language model. Nearer, with this much more added to the dense
network's loss: on LeNet-5 they ended above sensitive ones. What the loss hardly feels when it is cut can still be what training would have
used.
"""


def way_to_cut(kind: str, moments: Calibration | None) -> tuple[Importance | None, Calibration | None]:
    """Return what `allocate` and `prune` take for one way to cut: the importance and the calibration.

    Args:
        kind: ``plain``, ``whitened``, ``sensitive`` or ``mixed``.
        moments: of the network that is cut, with a loss for ``sensitive``; ``plain`` needs none.
    """
    if kind == "plain" or moments is None:
        return None, None
    if kind == "sensitive":
        return LossSensitivity(moments), moments
    moments = replace(moments, outputs={}, slopes={})
    whitened = WhitenedEnergy(moments)
    return (_Mean((SpectralEnergy(), whitened)) if kind == "mixed" else whitened), moments


@dataclass(frozen=True)
class _Mean:
    """The mean of several importances of one unit."""

    of: tuple[Importance, ...]

    def __call__(self, model: nn.Module, /) -> dict[str, Tensor]:
        found = [importance(model) for importance in self.of]
        return {name: torch.stack([torch.as_tensor(harms[name]).cpu() for harms in found]).mean(0) for name in found[0]}
