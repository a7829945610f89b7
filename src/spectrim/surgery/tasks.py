"""Many tasks in one network: `add_task`, `select_task`, `prune_task`, and `one_task` for a network of a single one."""

from collections.abc import Mapping
from operator import index
from typing import Any, SupportsIndex

from torch import Tensor, nn

from spectrim.checks import RULES, check, outside_inference_mode, unwrapped
from spectrim.checks.messages import fail
from spectrim.checks.words import worded
from spectrim.errors import LayerError, RankError, SettingError
from spectrim.forms.form import Form
from spectrim.forms.svd import Factors
from spectrim.forms.tasks import Start, TaskFactors
from spectrim.layers import is_factorized, named_factors, sites
from spectrim.layers.sharded import refuse_shards
from spectrim.protocols import Where
from spectrim.surgery import private as own
from spectrim.surgery.exchange import duplicate
from spectrim.surgery.head import head_of
from spectrim.surgery.select import layer_filter


@outside_inference_mode
@worded
def add_task(
    model: nn.Module,
    rank: int | Mapping[str, int] = 1,
    *,
    private: Where | None = None,
    reuse: bool = True,
    start: Start = "copy",
    outputs: int | None = None,
) -> nn.Module:
    """Add a task to a factorized network and select it, in place: what was trained before stays as it is, to the bit.

    Each factorized weight becomes ``U diag(s) Vh`` with the columns of all tasks so far, which are frozen, `rank` new ones, and a selector
    ``s`` for this task. Biases, norms and the head are this task's own, too. Everything else is shared and frozen: `sharing` lists it. The
    first call makes the network, as it was trained, task 0. Train then with a new optimizer over ``model.parameters()``.

    Args:
        model: factorized; the weights in SVD forms that are trained get columns. Changed in place.
        rank: new columns of each weight, in ``[0, min(out, in)]``; or by weight, with the names of `coverage`, 1 for others.
        private: dense layers whose matrices are a task's own, as `match` selects them; the classifier head when omitted. What is private
            is decided by the first call.
        reuse: whether the task uses the columns of earlier ones.
        start: first values of the selector for earlier columns: ``copy``, those of the task that is selected now; or a number.
        outputs: the head's number of classes; as before when omitted.

    Returns:
        The model. Biases and norms start with the values of the task that was selected; the head is initialized as torch does it.

    Raises:
        SettingError: for an argument outside its range, or `private` after the first call.
        RankError: for a rank outside ``[0, min(out, in)]``, or 0 without reuse.
        LayerError: when no weight takes columns, for a name that is no such weight, or for `outputs` without a private linear head.
            Nothing is changed where an error is raised.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> model = factorize(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), rank=2)
        >>> model = add_task(add_task(model, rank=1), rank=1)
        >>> tasks_of(model), selected_task(model), tuple(model[0].U.shape)
        (3, 2, (6, 4))

    Source: Hyder et al., "Incremental task learning with incremental rank updates", ECCV 2022, arXiv 2207.09074.
    Deviation: the columns of the first task are those of any factorized network, pruned or not, instead of random ones of a fixed number.
    """
    check("add_task", model=model)
    model = unwrapped(model)
    refuse_shards(model, "add_task")
    _check(model, rank, private, start, outputs)
    first, last, selected = tasks_of(model) == 1, tasks_of(model) - 1, selected_task(model)
    slots = own.slots_of(model, whole_in(model, private)) if first else own.slots_in(model)
    forms = columns_in(model)
    wanted = {name: _wanted(name, form, rank, reuse) for name, form in forms.items()}
    head = _head(model, slots) if outputs is not None else None
    if first:
        _exchange(model, {form: TaskFactors(form) for form in forms.values()})
    for name, form in columns_in(model).items():
        assert isinstance(form, TaskFactors)
        form.add(wanted[name], reuse=reuse, start=start)
    own.branch(slots, selected, last)
    own.restart(slots, head, outputs)
    _freeze_rest(model, slots)
    return model


