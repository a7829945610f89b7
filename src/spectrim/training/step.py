"""One training step, in any loop: courses before and after it, lessons and penalties in its loss."""

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from spectrim.errors import SettingError
from spectrim.forms.form import Size
from spectrim.protocols import Change, Course, Lesson, Penalty, Seen
from spectrim.training.course import as_course, cut_ranks, name_of
from spectrim.training.distillation import outputs_of
from spectrim.training.holding import stop_gradients, stop_moments


class Step:
    """Penalties, courses and lessons of a run, followed step by step: by `fit`, Lightning and the ``Trainer`` of transformers.

    Attributes:
        penalties: the fixed ones, by their name in the log.
        courses: by name.
        lessons: by name.
        memories: of the courses, by name; those that have started.
    """

    def __init__(self, owner: str, penalties: Sequence[Penalty] = (), courses: Sequence[Any] = (), lessons: Sequence[Any] = ()) -> None:
        """Name everything.

        Args:
            owner: whose settings these are, for errors.
            penalties: each is called on the model and returns what it adds.
            courses: each a `Course`, or a function of ``(model, inputs, step, steps)`` that returns ranks or None.
            lessons: each a `Lesson`.

        Raises:
            SettingError: for anything else.
        """
        for penalty in penalties:
            if isinstance(penalty, type) or not callable(penalty):
                raise SettingError(owner, "penalties", got=penalty, rule="a list of penalties, such as [Orthogonality(1.0)]")
        for lesson in lessons:
            if isinstance(lesson, type) or not isinstance(lesson, Lesson):
                raise SettingError(owner, "lessons", got=lesson, rule="a lesson, such as Distillation(teacher)")
        made = [as_course(course, owner) for course in courses]
        names = unique_names([name_of(each) for each in (*penalties, *made, *lessons)])
        first, second = len(penalties), len(penalties) + len(made)
        self.penalties: dict[str, Penalty] = dict(zip(names[:first], penalties, strict=True))
        self.courses: dict[str, Course] = dict(zip(names[first:second], made, strict=True))
        self.lessons: dict[str, Lesson] = dict(zip(names[second:], lessons, strict=True))
        self.agree: Callable[[Any], Any] | None = None
        self.device: torch.device | None = None
        self._called: dict[str, Callable[[Seen], Tensor]] = dict(self.lessons)
        self._seen: dict[str, Tensor] = {}
        self.forget()

    def forget(self) -> None:
        """Start a run: no course has started."""
        self.memories: dict[str, dict[str, Any]] = {}
        self._columns = [name for name, course in self.courses.items() if getattr(course, "penalizes", False)]
        self._pulls: dict[str, Penalty | None] = {}
        self._at = 0

    @property
    def kind(self) -> str:
        """Names of the courses: a checkpoint is of the same ones."""
        return ", ".join(("Step", *self.courses))

    @property
    def terms(self) -> list[str]:
        """Names of what `added` returns, in its order: penalties, then courses that penalize."""
        return [*self.penalties, *self._columns]

    def before(self, model: nn.Module, inputs: Any, optimizer: Optimizer, step: int, steps: int) -> dict[str, Size] | None:
        """Apply the changes of every course before an optimizer step, and cut; the optimizer's moments are cut along.

        Args:
            model: factorized or dense.
            inputs: of the step's first batch.
            optimizer: trains `model`.
            step: number of finished optimizer steps.
            steps: of the whole training.

        Returns:
            The ranks after a cut that changed one, else None.
        """
        ranks, self._at = None, step
        for name, course in self.courses.items():
            if name not in self.memories:
                self.memories[name] = course.start(model, inputs, steps)
            change = self._agreed(name, course.before(model, inputs, step, steps, self.memories[name]) or Change())
            ranks = cut_ranks(model, change.ranks, optimizer) or ranks
            self._pulls[name] = change.penalty
            if change.penalty is not None and name not in self._columns:
                self._columns.append(name)
        return ranks

    def _agreed(self, name: str, change: Change) -> Change:
        """Take the main process's ranks and plain data; tensors, and what holds them, are the same where the weights are."""
        if self.agree is None:
            return change
        memory = self.memories[name]
        plain = {key: value for key, value in memory.items() if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))}
        send = _is_plain(change.penalty)
        ranks, sent, penalty, plain = self.agree((change.ranks, send, change.penalty if send else None, plain))
        memory.update(plain)
        return Change(ranks, penalty if sent else change.penalty)

    def frees(self) -> list[Mapping[str, Tensor]]:
        """Return, for each course that has started and holds some, which entries of parameters may move."""
        held = ((course, self.memories[name]) for name, course in self.courses.items() if name in self.memories)
        return [course.free(memory) for course, memory in held if hasattr(course, "free")]

    def stop_gradients(self, model: nn.Module) -> None:
        """Set the gradients of what courses hold to zero, between the backward pass and the optimizer step."""
        stop_gradients(model, self.frees())

    @torch.no_grad()
    def after(self, model: nn.Module, step: int, steps: int, optimizer: Optimizer | None = None) -> None:
        """Call every course after the optimizer step, and set the moments of what they hold to zero; arguments as for `before`."""
        for name, course in self.courses.items():
            course.after(model, step, steps, self.memories[name])
        if optimizer is not None:
            stop_moments(model, optimizer, self.frees())

    def end(self, model: nn.Module) -> None:
        """Tell courses that training ends, also where it ends within a step."""
        for course in self.courses.values():
            if hasattr(course, "closed"):
                course.closed(model)

    def noted(self) -> dict[str, float]:
        """Return what courses add to the log of an epoch, by the course's name and the entry's."""
        told = ((name, course.noted(self.memories[name])) for name, course in self.courses.items() if hasattr(course, "noted"))
        return {f"{name} {key}": value for name, entries in told for key, value in entries.items()}

    def tensors(self) -> list[Tensor]:
        """Return the tensors in the memories of courses."""
        return [leaf for leaf in tree_leaves(self.memories) if isinstance(leaf, Tensor)]

    def added(self, model: nn.Module) -> list[Tensor]:
        """Return what each of `terms` adds to the loss of this step, scalars."""
        pulls = [*self.penalties.values(), *(self._pulls.get(name) for name in self._columns)]
        return [torch.zeros(()) if pull is None else self._of_this_step(pull, model) for pull in pulls]

    def _of_this_step(self, penalty: Penalty, model: nn.Module) -> Tensor:
        """Return the penalty; of one for `every` few steps that many times as much then, and zero between."""
        every = getattr(penalty, "every", 1)
        if every == 1:
            return penalty(model)
        return torch.zeros(()) if self._at % every else every * penalty(model)

    # Lessons

    @contextmanager
    def watching(self, model: nn.Module, device: torch.device, compiled: bool = False) -> Iterator[None]:
        """Give lessons the layer outputs of the model during training, and tell courses when it ends.

        Args:
            model: what learns; its layers are watched by forward hooks, which are gone afterwards.
            device: of the model.
            compiled: whether the model runs through `torch.compile`.
        """
        with ExitStack() as stack:
            names = dict.fromkeys(name for lesson in self.lessons.values() for name in lesson.watched_layers(model))
            self._seen = stack.enter_context(outputs_of(model, names))
            for name, lesson in self.lessons.items():
                opened = getattr(lesson, "opened", None)
                self._called[name] = lesson if opened is None else stack.enter_context(opened(model, device, compiled))
            try:
                yield
            finally:
                self._called, self._seen = dict(self.lessons), {}
                self.end(model)

    def mixed(self, inputs: Any, loss: Any) -> tuple[Any, Any]:
        """Return the inputs and the loss of a batch as lessons prepare them."""
        for lesson in self.lessons.values():
            prepare = getattr(lesson, "mixed", None)
            if prepare is not None:
                inputs, loss = prepare(inputs, loss)
        return inputs, loss

    def taught(self, task: Tensor, inputs: Any, output: Any, target: Any, done: float) -> tuple[Tensor, list[Tensor]]:
        """Return the loss with all lessons in it, and what each has changed.

        Args:
            task: the loss of the task.
            inputs: of the batch.
            output: of the model.
            target: of the batch.
            done: share of the training that is done.
        """
        loss, shares = task, []
        for lesson in self._called.values():
            new = lesson(Seen(loss, inputs, output, target, self._seen, done))
            shares.append(new.detach() - loss.detach())
            loss = new
        self._seen.clear()  # nothing is held for longer than a step
        return loss, shares

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on: memories, where their tensors lie, and the columns of the log."""
        leaves = tree_leaves(self.memories)
        moved = [isinstance(leaf, Tensor) and leaf.device.type != "cpu" for leaf in leaves]
        memories = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), self.memories)
        return {"memories": memories, "moved": moved, "columns": list(self._columns)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        leaves, tree = tree_flatten(state["memories"])
        leaves = [leaf.to(self.device) if moved and self.device else leaf for leaf, moved in zip(leaves, state["moved"], strict=True)]
        self.memories = tree_unflatten(leaves, tree)
        self._columns = list(state["columns"])
        self._pulls = {}


def _is_plain(penalty: Penalty | None) -> bool:
    """Whether a penalty can be sent to other processes as it is: None, or an instance that holds no tensors and can be pickled."""
    leaves = tree_leaves(dict(vars(penalty)) if hasattr(penalty, "__dict__") else None)
    if any(isinstance(leaf, Tensor | nn.Module) for leaf in leaves):
        return False
    try:
        pickle.dumps(penalty)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def unique_names(names: list[str]) -> list[str]:
    """Number repeated names."""
    return [name if names.count(name) == 1 else f"{name} {names[: index + 1].count(name)}" for index, name in enumerate(names)]
