"""Networks of many tasks in a file: the plan says which columns each task uses, names and shapes of tensors say the rest."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from spectrim.errors import LayerError
from spectrim.forms.svd import Factors
from spectrim.forms.tasks import TaskFactors
from spectrim.layers import named_factors, sites
from spectrim.surgery import private as own
from spectrim.surgery.tasks import selected_task, tasks_of

FIRST = f"{own.MARK}0"
"""The end of the name of what is kept aside for task 0."""


def plan_of_tasks(model: nn.Module) -> dict[str, Any]:
    """Return what a plan says of tasks; nothing for a network without them."""
    if tasks_of(model) == 1:
        return {}
    used = {name: [list(groups) for groups in form.used] for name, form in named_factors(model) if isinstance(form, TaskFactors)}
    return {"tasks": {"selected": selected_task(model), "used": used}}


def rebuild_tasks(model: nn.Module, plan: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Give a network that was rebuilt without tasks the forms and private tensors of its tasks, in place; the values do not matter.

    Args:
        model: as `storage.save` rebuilds it.
        plan: of the file.
        state: the tensors of the file, by name; they give the shapes.

    Raises:
        LayerError, KeyError: for a plan that does not fit them.
    """
    stored = plan.get("tasks")
    if not stored:
        return
    selected, used = int(stored["selected"]), stored["used"]
    modules = {module: name for name, module in model.named_modules()}
    made = {
        form: _form(form, f"{modules[form]}.".removeprefix("."), used[name], state) for name, form in named_factors(model) if name in used
    }
    for site in list(sites(model)):
        if site.factors in made:
            site.layer.factors[site.key] = made[site.factors]
    tasks = {form.tasks for form in made.values()}
    if len(made) != len(used) or len(tasks) != 1 or not 0 <= selected < max(tasks):
        raise KeyError("tasks")
    for form in made.values():
        form.select(selected)
    _private(model, state, max(tasks))


def _form(form: Any, prefix: str, used: Any, state: Mapping[str, Tensor]) -> TaskFactors:
    """Return the form of one weight."""
    assert isinstance(form, Factors)
    parts = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    return TaskFactors.of_parts(form, parts, used)


def _private(model: nn.Module, state: Mapping[str, Tensor], tasks: int) -> None:
    """Make room for what each task has of its own."""
    modules, made = dict(model.named_modules(remove_duplicate=False)), dict[int, Tensor]()
    seen: set[tuple[int, str]] = set()
    for name in (key.removesuffix(FIRST) for key in state if key.endswith(FIRST)):
        layer, _, key = name.rpartition(".")
        if (id(modules[layer]), key) in seen:  # a shared layer under another name
            continue
        seen.add((id(modules[layer]), key))
        kept = {task: state[kept] for task in range(tasks) if (kept := f"{name}{own.MARK}{task}") in state}
        slot = own.Slot(modules[layer], key)
        if slot.value.shape != kept[0].shape:
            shapes = f"{tuple(kept[0].shape)} in the file, {tuple(slot.value.shape)} in the model"
            raise LayerError(layer, f"its {key} of task 0 is {shapes}")
        own.make_room(slot, state[name], kept, made)