@outside_inference_mode
def select_task(model: nn.Module, task: int) -> nn.Module:
    """Make a network that of one of its tasks, in place, and return it; tasks count from 0.

    Only the last task can be trained further, as nothing depends on it; while another is selected, every parameter is frozen. An optimizer
    over the last task's parameters stays valid through a change to another and back.

    Args:
        model: with tasks.
        task: in ``[0, number of tasks)``.

    Raises:
        SettingError: for another number.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> model = add_task(factorize(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))))
        >>> selected_task(select_task(model, 0))
        0
    """
    check("select_task", model=model)
    model = unwrapped(model)
    tasks = tasks_of(model)
    if isinstance(task, bool) or not isinstance(task, SupportsIndex) or not 0 <= index(task) < tasks:
        hint = "add_task(model) adds one" if tasks == 1 else ""
        raise fail("select_task", "task", task, f"an integer in [0, {tasks - 1}]: the model has {_counted(tasks)}", hint)
    if tasks > 1:
        own.switch(own.slots_in(model), selected_task(model), index(task), tasks - 1)
        for form in columns_in(model).values():
            assert isinstance(form, TaskFactors)
            form.select(index(task))
    return model


@outside_inference_mode
def prune_task(model: nn.Module, keep: float = 0.999) -> dict[str, int]:
    """Cut the new columns of the last task to the fewest that hold its weights up to a share of their energy, in place.

    For each weight what the new columns add is decomposed, and its least singular values go, so that the squared error is at most
    ``1 - keep`` of the weight's squared norm. Earlier columns, which other tasks use, stay as they are. For the end of a task's training,
    with penalties: `Orthogonality` holds new columns orthogonal to earlier ones, `L1` shrinks their values. Make a new optimizer after it.

    Args:
        model: with tasks.
        keep: fraction in (0, 1] of the energy of each weight.

    Returns:
        The number of new columns left, by weight; 0 where earlier columns are enough, at least 1 in a task that does not reuse them.

    Raises:
        SettingError: for another fraction, or a model without tasks.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> model = add_task(factorize(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))), rank=3)
        >>> prune_task(model, keep=0.5)
        {'0': 0}
    """
    check("prune_task", model=model)
    model = unwrapped(model)
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise fail("prune_task", "keep", keep, "a fraction in (0, 1]")
    if tasks_of(model) == 1:
        raise fail("prune_task", "model", model, "a network with tasks", "add_task(model) adds one; prune(model, ranks) cuts the first")
    left = {}
    for name, form in columns_in(model).items():
        assert isinstance(form, TaskFactors)
        left[name] = form.drop(keep)
    return left


@outside_inference_mode
def one_task(model: nn.Module, task: int | None = None) -> nn.Module:
    """Return a copy of a network that is one of its tasks alone: an ordinary factorized network, which `prune` and `merge` take.

    Args:
        model: with tasks; left untouched.
        task: in ``[0, number of tasks)``; the selected one when omitted.

    Returns:
        A factorized network without tasks; what the task had of its own is trained again. A weight with more columns than its full rank
        is decomposed, all others keep their columns.

    Raises:
        SettingError: for a task that is not there.
    """
    check("one_task", model=model)
    clone = duplicate(unwrapped(model))
    settle_(clone if task is None else select_task(clone, task))
    return clone


def settle_(model: nn.Module) -> None:
    """Make a network the selected task's alone, in place; one without tasks stays as it is."""
    tasks = tasks_of(model)
    if tasks == 1:
        return
    own.settle(own.slots_in(model), tasks)
    _exchange(model, {form: form.of_task(form.selected) for form in columns_in(model).values() if isinstance(form, TaskFactors)})


def tasks_of(model: nn.Module) -> int:
    """Return the number of tasks in a network; 1 where `add_task` was not called."""
    return next((form.tasks for _, form in named_factors(model) if isinstance(form, TaskFactors)), 1)


def selected_task(model: nn.Module) -> int:
    """Return the task that a network computes."""
    return next((form.selected for _, form in named_factors(model) if isinstance(form, TaskFactors)), 0)


