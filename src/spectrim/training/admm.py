"""`ADMM`: training toward any set that has a projection."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.penalties.sums import total
from spectrim.protocols import Change, Projection
from spectrim.training.holding import check_patterns, chosen, held_parameters, on_ramp, project, put_back


@dataclass(frozen=True)
class Pull:
    """``rho / 2 * sum_l ||W_l - Z_l + U_l||^2``: the quadratic term of ADMM in its scaled form.

    Args:
        rho: strength, > 0.
        copies: ``Z``, by the name of the parameter: members of the sets.
        duals: ``U``, the sums of past differences.
    """

    rho: float
    copies: Mapping[str, Tensor]
    duals: Mapping[str, Tensor]

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the term of all weights, a scalar."""
        weights = held_parameters(model, self.copies)
        return 0.5 * self.rho * total(model, [(w - self.copies[n] + self.duals[n]).square().sum() for n, w in weights.items()])


@dataclass(frozen=True)
class ADMM:
    """Pull weights toward sets of pruned or rounded weights while they learn; then project, and train what is free.

    Splits ``min f(W), W in S`` into three steps: training with the `Pull` for a while; ``Z = P(W + U)``, on copies; ``U = U + W - Z``.
    After each of these rounds ``rho`` grows (and ``U`` shrinks by the same factor, so that the dual variables ``rho U`` stay), until the
    relative primal residual ``||W - Z|| / ||W||`` of every weight is below a bound. Then, and at the `end` at the latest, the weights are
    projected. From there on zeros stay zero, and what is rounded stays as it is: weights, gradients and the optimizer's moments are held
    after each step until training ends, and nothing is left behind in the model.

    A `Course`: give it to ``fit(..., courses=[...])``. The pull has a separate column in the log, ``ADMM``; ``ADMM residual`` and ``ADMM
    rho`` are those of the last round.

    Args:
        projections: by pattern: a glob over names of parameters or modules; the first one that means a weight counts. ``"*"`` means all
            weights, not vectors: these need a pattern that ends on their name, such as ``"*.S"`` for singular values.
        rho: strength to begin with, > 0.
        growth: factor of the strength after each round, >= 1.
        most: largest strength.
        rounds: number of rounds from begin to end, >= 1.
        begin: when it begins, as a fraction of training in [0, 1).
        end: when the weights are projected at the latest, in (begin, 1].
        ramp: share of the rounds, in [0, 1], in which the counts of pruning projections fall to the final ones, along the cubic ramp of
            `Gradual`; 0 for the final ones from the beginning. It does not end within the ramp.
        residual: bound of the relative primal residual, > 0. A warning says where it was not reached.

    Raises:
        SettingError: for a value outside its range, or, when training starts, a pattern that means no weight.

    Examples:
        >>> from spectrim.projections import Levels, TopK
        >>> course = ADMM({"0": TopK(0.25), "*": Levels(3)}, rounds=2, end=1.0)
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        >>> memory = course.start(model, torch.zeros(1, 8), 10)
        >>> {name: int(copy.count_nonzero()) for name, copy in memory["copies"].items()}["0.weight"]
        16

    Source: Ren et al., ADMM-NN, arXiv 1812.11677; Boyd et al., Distributed Optimization and Statistical Learning via ADMM, 2011, section
    3.4.1, for the change of ``U`` with ``rho``, and section 9 for sets that are not convex.
    Deviation: the published code leaves ``U`` as it is when ``rho`` grows.
    """

    projections: Mapping[str, Projection]
    rho: float = 5e-3
    growth: float = 1.5
    most: float = 1.0
    rounds: int = 14
    begin: float = 0.0
    end: float = 0.6
    ramp: float = 0.0
    residual: float = 0.02
    penalizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_patterns("ADMM", self.projections, "a projection, such as TopK(0.1)", "stored_bits")
        if not 0 < self.rho <= self.most < math.inf:
            raise SettingError("ADMM", "rho and most", got=(self.rho, self.most), rule="finite, 0 < rho <= most")
        if not 1 <= self.growth < math.inf:
            raise SettingError("ADMM", "growth", got=self.growth, rule="a finite number >= 1")
        if isinstance(self.rounds, bool) or self.rounds < 1:
            raise SettingError("ADMM", "rounds", got=self.rounds, rule="an integer >= 1")
        if not 0 <= self.begin < self.end <= 1:
            raise SettingError("ADMM", "begin and end", got=(self.begin, self.end), rule="0 <= begin < end <= 1")
        if not 0 <= self.ramp <= 1:
            raise SettingError("ADMM", "ramp", got=self.ramp, rule="a share of the rounds in [0, 1]")
        if not 0 < self.residual < 1:
            raise SettingError("ADMM", "residual", got=self.residual, rule="a number in (0, 1)")

    def start(self, model: nn.Module, inputs: Any, steps: int) -> dict[str, Any]:
        """Return the memory before the first step: copies that are projected weights, and dual variables of zero, see `Course`."""
        chosen("ADMM", model, self.projections)
        held: dict[str, Any] = {"rho": self.rho, "round": 0, "residuals": {}, "done": False}
        memory = held | {"copies": {}, "duals": {}, "free": {}, "fixed": {}}
        if self._span(steps)[0] == 0:
            self._begin(model, memory)
        return memory

    def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any]) -> Change:
        """Return the pull of this step; none before the begin and after the projection, see `Course`."""
        if memory["done"] or not memory["copies"]:
            return Change()
        return Change(penalty=Pull(memory["rho"], memory["copies"], memory["duals"]))

    def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any]) -> None:
        """End a round where one is due; after the projection put back what is not free, see `Course`."""
        first, last = self._span(steps)
        finished = step + 1
        if memory["done"]:
            put_back(model, memory["free"], memory["fixed"])
        elif finished == first:
            self._begin(model, memory)
        elif finished in (first + round((last - first) * k / self.rounds) for k in range(1, self.rounds + 1)):
            self._round(model, memory)
            ramped = memory["round"] >= self.ramp * self.rounds
            if finished >= last or (ramped and max(memory["residuals"].values()) <= self.residual):
                self._finish(model, memory)

    def free(self, memory: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return which entries may move, by the name of the parameter; all of the others may."""
        entries: Mapping[str, Tensor] = memory["free"]
        return entries

    def noted(self, memory: Mapping[str, Any]) -> dict[str, float]:
        """Return what the log of an epoch gets: the largest residual of the last round, and the strength."""
        residuals = memory["residuals"]
        return ({"residual": max(residuals.values())} if residuals else {}) | {"rho": memory["rho"]}

    def _span(self, steps: int) -> tuple[int, int]:
        """Return how many steps are finished when it begins and when it ends."""
        first = round(steps * self.begin)
        return first, max(first + 1, round(steps * self.end))

    def _given(self, model: nn.Module, weights: Mapping[str, Tensor], finished: int) -> dict[str, Projection]:
        """Return the projection of each weight after some rounds, on the ramp."""
        given = chosen("ADMM", model, self.projections)
        share = min(1.0, (finished + 1) / (self.ramp * self.rounds)) if self.ramp else 1.0
        return {name: on_ramp(projection, weights[name], share) for name, projection in given.items()}

    def _begin(self, model: nn.Module, memory: dict[str, Any]) -> None:
        """Make the first copies, and dual variables of zero."""
        weights = _weights(model)
        memory["copies"] = {name: projection(weights[name]) for name, projection in self._given(model, weights, 0).items()}
        memory["duals"] = {name: torch.zeros_like(copy) for name, copy in memory["copies"].items()}

    def _round(self, model: nn.Module, memory: dict[str, Any]) -> None:
        """Project copies, update the dual variables, measure the residuals and let the strength grow."""
        weights = _weights(model)
        copies, duals = {}, {}
        for name, projection in self._given(model, weights, memory["round"] + 1).items():
            moved = weights[name] + memory["duals"][name]
            copies[name] = projection(moved)
            duals[name] = moved - copies[name]
            distance, size = (weights[name] - copies[name]).norm(), weights[name].norm()
            memory["residuals"][name] = float(distance / size.clamp(min=1e-30))
        rho = min(self.most, self.growth * memory["rho"])
        memory["duals"] = {name: dual * (memory["rho"] / rho) for name, dual in duals.items()}
        memory["copies"], memory["rho"], memory["round"] = copies, rho, memory["round"] + 1

    def _finish(self, model: nn.Module, memory: dict[str, Any]) -> None:
        """Project the weights and forget copies and dual variables."""
        project(model, chosen("ADMM", model, self.projections), memory)
        memory["done"], memory["copies"], memory["duals"] = True, {}, {}
        above = {name: round(value, 3) for name, value in memory["residuals"].items() if value > self.residual}
        if above:
            what = f"ADMM: after {memory['round']} rounds the relative primal residual is above {self.residual}: {above}"
            warnings.warn(f"{what}; the projection changes these weights by as much; try more rounds, or a larger growth", stacklevel=2)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters, in float32 at least: a projection never sees the live weights."""
    named = model.named_parameters()
    return {name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in named if p.requires_grad}
