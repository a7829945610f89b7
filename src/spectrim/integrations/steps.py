"""What a low-rank run adds to somebody else's training loop: penalties, cuts, and what the log says of them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from spectrim.errors import LayerError, SettingError
from spectrim.forms.svd import Factors
from spectrim.layers import named_factors
from spectrim.protocols import Penalty, PenaltySchedule, RankSchedule
from spectrim.training.course import ScheduledPenalty, cut_ranks
from spectrim.training.fit import unique_names
from spectrim.training.history import layer_lines, mean_rank


class Steps:
    """Penalties and a rank schedule, followed step by step by a loop that is not ours.

    Attributes:
        terms: what is added to the loss, by the name in the log.
        rank_schedule: what cuts, or None.
        cuts: one entry for each cut that changed a rank: ``step``, the number of optimizer steps before it, and ``ranks`` after it.
        called: whether `penalty` was called since `begin`.
    """

    def __init__(self, owner: str, penalties: Sequence[Penalty], rank_schedule: RankSchedule | None) -> None:
        """Name the penalties, that of the schedule last.

        Args:
            owner: whose settings these are, for errors.
            penalties: each is called on the model and returns what it adds.
            rank_schedule: cuts ranks; one that is a `PenaltySchedule` too adds its penalty.

        Raises:
            SettingError: for something that cannot be called.
        """
        for penalty in penalties:
            if not callable(penalty):
                raise SettingError(owner, "penalties", got=penalty, rule="a list of penalties, such as [Orthogonality(1.0)]")
        if rank_schedule is not None and not callable(rank_schedule):
            raise SettingError(owner, "rank_schedule", got=rank_schedule, rule="a schedule, such as Ramp(0.9), or None")
        self.owner, self.rank_schedule = owner, rank_schedule
        self.scheduled = ScheduledPenalty(rank_schedule) if isinstance(rank_schedule, PenaltySchedule) else None
        names = [type(penalty).__name__ for penalty in penalties]
        if self.scheduled is not None:
            names, penalties = [*names, type(rank_schedule).__name__], [*penalties, self.scheduled]
        self.terms: dict[str, Penalty] = dict(zip(unique_names(names), penalties, strict=True))
        self.cuts: list[dict[str, Any]] = []
        self.called = False
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor | float] = dict.fromkeys(self.terms, 0.0)
        self.share = 0.0

    def begin(self, model: nn.Module, processes: int, step: int) -> None:
        """Check, before the first step, that this model can be penalised and cut here; forget an earlier run unless this one goes on.

        Args:
            model: as the loop holds it.
            processes: that train it together.
            step: number of finished optimizer steps.

        Raises:
            SettingError: for a rank schedule with several processes.
            LayerError: for factors that are not whole on this process.
        """
        if self.rank_schedule is not None and processes > 1:
            hint = "cut with prune between two runs: each process would have to choose the same ranks and exchange its parameters"
            raise SettingError(self.owner, "rank_schedule", got=self.rank_schedule, rule=f"None with {processes} processes", hint=hint)
        for name, factors in named_factors(model):
            if isinstance(factors.U, DTensor) or factors.U.dim() < 2 or not factors.U.numel():
                hint = "a penalty would see a part of it: train with DDP or with spectrim.fit"
                raise LayerError(name, "its factors are sharded over processes", hint=hint)
        if step == 0:
            self.cuts = []
            if self.scheduled is not None:
                self.scheduled.load_state_dict({"before": None})
        self.called = False
        self._reset()

    def advance(self, model: nn.Module, inputs: Any, optimizer: Optimizer, step: int, steps: int) -> None:
        """Cut what is due before an optimizer step, the optimizer's moments along with it, and ask the schedule for its penalty.

        Args:
            model: factorized.
            inputs: one batch of its inputs, for the costs.
            optimizer: trains `model`.
            step: number of finished optimizer steps.
            steps: of the whole training.
        """
        if self.rank_schedule is None:
            return
        ranks = cut_ranks(model, self.rank_schedule(model, inputs, step, steps), optimizer)
        if ranks is not None:
            self.cuts.append({"step": step, "ranks": ranks})
        if self.scheduled is not None:
            self.scheduled.advance(model, inputs, step, steps)

    def penalty(self, model: nn.Module, share: float, device: torch.device) -> Tensor:
        """Return the sum of the penalties, in the factors' own precision whatever autocast says, and note each.

        Args:
            model: as for `advance`.
            share: of this batch in its optimizer step, in (0, 1]: what is noted is multiplied by it, what is returned is not.
            device: where the sum is wanted.
        """
        self.called = True
        with torch.autocast(device.type, enabled=False):
            added = {name: term(model).to(device) for name, term in self.terms.items()}
        for name, value in added.items():
            self.sums[name] = self.sums[name] + share * value.detach()
        self.share += share
        return sum(added.values(), start=torch.zeros((), device=device))

    def added(self) -> dict[str, float]:
        """Return what each penalty added to an optimizer step's loss: the mean since this was last asked; empty before the first step."""
        means = {name: float(value) / self.share for name, value in self.sums.items()} if self.share else {}
        self._reset()
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on, as plain data."""
        return {"penalty": None if self.scheduled is None else self.scheduled.state_dict(), "cuts": self.cuts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        if self.scheduled is not None and state["penalty"] is not None:
            self.scheduled.load_state_dict(state["penalty"])
        self.cuts = list(state["cuts"])


def sizes(model: nn.Module) -> dict[str, float]:
    """Return ``params``, ``mean_rank`` and the largest ``orthogonality_defect`` of a factorized model; of a dense one ``params`` alone."""
    found = {"params": float(sum(parameter.numel() for parameter in model.parameters()))}
    for line in layer_lines(model):
        found |= {"mean_rank": mean_rank(model), "orthogonality_defect": max(line["defects"].values())}
    return found


def second_names(model: nn.Module) -> set[str]:
    """Return the names in the state dict of tied factors, all but the first of each."""
    first, again = set[int](), set[str]()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Factors):
            if id(module) in first:
                again.update(f"{name}.{part}" for part in module.state_dict())
            first.add(id(module))
    return again


def match_ranks(model: nn.Module, state: Mapping[str, Any], optimizer: Optimizer | None = None) -> dict[str, int]:
    """Give each factorized weight the rank that it has in a state dict, so that the state can be loaded.

    A smaller rank keeps the first columns and rows, a larger one is filled up with zeros. What the optimizer knows of them is dropped.

    Args:
        model: factorized; changed in place.
        state: a state dict of the same architecture, of other ranks.
        optimizer: trains `model`; it trains the new parameters afterwards.

    Returns:
        The new ranks of what was changed, by the names of the modules that hold the factors.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> from spectrim.surgery.prune import prune
        >>> from spectrim.budget.rules import Fixed
        >>> low = factorize(nn.Linear(8, 6))
        >>> cut = prune(low, Fixed(2))
        >>> match_ranks(low, cut.state_dict())
        {'factors.weight': 2}
        >>> low.load_state_dict(cut.state_dict())
        <All keys matched successfully>
    """
    changed: dict[str, int] = {}
    exchanged: dict[int, nn.Parameter] = {}
    for name, factors in model.named_modules(remove_duplicate=False):  # a tied weight may be stored under any of its names
        stored = state.get(f"{name}.S".removeprefix("."))
        if not isinstance(factors, Factors) or not isinstance(stored, Tensor) or stored.dim() != factors.S.dim():
            continue
        rank = stored.shape[-1]
        if rank == factors.rank or not 1 <= rank <= factors.full_rank:
            continue  # a wrong one is for load_state_dict to refuse
        for part, axis in (("U", -1), ("S", -1), ("Vh", -2)):
            old = getattr(factors, part)
            new = nn.Parameter(_resized(old.detach(), axis, rank), requires_grad=old.requires_grad)
            setattr(factors, part, new)
            exchanged[id(old)] = new
        changed[name] = rank
    for group in optimizer.param_groups if optimizer is not None else ():
        for parameter in (old for old in group["params"] if id(old) in exchanged):
            optimizer.state.pop(parameter, None)  # type: ignore[union-attr]
        group["params"] = [exchanged.get(id(old), old) for old in group["params"]]
    return changed


def _resized(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Return the first `size` entries along an axis, zeros where there are fewer."""
    kept = min(size, tensor.shape[axis])
    shape = list(tensor.shape)
    shape[axis] = size
    new = tensor.new_zeros(shape)
    new.narrow(axis, 0, kept).copy_(tensor.narrow(axis, 0, kept))
    return new


@contextmanager
def loading_ranks(model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[None]:
    """While open, ``model.load_state_dict`` gives the model the ranks of what it loads, see `match_ranks`."""
    handle = model.register_load_state_dict_pre_hook(partial(_match, optimizer))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        handle.remove()


def _match(optimizer: Optimizer | None, module: nn.Module, state: Mapping[str, Any], *_: Any) -> None:
    match_ranks(module, state, optimizer)
