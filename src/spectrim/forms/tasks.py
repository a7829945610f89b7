"""`TaskFactors`: one weight of several tasks, which share columns and choose among them by a selector each."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from spectrim import linalg
from spectrim.errors import LayerError, RankError
from spectrim.forms.form import Form
from spectrim.forms.svd import Factors

Start = Literal["copy"] | float
"""What a new selector holds for earlier columns: the selected task's values, or one number for all."""


class TaskFactors(Factors):
    """The weight of task ``t`` is ``U diag(s_t) Vh``, where ``U`` and ``Vh`` hold the columns of task ``t`` and of tasks before it.

    Each task adds a group of columns, ``U{t}`` and ``Vh{t}``, and a selector ``S{t}``, one signed value for each column that it uses. Once
    the next task is there, neither changes any more. `U`, `S` and `Vh` are those of the selected task, so that a layer runs, penalties see
    and `merge` writes that task. Columns are held apart, group by group: what a task computes does not depend on later ones, to the bit.

    Attributes:
        used: for each task the groups whose columns it uses.
        selected: the task that `U`, `S` and `Vh` are of.

    Source: Hyder et al., arXiv 2207.09074, section 3.
    Deviation: the new columns start orthogonal to those that are there; the selector of earlier columns starts as a copy by default.
    """

    def __init__(self, first: Factors) -> None:
        """Take copies of factors: the columns and the selector of task 0.

        Args:
            first: orthonormal or not; left as they are.
        """
        Form.__init__(self, {"U0": first.U, "Vh0": first.Vh, "S0": first.S}, dtype=first.dtype, requires_grad=first.S.requires_grad)
        self.used: list[tuple[int, ...]] = [(0,)]
        self.selected = 0
        self.train(first.training)

    @classmethod
    def of_parts(cls, like: Factors, parts: dict[str, Tensor], used: Sequence[Sequence[int]]) -> "TaskFactors":
        """Return the columns and selectors of a stored form.

        Args:
            like: gives shape, dtype and device.
            parts: by the names of the parameters.
            used: for each task the groups of its columns.

        Raises:
            LayerError: for parts that are not those of one weight of this shape.
        """
        made = cls.__new__(cls)
        Form.__init__(made, {name: part.to(like.device) for name, part in parts.items()}, dtype=like.dtype)
        made.used = [tuple(int(group) for group in groups) for groups in used]
        made.selected = len(made.used) - 1
        made._check(like)
        return made.train(like.training)

    def _check(self, like: Factors) -> None:
        """Raise a LayerError for parts that do not fit each other, or the shape of `like`."""
        wanted = {f"S{task}": self._columns(task) for task in range(len(self.used))}
        shapes = {name: (*like.lead, count) for name, count in wanted.items()}
        for group in sorted({group for groups in self.used for group in groups}):
            shapes |= {f"U{group}": (*like.lead, like.shape[0], self._width(group))}
            shapes |= {f"Vh{group}": (*like.lead, self._width(group), like.shape[1])}
        for name in sorted({*shapes, *self._parameters}):
            part = self._parameters.get(name)
            if part is None or tuple(part.shape) != shapes.get(name):
                got = "missing" if part is None else f"of shape {tuple(part.shape)}"
                raise LayerError(name, f"is {got} where {shapes.get(name, 'nothing')} is needed")

    # What the selected task holds

    def _width(self, group: int) -> int:
        """Number of columns in a group; 0 for a task that added none."""
        part = self._parameters.get(f"U{group}")
        return 0 if part is None else part.shape[-1]

    def _columns(self, task: int) -> int:
        """Number of columns that a task uses."""
        return sum(self._width(group) for group in self.used[task])

    def _joined(self, name: str, axis: int) -> Tensor:
        parts: list[Any] = [part for group in self.used[self.selected] if (part := self._parameters.get(f"{name}{group}")) is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)

    @property
    def U(self) -> Tensor:  # type: ignore[override]
        """Left columns of the selected task, ``(..., out, columns)``."""
        return self._joined("U", -1)

    @property
    def S(self) -> Any:  # type: ignore[override]
        """Selector of the selected task, ``(..., columns)``, signed."""
        return self._parameters[f"S{self.selected}"]

    @property
    def Vh(self) -> Tensor:  # type: ignore[override]
        """Right columns of the selected task, ``(..., columns, in)``."""
        return self._joined("Vh", -2)

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return len(self.used)

    @property
    def new(self) -> int:
        """Number of columns that the selected task added."""
        return self._width(self.selected)

    def sides(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Return ``U`` and ``Vh^T``, so that new columns are held orthogonal to earlier ones, too.

        The new columns alone where more columns are held than fit; nothing for a task without new columns.
        """
        if not self.new:
            return ()
        U, Vh = self._parameters[f"U{self.selected}"], self._parameters[f"Vh{self.selected}"]
        return (self.U, self.Vh.mT) if self.rank <= min(self.shape) else (U, Vh.mT)  # type: ignore[union-attr, return-value]

    def retract_(self) -> None:
        """Refuse: columns of earlier tasks may not move."""
        problem = "holds columns of earlier tasks, which a retraction would move"
        raise LayerError(type(self).__name__, problem, hint="hold new columns orthogonal with Orthogonality()")

    def values(self) -> tuple[Tensor, ...]:
        """Return the selector of the new columns, the ones that can be cut; nothing for a task without new columns."""
        return (self.S[..., -self.new :],) if self.new else ()

    def params_of(self, task: int) -> int:
        """Return how many numbers a task added: ``new (out + in)``, and its selector."""
        parts = (self._parameters.get(f"{name}{task}") for name in ("U", "Vh", "S"))
        return sum(part.numel() for part in parts if part is not None)

    def of_task(self, task: int) -> Factors:
        """Return one task's weight as factors that share nothing; at most of full rank, and trained like a layer of its own."""
        made = Factors(*self.parts_of_task(task), dtype=self.dtype)
        return (made.in_order() if made.rank > made.full_rank else made).train(self.training)

    def parts_of_task(self, task: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``U, S, Vh`` of a task."""
        before, self.selected = self.selected, task
        try:
            return self.U, self.S, self.Vh
        finally:
            self.selected = before

    # Adding, selecting and cutting

    def add(self, rank: int, *, reuse: bool = True, start: Start = "copy") -> None:
        """Add a task with new columns and select it.

        Args:
            rank: how many new columns, in ``[0, min(out, in)]``.
            reuse: whether it uses the columns of earlier tasks; a task without them needs new ones.
            start: of the selector's values for earlier columns: ``copy`` takes the selected task's (0 for columns that it does not use),
                a number is taken for all.

        Raises:
            RankError: for a rank outside its range, or 0 without reuse.
        """
        least = 0 if reuse else 1
        if not least <= rank <= min(self.shape):
            raise RankError("", got=rank, out=self.shape[0], in_=self.shape[1])
        groups = tuple(group for group in range(self.tasks) if self._width(group)) if reuse else ()
        selector, task = self._started(groups, start), self.tasks
        scale = self.S.detach().abs().mean() if float(self.S.detach().abs().sum()) else torch.ones(())
        for name, axis in (("U", -1), ("Vh", -2)) if rank else ():
            old = self._held(name, axis, groups)
            drawn = fresh(old if axis == -1 else old.mT, rank)
            self._register(f"{name}{task}", drawn if axis == -1 else drawn.mT)
        self.used.append((*groups, task) if rank else groups)
        self._register(f"S{task}", torch.cat([selector, scale.to(selector).expand(*self.lead, rank)], -1))
        self.select(task)

    def _held(self, name: str, axis: int, groups: Sequence[int]) -> Tensor:
        """Return the columns of groups side by side, detached."""
        parts: list[Any] = [self._parameters[f"{name}{group}"] for group in groups]
        first: Any = self._parameters[f"{name}0"]
        return torch.cat([part.detach() for part in parts], axis) if parts else first.detach().narrow(axis, 0, 0)

    def _started(self, groups: Sequence[int], start: Start) -> Tensor:
        """Return the first values of a selector for the columns of groups."""
        if start != "copy":
            count = sum(self._width(group) for group in groups)
            return torch.full((*self.lead, count), float(start), dtype=self.S.dtype, device=self.device)
        own = dict(
            zip(self.used[self.selected], self.S.detach().split([self._width(g) for g in self.used[self.selected]], -1), strict=True)
        )
        none = self.S.new_zeros((*self.lead, 0)).detach()
        zeros = {group: self.S.new_zeros((*self.lead, self._width(group))).detach() for group in groups}
        return torch.cat([none, *(own.get(group, zeros[group]) for group in groups)], -1)

    def _register(self, name: str, tensor: Tensor) -> None:
        like: Any = self._parameters["S0"]
        self.register_parameter(name, torch.nn.Parameter(tensor.detach().to(like).clone(memory_format=torch.contiguous_format)))

    def select(self, task: int) -> None:
        """Make `U`, `S` and `Vh` those of a task. Only what the last one added is trained, and only while it is selected."""
        self.selected = task
        last = self.tasks - 1
        for name, part in self._parameters.items():
            assert part is not None
            part.requires_grad_(task == last and name in (f"U{last}", f"Vh{last}", f"S{last}"))
            if not part.requires_grad:
                part.grad = None  # no optimizer moves a parameter without a gradient

    @torch.no_grad()
    def drop(self, keep: float) -> int:
        """Keep the fewest new columns of the last task that hold a share of its weight's energy; return how many.

        The part of the weight that the new columns hold is decomposed; earlier columns stay as they are.

        Args:
            keep: fraction in (0, 1]; what is discarded is at most ``1 - keep`` of the squared norm of the weight.
        """
        task, before = self.tasks - 1, self.selected
        self.selected = task
        try:
            if not self.new:
                return 0
            X, values, Y = linalg.svd_of_product(self.U[..., -self.new :], self.S[..., -self.new :], self.Vh[..., -self.new :, :])
            tail = linalg.tail_energy(linalg.pooled_spectrum(values))
            allowed = (1 - keep) * float(self.matrix().double().square().sum())
            least = 1 if len(self.used[task]) == 1 else 0  # a task that reuses nothing needs a column
            count = max(least, int((tail > allowed).sum()))
            old = self.S[..., : -self.new]
            made = {
                f"U{task}": X[..., :count],
                f"Vh{task}": Y[..., :count, :],
                f"S{task}": torch.cat([old, values[..., :count].to(old)], -1),
            }
        finally:
            self.selected = before
        for name, tensor in made.items():
            trained = self._parameters[name].requires_grad  # type: ignore[union-attr]
            self._register(name, tensor)
            self._parameters[name].requires_grad_(trained)  # type: ignore[union-attr]
        if count == 0:
            del self._parameters[f"U{task}"], self._parameters[f"Vh{task}"]
            self.used[task] = self.used[task][:-1]
        return count

    # What would change the columns of other tasks

    def become(self, other: Form) -> None:
        """Raise a LayerError: a cut would change what other tasks use."""
        hint = "one_task(model, task) gives one task's network, which can be cut"
        raise LayerError(type(self).__name__, f"holds the columns of {self.tasks} tasks", hint=hint)

    def set_(self, *parts: Tensor) -> None:
        """Raise a LayerError, as `become`."""
        self.become(self)

    def like(self, *parts: Tensor, exact: bool = False) -> Any:
        """Return plain factors, of one task, with the settings of these."""
        made = Factors(*parts, dtype=self.dtype, exact=exact)
        return made.requires_grad_(self.S.requires_grad).train(self.training)

    def random(self, rank: int) -> Any:
        """Return plain random factors of this weight's shape, to time what they do."""
        return Factors.random(self.like(*self.parts_of_task(self.selected)), rank)

    def extra_repr(self) -> str:
        """Shape, tasks and dtype for the module's printout."""
        out, in_ = self.shape
        return f"{out} x {in_}, task {self.selected} of {self.tasks}, columns={self.rank} ({self.new} new), dtype={self.dtype}"


def fresh(old: Tensor, count: int) -> Tensor:
    """Return random orthonormal columns, ``(..., rows, count)``, orthogonal to those of `old`, ``(..., rows, n)``, where that many fit.

    Draws from torch's global generator, on the CPU.
    """
    rows, held = old.shape[-2], old.shape[-1]
    drawn = torch.randn(*old.shape[:-1], count, dtype=torch.float64).to(old.device)
    if held and held + count <= rows:
        basis = torch.linalg.qr(old.double()).Q
        for _ in range(2):  # once more takes away what rounding has left
            drawn = drawn - basis @ (basis.mT @ drawn)
    columns: Tensor = torch.linalg.qr(drawn).Q
    return columns
