"""Penalties, cuts and their log in the training loops of other libraries."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectrim.errors import LayerError, SettingError
from spectrim.forms.form import Form, Size
from spectrim.layers import named_factors
from spectrim.layers.sharded import is_whole
from spectrim.protocols import Penalty
from spectrim.training.history import layer_lines, mean_rank
from spectrim.training.step import Step


class Steps(Step):
    """A `Step` in another library's loop, with a record of cuts and log entries.

    Attributes:
        cuts: one entry for each cut that changed a rank: ``step``, the number of optimizer steps before it, and ``ranks`` after it.
        called: whether `penalty` was called since `begin`.
        heard: whether `lesson` was called since `begin`.
    """

    def __init__(self, owner: str, penalties: Sequence[Penalty], courses: Sequence[Any] = (), lessons: Sequence[Any] = ()) -> None:
        """Name everything, see `Step`.

        Args:
            owner: whose settings these are, for errors.
            penalties: each is called on the model and returns what it adds.
            courses: see `Step`.
            lessons: see `Step`; those that mix batches need `fit`.

        Raises:
            SettingError: for something that is none of these.
        """
        super().__init__(owner, penalties, courses, lessons)
        for name, lesson in self.lessons.items():
            if getattr(lesson, "mix", 0):
                raise SettingError(owner, "lessons", got=name, rule="ones with mix=0: this loop prepares its own batches")
        self.owner, self.stack = owner, ExitStack()
        self.cuts: list[dict[str, Any]] = []
        self.at: tuple[int, int] | None = None
        self.trained_by: Optimizer | None = None
        self.called = self.heard = False
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor | float] = dict.fromkeys((*self.terms, *self.lessons), 0.0)
        self.share = 0.0

    def begin(self, model: nn.Module, processes: int, step: int, device: torch.device | None = None) -> None:
        """Check, before the first step, that this model can be penalized and cut here; forget an earlier run unless this one goes on.

        Args:
            model: as the loop holds it.
            processes: that train it together.
            step: number of finished optimizer steps.
            device: of the model; that of its first parameter when omitted.

        Raises:
            SettingError: for courses with several processes.
            LayerError: for factors that are not whole on this process.
        """
        if self.courses and processes > 1:
            hint = "cut with prune between two runs: each process would have to choose the same ranks and exchange its parameters"
            rule = f"empty with {processes} processes"
            raise SettingError(self.owner, "courses", got=", ".join(self.courses), rule=rule, hint=hint)
        for name, factors in named_factors(model):
            if not is_whole(factors):
                hint = "a penalty would see only a part of it: train with DDP or with spectrim.fit"
                raise LayerError(name, "its factors are sharded over processes", hint=hint)
        if step == 0:
            self.cuts = []
            self.forget()
        self.called, self.heard, self.at = False, False, None
        self._reset()
        self.close()
        if self.lessons or self.courses:
            device = device or next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
            self.stack.enter_context(self.watching(model, device))

    def close(self) -> None:
        """Stop watching layers."""
        self.stack.close()

    def advance(self, model: nn.Module, inputs: Any, optimizer: Optimizer, step: int, steps: int) -> None:
        """Do what courses want before an optimizer step; the optimizer's moments are cut along.

        Args:
            model: factorized.
            inputs: one batch of its inputs, for the costs.
            optimizer: trains `model`.
            step: number of finished optimizer steps.
            steps: of the whole training.
        """
        self.at, self.trained_by = (step, steps), optimizer
        ranks = self.before(model, inputs, optimizer, step, steps)
        if ranks is not None:
            self.cuts.append({"step": step, "ranks": ranks})

    def finish(self, model: nn.Module) -> None:
        """Do what courses want after the optimizer step that `advance` began."""
        if self.at is not None:
            self.after(model, *self.at, self.trained_by)
            self.at = self.trained_by = None

    def penalty(self, model: nn.Module, share: float, device: torch.device) -> Tensor:
        """Return the sum of the penalties, in the factors' own precision whatever autocast says, and note each.

        Args:
            model: as for `advance`.
            share: of this batch in its optimizer step, in (0, 1]: what is noted is multiplied by it, what is returned is not.
            device: where the sum is wanted.
        """
        self.called = True
        with torch.autocast(device.type, enabled=False):
            added = [term.to(device) for term in self.added(model)]
        for name, value in zip(self.terms, added, strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + share * value.detach()
        self.share += share
        return sum(added, start=torch.zeros((), device=device))

    def lesson(self, loss: Tensor, inputs: Any, output: Any, target: Any, done: float, share: float) -> Tensor:
        """Return the loss of a batch with all lessons in it, and note what each changed.

        Args:
            loss: of the task, a mean over the batch.
            inputs: of the batch.
            output: of the model.
            target: of the batch.
            done: share of the training that is done.
            share: as for `penalty`, which is called beside this.
        """
        self.heard = True
        loss, changed = self.taught(loss, inputs, output, target, done)
        for name, value in zip(self.lessons, changed, strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + share * value
        return loss

    def means(self) -> dict[str, float]:
        """Return what each penalty and lesson added to an optimizer step's loss: the mean since this was last asked; empty at first."""
        means = {name: float(value) / self.share for name, value in self.sums.items()} if self.share else {}
        self._reset()
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on, as tensors and plain data."""
        return {"step": super().state_dict(), "cuts": self.cuts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        super().load_state_dict(state["step"])
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
        if isinstance(module, Form):
            if id(module) in first:
                again.update(f"{name}.{part}" for part in module.state_dict())
            first.add(id(module))
    return again


def match_ranks(model: nn.Module, state: Mapping[str, Any], optimizer: Optimizer | None = None) -> dict[str, Size]:
    """Give each factorized weight the rank that it has in a state dict, so that the state can be loaded.

    A smaller rank keeps the first columns and rows, a larger one is filled up with zeros. Their optimizer state is dropped.

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
    changed: dict[str, Size] = {}
    exchanged: dict[int, Any] = {}
    for name, factors in model.named_modules(remove_duplicate=False):  # a tied weight may be stored under any of its names
        if not isinstance(factors, Form):
            continue
        size = factors.size_of_parts({part: state.get(f"{name}.{part}".removeprefix(".")) for part in factors._parameters})
        if size is None or size == factors.size:
            continue  # load_state_dict refuses a wrong one
        old = dict(factors._parameters)
        factors.become(factors.resized(size))
        exchanged |= {id(parameter): factors._parameters[part] for part, parameter in old.items()}
        changed[name] = size
    for group in optimizer.param_groups if optimizer is not None else ():
        for parameter in (old for old in group["params"] if id(old) in exchanged):
            optimizer.state.pop(parameter, None)  # type: ignore[union-attr]
        group["params"] = [exchanged.get(id(old), old) for old in group["params"]]
    return changed