def columns_in(model: nn.Module) -> dict[str, Factors]:
    """Return the weights that tasks add columns to, by name: trained ones in SVD forms, tied ones once.

    Raises:
        LayerError: when there are none.
    """
    many = tasks_of(model) > 1
    kinds = TaskFactors if many else Factors
    found = {name: form for name, form in named_factors(model) if isinstance(form, kinds) and (many or form.trained)}
    if not found:
        hint = "call factorize(model, rank=...) first, in a scheme of matrices; frozen weights take no columns"
        raise LayerError(type(model).__name__, "has no factorized weight that takes columns", hint=hint)
    return found


def _exchange(model: nn.Module, new: Mapping[Factors, Factors]) -> None:
    """Replace forms wherever they are used, in place."""
    for site in list(sites(model)):
        if isinstance(site.factors, Factors) and site.factors in new:
            site.layer.factors[site.key] = new[site.factors]


def _check(model: nn.Module, rank: Any, private: Any, start: Any, outputs: Any) -> None:
    if not isinstance(rank, Mapping) and (isinstance(rank, bool | Tensor) or not isinstance(rank, SupportsIndex)):
        raise fail("add_task", "rank", rank, "an integer of at least 0, or a dict {layer: rank}")
    if private is not None and tasks_of(model) > 1:
        raise fail("add_task", "private", private, "omitted after the first call", "what is private then stays so")
    if start != "copy" and (isinstance(start, bool | str) or not isinstance(start, int | float) or not abs(start) < float("inf")):
        raise fail("add_task", "start", start, "'copy' or a finite number")
    if outputs is not None and (isinstance(outputs, bool) or not isinstance(outputs, int) or outputs < 1):
        raise fail("add_task", "outputs", outputs, "an integer of at least 1")
    if isinstance(rank, Mapping) and (unknown := sorted(set(rank) - set(columns_in(model)))):
        raise LayerError(unknown[0], "is no weight that takes columns", hint="sharing(model) lists them")


def _wanted(name: str, form: Factors, rank: Any, reuse: bool) -> int:
    """Return the number of new columns of a weight."""
    got = rank.get(name, 1) if isinstance(rank, Mapping) else rank
    (out, in_), least = form.shape, 0 if reuse else 1
    if isinstance(got, bool | Tensor) or not isinstance(got, SupportsIndex) or not 0 <= index(got) <= min(out, in_):
        raise RankError(name, got=got, out=out, in_=in_)
    if index(got) < least:
        raise SettingError("add_task", "rank", got=got, rule="at least 1 with reuse=False", hint=f"'{name}' would have no column")
    return index(got)


def whole_in(model: nn.Module, private: Where | None) -> Any:
    """Return the predicate of layers whose matrices are private."""
    if private is None:
        head = head_of(model)
        chosen = {model.get_submodule(head)} if head is not None else set[nn.Module]()
        return lambda module: module in chosen
    RULES["where"]("add_task", "private", private)
    try:
        select = layer_filter(private, model, "add_task")
    except SettingError as error:
        raise SettingError("add_task", "private", got=error.got, rule=error.rule) from error
    assert select is not None
    named = {module: name for name, module in model.named_modules() if not isinstance(module, Form) and select(name, module)}
    for module, name in named.items():
        if is_factorized(module):
            hint = "to make its weight private leave it out of factorize with where="
            raise LayerError(name, "is factorized: tasks add columns to its weight", hint=hint)
    return lambda module: module in named


def _head(model: nn.Module, slots: list[own.Slot]) -> nn.Module:
    """Return the head whose number of outputs changes."""
    name = head_of(model)
    head = None if name is None else model.get_submodule(name)
    if not isinstance(head, nn.Linear) or not any(slot.module is head and slot.key == "weight" for slot in slots):
        raise LayerError(name or type(model).__name__, "has no private linear head, whose outputs could change", hint="omit outputs=")
    return head


def _freeze_rest(model: nn.Module, slots: list[own.Slot]) -> None:
    """Freeze what all tasks share."""
    free = {id(slot.value) for slot in slots}
    held = {id(part) for form in columns_in(model).values() for part in form.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in free | held:
            parameter.requires_grad_(False)
            parameter.grad = None


def _counted(tasks: int) -> str:
    return "one task" if tasks == 1 else f"{tasks} tasks"
