"""What tasks share in a network, and how many numbers each of them adds."""

from torch import nn

from spectrim.checks import check, unwrapped
from spectrim.forms.form import Form
from spectrim.forms.tasks import TaskFactors
from spectrim.layers import named_factors
from spectrim.protocols import Where
from spectrim.surgery import private as own
from spectrim.surgery.tasks import columns_in, tasks_of, whole_in

COLUMNS, PRIVATE, SHARED = "columns", "private", "shared"
"""What tasks do with a tensor: add columns to it; have each their own; or share it, frozen."""


def sharing(model: nn.Module, private: Where | None = None) -> dict[str, str]:
    """Return what tasks do with each weight and tensor, by name: ``columns``, ``private`` or ``shared`` (and frozen).

    Args:
        model: factorized; before the first `add_task` it is what that would do.
        private: as for `add_task`.
    """
    check("sharing", model=model)
    model = unwrapped(model)
    slots = own.slots_of(model, whole_in(model, private)) if tasks_of(model) == 1 else own.slots_in(model)
    mine, columns = {(id(slot.module), slot.key) for slot in slots}, columns_in(model)
    found = {name: COLUMNS if name in columns else SHARED for name, _ in named_factors(model)}
    for name, module in model.named_modules():
        for key in () if isinstance(module, Form) else (*module._parameters, *module._buffers):
            if own.MARK not in key and getattr(module, key, None) is not None:
                found[f"{name}.{key}".removeprefix(".")] = PRIVATE if (id(module), key) in mine else SHARED
    return found


def params_of_task(model: nn.Module, task: int) -> int:
    """Return how many numbers a network stores for one task alone: its columns, selectors and private tensors, running statistics included.

    For a linear layer, ``new (in + out)`` for columns, one for each column used, and ``out`` for the bias.

    Args:
        model: with tasks.
        task: in ``[0, number of tasks)``.
    """
    check("params_of_task", model=model)
    model = unwrapped(model)
    columns = sum(form.params_of(task) for form in columns_in(model).values() if isinstance(form, TaskFactors))
    return columns + own.numbers_of(own.slots_in(model), task)