@contextmanager
def loading_ranks(model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[None]:
    """While open, ``model.load_state_dict`` gives the model the ranks of what it loads, see `match_ranks`."""
    handle = model.register_load_state_dict_pre_hook(partial(_match, optimizer))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        handle.remove()


def _match(optimizer: Optimizer | None, module: nn.Module, state: Mapping[str, Any], *_: Any) -> None:
    _check_same_layers(module, state)
    match_ranks(module, state, optimizer)


def _check_same_layers(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise a LayerError unless the same layers are factorized in a model and in a state dict, either of which may have fewer layers."""
    hint = "resume with a model that was factorized as the one that wrote the checkpoint was, with the same where= and scheme="
    forms: dict[Form, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Form):
            forms.setdefault(module, []).append(name)
    held = {key.rpartition(".")[0] for key in state}
    layers = {_layer_of(name) for name in held}
    for form, names in forms.items():
        layer = _layer_of(names[0])
        whole = any(all(f"{name}.{part}" in state for part in form._parameters) for name in names)
        if not whole and any(f"{other}.".startswith(f"{layer}.") for other in layers):
            raise LayerError(layer, "is factorized here, and not in the same way in the checkpoint", hint=hint)
    known = tuple(f"{name}." for names in forms.values() for name in names)
    for name in sorted(held):
        if _layer_of(name) != name and not f"{name}.".startswith(known):
            raise LayerError(_layer_of(name), "is factorized in the checkpoint and not here", hint=hint)


def _layer_of(name: str) -> str:
    """Return the name of the layer that holds factors of a name; any other name as it is."""
    return f".{name}".partition(".factors.")[0][1:] if ".factors." in f".{name}" else name
