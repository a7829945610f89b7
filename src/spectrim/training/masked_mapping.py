"""`MaskedMapping`: weights move to their levels a share at a time, those nearest first, while the others train."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.projections import Levels, LevelTable
from spectrim.protocols import Change
from spectrim.training.holding import check_patterns, chosen, put_back


@dataclass(frozen=True)
class MaskedMapping:
    """Put weights on the levels of a device round by round: the nearest ones are set and held, the others train on and make up for it.

    Round ``k`` of `rounds` leaves the share ``(1 - k / rounds)^2`` of the weights free; after the last one every weight is on a level. The
    step of each weight's levels is the best one when it begins, and stays. Weights that are zero then are pruned ones and stay zero.

    A `Course`: give it to ``fit(..., courses=[...])``; the share of weights that are free is in the log, ``MaskedMapping free``.

    Args:
        levels: by pattern, see `ADMM`: symmetric `Levels`, with one step for each tensor.
        begin: when the first weights are set, as a fraction of training in [0, 1).
        end: when the last ones are, in (begin, 1].
        rounds: >= 1.

    Raises:
        SettingError: for a value outside its range, or, when training starts, a pattern that means no weight.

    Examples:
        >>> layer = nn.Linear(4, 4)
        >>> course = MaskedMapping({"*": Levels(3)}, rounds=1)
        >>> memory = course.start(layer, torch.zeros(1, 4), 2)
        >>> course.after(layer, 1, 2, memory)
        >>> len(layer.weight.detach().abs().unique()) <= 4
        True

    Source: masked mapping as in Yuan et al., ISLPED 2019, read in second-hand accounts; the order, the nearest first, as in Zhou et al.,
    arXiv 1702.03044, where the largest are first.
    Deviation: the shares of the rounds are ours.
    """

    levels: Mapping[str, Levels]
    begin: float = 0.0
    end: float = 0.75
    rounds: int = 8

    def __post_init__(self) -> None:
        check_patterns("MaskedMapping", self.levels, "symmetric Levels, such as Levels(5)", "table")
        for pattern, levels in self.levels.items():
            if levels.kind != "symmetric" or levels.per != "tensor":
                raise SettingError(
                    "MaskedMapping", f"levels[{pattern!r}]", got=levels, rule="symmetric Levels with one step for each tensor"
                )
        if not 0 <= self.begin < self.end <= 1:
            raise SettingError("MaskedMapping", "begin and end", got=(self.begin, self.end), rule="0 <= begin < end <= 1")
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise SettingError("MaskedMapping", "rounds", got=self.rounds, rule="an integer >= 1")

    def start(self, model: nn.Module, inputs: Any, steps: int) -> dict[str, Any]:
        """Return the memory before the first step, see `Course`."""
        chosen("MaskedMapping", model, self.levels)
        return {"tables": {}, "free": {}, "fixed": {}, "live": {}, "round": 0}

    def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any]) -> Change:
        """Change nothing, see `Course`."""
        return Change()

    def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any]) -> None:
        """Put back what is set, and set more where a round is due, see `Course`."""
        put_back(model, memory["free"], memory["fixed"])
        shares = ((k, self.begin + (self.end - self.begin) * k / self.rounds) for k in range(1, self.rounds + 1))
        due = max((k for k, share in shares if max(1, round(steps * share)) <= step + 1), default=0)
        if due > memory["round"]:
            self._set(model, memory, due)

    def free(self, memory: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return which entries may move, by the name of the parameter; all of the others may."""
        entries: Mapping[str, Tensor] = memory["free"]
        return entries

    def noted(self, memory: Mapping[str, Any]) -> dict[str, float]:
        """Return what the log of an epoch gets: the share of the weights that are not pruned which are free."""
        free, live = (sum(memory[name].values()) for name in ("counts", "live")) if memory["round"] else (0, 0)
        return {"free": free / live} if live else {}

    @torch.no_grad()
    def _set(self, model: nn.Module, memory: dict[str, Any], round_: int) -> None:
        """Set those weights on their levels that are nearest, so that the share of this round is left."""
        parameters, counts = dict(model.named_parameters()), {}
        for name, levels in chosen("MaskedMapping", model, self.levels).items():
            weight = parameters[name].detach()
            if name not in memory["tables"]:
                memory["tables"][name], memory["live"][name] = list(levels.table(weight).values), int(weight.count_nonzero())
            goal = LevelTable(tuple(memory["tables"][name]))(weight)
            held = ~memory["free"][name] if name in memory["free"] else weight == 0
            counts[name] = int(memory["live"][name] * (1 - round_ / self.rounds) ** 2)
            distance = torch.where(held, -1.0, (weight - goal).abs()).flatten()
            free = torch.zeros_like(distance, dtype=torch.bool)
            free[distance.topk(min(counts[name], int((~held).sum()))).indices] = True
            memory["free"][name] = free.reshape(weight.shape)
            memory["fixed"][name] = torch.where(memory["free"][name] | held, weight, goal)
            parameters[name].copy_(torch.where(memory["free"][name], weight, memory["fixed"][name]))
        memory["round"], memory["counts"] = round_, counts
