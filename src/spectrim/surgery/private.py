"""Tensors that each task has of its own: biases, norms and heads, of which the layers hold the selected task's.

The selected task's values lie under their usual names. Those of all others are kept in the same layer as ``bias__task3``: masters, which
nothing computes with. A layer works on a copy of a master, but for the last task, whose tensors themselves are exchanged, as an optimizer
may hold them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from spectrim.forms.form import Form

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Layers whose trained tensors are private, whatever their shape."""

MARK = "__task"
"""Between the name of a private tensor and the number of the task that a master belongs to."""


class Slot(NamedTuple):
    """Where a private tensor lies: a parameter or buffer of a layer."""

    module: nn.Module
    key: str

    @property
    def held(self) -> dict[str, Any]:
        """The parameters, or the buffers, of the layer."""
        return self.module._parameters if self.key in self.module._parameters else self.module._buffers

    @property
    def value(self) -> Tensor:
        """The selected task's tensor."""
        tensor: Tensor = self.held[self.key]
        return tensor

    def master(self, task: int) -> Tensor | None:
        """Return what is kept aside for a task."""
        kept: Tensor | None = self.held.get(f"{self.key}{MARK}{task}")
        return kept

    def keep(self, task: int) -> None:
        """Keep the present tensor itself aside as a task's."""
        name = f"{self.key}{MARK}{task}"
        if self.key in self.module._parameters:
            self.module.register_parameter(name, self.value.requires_grad_(False))  # type: ignore[arg-type]
            self.value.grad = None
        else:
            self.module.register_buffer(name, self.value)

    def forget(self, task: int) -> None:
        """Drop what is kept aside for a task."""
        self.held.pop(f"{self.key}{MARK}{task}", None)

    def put(self, tensor: Tensor) -> None:
        """Make a tensor the selected task's."""
        setattr(self.module, self.key, tensor)  # recurrent layers keep lists of their parameters


def slots_in(model: nn.Module) -> list[Slot]:
    """Return the private tensors of a model that has tasks, by what is kept aside for task 0."""
    end = f"{MARK}0"
    return [
        Slot(module, name.removesuffix(end))
        for module in _layers(model)
        for held in (module._parameters, module._buffers)
        for name in held
        if name.endswith(end)
    ]


def slots_of(model: nn.Module, whole: Callable[[nn.Module], bool]) -> list[Slot]:
    """Return the tensors of a model without tasks that will be private: trained vectors and numbers, and the buffers that are saved.

    Args:
        model: left untouched.
        whole: tells of which layers trained matrices are private, too.
    """
    found = []
    for module in _layers(model):
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            if parameter.dim() < 2 or isinstance(module, NORMS) or whole(module):
                found.append(Slot(module, key))
        saved = (key for key, b in module._buffers.items() if b is not None and key not in module._non_persistent_buffers_set)
        found += [Slot(module, key) for key in saved]
    return found


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold tensors beside forms."""
    return [module for module in model.modules() if not isinstance(module, Form)]


def copies(tensors: Iterable[Tensor], trained: bool) -> list[Tensor]:
    """Return copies; parameters stay parameters, and what was one object stays one."""
    made: dict[int, Tensor] = {}
    out = []
    for tensor in tensors:
        if id(tensor) not in made:
            own = tensor.detach().clone()
            made[id(tensor)] = nn.Parameter(own, requires_grad=trained) if isinstance(tensor, nn.Parameter) else own
        out.append(made[id(tensor)])
    return out


def branch(slots: Sequence[Slot], selected: int, last: int) -> None:
    """Make the tensors those of a new task, which starts with the values of the selected one.

    Args:
        slots: of the model.
        selected: the task whose values the layers hold.
        last: the last task before the new one.
    """
    values = [slot.value for slot in slots]
    made = copies(values, trained=True)
    for slot, tensor in zip(slots, made, strict=True):
        if selected == last:
            slot.keep(last)
        slot.put(tensor)
    _fit_widths(slots)


def switch(slots: Sequence[Slot], selected: int, task: int, last: int) -> None:
    """Make the tensors those of a task: copies of what is kept for it, or the last task's tensors themselves.

    Args:
        slots: of the model.
        selected: the task whose tensors the layers hold.
        task: to select.
        last: the last task.
    """
    if selected == task == last:
        return
    if selected == last:
        for slot in slots:
            slot.keep(last)
    masters = [master for slot in slots if (master := slot.master(task)) is not None]
    for slot, tensor in zip(slots, masters if task == last else copies(masters, trained=False), strict=True):
        if task == last:
            slot.forget(task)
            tensor.requires_grad_(isinstance(tensor, nn.Parameter))
        slot.put(tensor)
    _fit_widths(slots)


def settle(slots: Sequence[Slot], tasks: int) -> None:
    """Keep the selected task's tensors alone, trained again."""
    for slot in slots:
        for task in range(tasks):
            slot.forget(task)
        slot.value.requires_grad_(isinstance(slot.value, nn.Parameter))


def numbers_of(slots: Sequence[Slot], task: int) -> int:
    """Return how many numbers the private tensors of a task are, tied ones counted once."""
    kept = {id(tensor): tensor.numel() for slot in slots for tensor in [slot.master(task)] if tensor is not None}
    return sum(kept.values()) if kept else sum({id(slot.value): slot.value.numel() for slot in slots}.values())


def restart(slots: Sequence[Slot], head: nn.Module | None, outputs: int | None) -> None:
    """Draw the matrices of private layers anew, as torch initializes them; those that are tied to another layer stay.

    Args:
        slots: of the model; the selected task's tensors are changed.
        head: whose number of outputs changes; None for none.
        outputs: that number.
    """
    holders: dict[int, int] = {}
    for slot in slots:
        holders[id(slot.value)] = holders.get(id(slot.value), 0) + 1
    matrices = (slot for slot in slots if slot.value.dim() > 1 and isinstance(slot.value, nn.Parameter))
    for module in {slot.module: None for slot in matrices if not isinstance(slot.module, NORMS)}:
        own = [slot for slot in slots if slot.module is module]
        for slot in own if module is head else ():
            assert outputs is not None
            slot.put(nn.Parameter(slot.value.new_zeros(outputs, *slot.value.shape[1:])))
        again: Any = getattr(module, "reset_parameters", None)
        if again is not None and all(holders.get(id(slot.value), 1) == 1 for slot in own):
            again()
    _fit_widths(slots)


def _fit_widths(slots: Sequence[Slot]) -> None:
    """Let linear layers say how many outputs they have."""
    for module, key in slots:
        if key == "weight" and isinstance(module, nn.Linear):
            module.out_features = module._parameters["weight"].shape[0]  # type: ignore[union-attr]


def make_room(slot: Slot, live: Tensor, kept: Mapping[int, Tensor], made: dict[int, Tensor]) -> None:
    """Give a slot of a model without tasks tensors of the shapes of stored ones; values do not matter.

    Args:
        slot: of the model.
        live: what the layers hold.
        kept: what is kept aside, by task.
        made: by the ``id`` of a stored tensor what was made for it: what was one object becomes one.
    """
    kind = slot.key in slot.module._parameters

    def of(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            zeros = torch.zeros_like(tensor, device=slot.value.device)
            made[id(tensor)] = nn.Parameter(zeros, requires_grad=False) if kind else zeros
        return made[id(tensor)]

    for task, tensor in kept.items():
        slot.put(of(tensor))
        slot.keep(task)
    slot.put(of(live))
    _fit_widths([slot])
