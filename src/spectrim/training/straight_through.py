"""`StraightThrough`: gradients at rounded or pruned weights move the weights that are rounded or pruned."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.protocols import Change, Projection
from spectrim.training.holding import check_patterns, chosen, held_parameters, project, put_back


@dataclass(frozen=True)
class StraightThrough:
    """Train weights by the gradients at their projections: the model holds the projected ones in every step.

    The memory holds the weights that learn. After each optimizer step the change of the projected weights is added to them, and the model
    gets their projection. Values move between levels, and pruned ones may come back, until the `end`; from there on zeros stay zero,
    the other values that pruning kept are trained, and what is rounded stays as it is, as with `ADMM`.

    A `Course`: give it to ``fit(..., courses=[...])``.

    Args:
        projections: by pattern, see `ADMM`; computed once in each step.
        begin: when it begins, as a fraction of training in [0, 1).
        end: when the projections are final, in (begin, 1].

    Raises:
        SettingError: for a value outside its range, or, when training starts, a pattern that means no weight.

    Examples:
        >>> from spectrim.projections import Levels
        >>> StraightThrough({"*": Levels(4, per="channel")}, end=0.9).end
        0.9

    Source: Courbariaux, Bengio and David, arXiv 1511.00363 (BinaryConnect); for pruning Guo, Yao and Chen, arXiv 1608.04493.
    Deviation: weights are not clipped; a decoupled weight decay of the optimizer is that of the projected weights.
    """

    projections: Mapping[str, Projection]
    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_patterns("StraightThrough", self.projections, "a projection, such as Levels(4)", "stored_bits")
        if not 0 <= self.begin < self.end <= 1:
            raise SettingError("StraightThrough", "begin and end", got=(self.begin, self.end), rule="0 <= begin < end <= 1")

    def start(self, model: nn.Module, inputs: Any, steps: int) -> dict[str, Any]:
        """Return the memory before the first step, see `Course`."""
        chosen("StraightThrough", model, self.projections)
        return {"learning": {}, "shown": {}, "done": False, "free": {}, "fixed": {}}

    def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any]) -> Change:
        """Change nothing, see `Course`."""
        return Change()

    def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any]) -> None:
        """Add the step to the weights that learn, and show their projection; at the end project for good, see `Course`."""
        first, last = max(1, round(steps * self.begin)), round(steps * self.end)
        if memory["done"]:
            put_back(model, memory["free"], memory["fixed"])
        elif step + 1 >= first:
            self._show(model, memory)
            if step + 1 >= last:
                project(model, chosen("StraightThrough", model, self.projections), memory)
                memory["done"], memory["learning"], memory["shown"] = True, {}, {}

    def free(self, memory: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return which entries may move, by the name of the parameter; all of the others may."""
        entries: Mapping[str, Tensor] = memory["free"]
        return entries

    @torch.no_grad()
    def _show(self, model: nn.Module, memory: dict[str, Any]) -> None:
        parameters = dict(model.named_parameters())
        held_parameters(model, memory["shown"])
        learning, shown = {}, {}
        for name, projection in chosen("StraightThrough", model, self.projections).items():
            weight = parameters[name].detach()
            moved = weight.clone()
            if name in memory["learning"]:
                moved = memory["learning"][name] + (weight - memory["shown"][name])
            learning[name], shown[name] = moved, projection(moved)
            parameters[name].copy_(shown[name])
        memory["learning"], memory["shown"] = learning, shown
