"""`OneShot`, `Gradual` and `Hold`: pruning at once or step by step, and keeping what is zero at zero."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.protocols import Change, Projection
from spectrim.training.holding import check_patterns, chosen, on_ramp, project, put_back


def _entries(memory: Mapping[str, Any]) -> Mapping[str, Tensor]:
    entries: Mapping[str, Tensor] = memory["free"]
    return entries


@dataclass(frozen=True)
class OneShot:
    """Project weights once, then train what is free: magnitude pruning for `TopK`, followed by masked retraining.

    Zeros stay zero, and what is rounded stays as it is: weights, gradients and the optimizer's moments are held after each step until
    training ends. A `Course`: give it to ``fit(..., courses=[...])``.

    Args:
        projections: by pattern, see `ADMM`.
        at: when, as a fraction of training in [0, 1]; after the first step at the earliest.

    Raises:
        SettingError: for a value outside its range, or, when training starts, a pattern that means no weight.

    Examples:
        >>> from spectrim.projections import TopK
        >>> OneShot({"*": TopK(0.1)}).at
        0.0

    Source: Han et al., arXiv 1506.02626.
    """

    projections: Mapping[str, Projection]
    at: float = 0.0

    def __post_init__(self) -> None:
        check_patterns("OneShot", self.projections, "a projection, such as TopK(0.1)", "stored_bits")
        if not 0 <= self.at <= 1:
            raise SettingError("OneShot", "at", got=self.at, rule="a fraction of training in [0, 1]")

    def start(self, model: nn.Module, inputs: Any, steps: int) -> dict[str, Any]:
        """Return the memory before the first step, see `Course`."""
        chosen("OneShot", model, self.projections)
        return {"free": {}, "fixed": {}}

    def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any]) -> Change:
        """Change nothing, see `Course`."""
        return Change()

    def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any]) -> None:
        """Project where it is due, and put back what is not free, see `Course`."""
        if memory["free"]:
            put_back(model, memory["free"], memory["fixed"])
        elif step + 1 >= max(1, round(steps * self.at)):
            project(model, chosen("OneShot", model, self.projections), memory)

    def free(self, memory: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return which entries may move, by the name of the parameter; all of the others may."""
        return _entries(memory)


@dataclass(frozen=True)
class Gradual:
    """Prune step by step while a network trains, on a cubic ramp: ``kept = keep + (all - keep) (1 - k / cuts)^3`` after cut ``k``.

    What was pruned stays zero, as with `OneShot`. A `Course`: give it to ``fit(..., courses=[...])``; the share of entries kept is in the
    log, ``Gradual kept``.

    Args:
        projections: that prune (`TopK`, `Structured`, `Tiles`), by pattern, see `ADMM`: the final ones.
        begin: when the ramp begins, as a fraction of training in [0, 1).
        end: when the last cut is made, in (begin, 1].
        cuts: number of cuts, >= 1.

    Raises:
        SettingError: for a value outside its range, or, when training starts, a pattern that means no weight.

    Examples:
        >>> from spectrim.projections import TopK
        >>> course = Gradual({"*": TopK(10)}, cuts=2)
        >>> [course.at(TopK(10), nn.Linear(10, 10).weight, cut).keep for cut in (1, 2)]
        [21, 10]

    Source: Zhu and Gupta, arXiv 1710.01878, equation 1.
    """

    projections: Mapping[str, Projection]
    begin: float = 0.0
    end: float = 0.5
    cuts: int = 30

    def __post_init__(self) -> None:
        check_patterns("Gradual", self.projections, "a projection that prunes: TopK, Structured or Tiles", "things")
        if not 0 <= self.begin < self.end <= 1:
            raise SettingError("Gradual", "begin and end", got=(self.begin, self.end), rule="0 <= begin < end <= 1")
        if isinstance(self.cuts, bool) or self.cuts < 1:
            raise SettingError("Gradual", "cuts", got=self.cuts, rule="an integer >= 1")

    def at(self, projection: Any, weight: Tensor, cut: int) -> Any:
        """Return the projection of one cut, `cut` of 1 to `cuts`, on the way to `projection`."""
        return on_ramp(projection, weight, cut / self.cuts)

    def start(self, model: nn.Module, inputs: Any, steps: int) -> dict[str, Any]:
        """Return the memory before the first step, see `Course`."""
        chosen("Gradual", model, self.projections)
        return {"free": {}, "fixed": {}}

    def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any]) -> Change:
        """Change nothing, see `Course`."""
        return Change()

    def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any]) -> None:
        """Put back what is not free, and cut where a cut is due, see `Course`."""
        put_back(model, memory["free"], memory["fixed"])
        shares = ((cut, self.begin + (self.end - self.begin) * cut / self.cuts) for cut in range(1, self.cuts + 1))
        due = max((cut for cut, share in shares if max(1, round(steps * share)) == step + 1), default=0)
        if due:
            parameters = dict(model.named_parameters())
            given = chosen("Gradual", model, self.projections)
            project(model, {name: self.at(projection, parameters[name], due) for name, projection in given.items()}, memory)

    def free(self, memory: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return which entries may move, by the name of the parameter; all of the others may."""
        return _entries(memory)

    def noted(self, memory: Mapping[str, Any]) -> dict[str, float]:
        """Return what the log of an epoch gets: the share of entries that are kept."""
        kept = [(int(free.sum()), free.numel()) for free in memory["free"].values()]
        return {"kept": sum(part for part, _ in kept) / sum(whole for _, whole in kept)} if kept else {}


@dataclass(frozen=True)
class Hold:
    """Keep zeros of weights at zero while the others train: for a network that was pruned before.

    Weights, gradients and the optimizer's moments are held after each step until training ends; nothing is left behind in the model. A
    `Course`: give it to ``fit(..., courses=[...])``, before others that change weights.

    Args:
        where: a pattern or a list of them, see `ADMM`.

    Raises:
        SettingError: for anything else, or, when training starts, a pattern that means no weight.

    Examples:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> layer.weight.data = torch.tensor([[0.0, 3.0]])
        >>> Hold().start(layer, torch.zeros(1, 2), 10)["free"]["weight"]
        tensor([[False,  True]])
    """

    where: str | Sequence[str] = "*"

    def __post_init__(self) -> None:
        patterns = [self.where] if isinstance(self.where, str) else self.where
        if isinstance(patterns, type) or not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise SettingError("Hold", "where", got=self.where, rule="a pattern, such as 'fc*', or a list of patterns")

    def start(self, model: nn.Module, inputs: Any, steps: int) -> dict[str, Any]:
        """Return the memory: which entries are not zero now, for weights that have zeros, see `Course`."""
        patterns = [self.where] if isinstance(self.where, str) else self.where
        names = chosen("Hold", model, dict.fromkeys(patterns))
        free = {name: p.detach() != 0 for name, p in model.named_parameters() if name in names}
        return {"free": {name: entries for name, entries in free.items() if not bool(entries.all())}, "fixed": {}}

    def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any]) -> Change:
        """Change nothing, see `Course`."""
        return Change()

    def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any]) -> None:
        """Set what is not free to zero again, see `Course`."""
        put_back(model, memory["free"], memory["fixed"])

    def free(self, memory: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return which entries may move, by the name of the parameter; all of the others may."""
        return _entries(memory)
