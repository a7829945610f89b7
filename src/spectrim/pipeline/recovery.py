"""A short recovery of each candidate cut, after which `compress` compares them."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn

from spectrim.protocols import Penalty
from spectrim.surgery.balance import balanced
from spectrim.surgery.exchange import duplicate
from spectrim.training.distillation import Distillation, Loss
from spectrim.training.fit import fit
from spectrim.training.tuning import Tuning


@dataclass
class Recovery:
    """Trains a copy of a network for some steps, as fine-tuning will, in a whole cycle of its schedule.

    Args:
        steps: of the optimizer, >= 1.
        loss: of the fine-tuning, as what follows.
        tuning: with the optimizer.
        penalties: added to the loss.
        teacher: None for none.
        batches: of the training split, as many as the steps take or all there are; they are taken again where they are fewer.
        chosen: whether the teacher was chosen for a large loss gap, and so teaches no candidate with a small one.

    Source: candidates are compared after distillation, as the order changes by it, in NVIDIA's Model Optimizer.
    """

    steps: int
    loss: Loss
    tuning: Tuning
    penalties: Sequence[Penalty]
    teacher: Distillation | None
    batches: Sequence[Any]
    chosen: bool

    def __call__(self, low: nn.Module, far: bool) -> nn.Module:
        """Return a trained copy; the network, and the random numbers that follow, are left as they are.

        Args:
            low: factorized, and cut.
            far: whether its loss gap is large.
        """
        copy, tuning = duplicate(low), replace(self.tuning.with_schedule(), steps_per_epoch=None, keep_best=False, compiled=False)
        batches = list(islice(cycle(self.batches), self.steps * tuning.accumulate))
        teacher = self.teacher if far or not self.chosen else None
        devices = {parameter.device for parameter in copy.parameters() if parameter.is_cuda}
        with torch.random.fork_rng(sorted(devices, key=str)), nullcontext() if self.penalties else balanced(copy):
            fit(
                copy, batches, self.loss, None, 1,
                tuning=tuning, penalties=self.penalties, lessons=[] if teacher is None else [teacher], progress=False,
            )  # fmt: skip
        return copy
