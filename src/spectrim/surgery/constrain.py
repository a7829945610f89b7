"""`constrain`: the weights of a factorized network with zeros, on levels, or both."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from spectrim.checks import check, outside_inference_mode, unwrapped
from spectrim.errors import LayerError, SettingError
from spectrim.forms import Form, Rounded, Sparse, TaskFactors
from spectrim.forms.quaternion import QuaternionFactors
from spectrim.layers import named_factors
from spectrim.protocols import Where
from spectrim.surgery.exchange import duplicate
from spectrim.surgery.select import layer_filter
from spectrim.surgery.states import exchange_factors


@outside_inference_mode
@torch.no_grad()
def constrain(
    model: nn.Module,
    *,
    keep: int | float | Mapping[str, int | float] | None = None,
    bits: int | Mapping[str, int] | None = None,
    steps: Mapping[str, float] | None = None,
    where: Where | None = None,
) -> nn.Module:
    """Return a copy of a factorized network whose weights are held pruned (`Sparse`), rounded (`Rounded`), or both.

    Every form can be: ``factorize(model, "dense")`` holds weights as they are. The copy trains through rounding (straight through) and
    keeps its zeros; `allocate` and `prune` choose bits and counts as they choose ranks, at ``Budget(coded_bytes=...)`` too; `merge` writes
    ordinary layers with these zeros and levels, and `pack` codes them.

    Args:
        model: factorized, at its final ranks or not; it is left untouched.
        keep: entries of each weight that are not zero, a fraction (a float in (0, 1]) or a count; or by the names of weights. None prunes
            nothing.
        bits: in [2, 8], or 32 to round nothing yet; or by the names of weights. None rounds nothing.
        steps: between levels, by the names of dense weights, such as those that `spectrim.budget.rounding.round_to.round_to` reports:
            what it rounded is then trained on its own levels. Weights that are not named stay as they are.
        where: selects layers among the factorized ones; all when omitted.

    Raises:
        SettingError: for a value outside its range.
        LayerError: when nothing is factorized or selected, or for a weight of several tasks or of quaternions.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> from spectrim.surgery.merge import merge
        >>> low = factorize(nn.Sequential(nn.Linear(8, 8, bias=False)), "dense", where="0")
        >>> small = merge(constrain(low, keep=0.25, bits=3))
        >>> int(small[0].weight.count_nonzero()) <= 16, len(small[0].weight.unique()) <= 7
        (True, True)
    """
    check("constrain", model=model, where=where)
    made = duplicate(unwrapped(model))
    chosen = layer_filter(where, made, "constrain")
    forms = dict(named_factors(made))
    if steps is not None and (keep is not None or bits is not None):
        raise SettingError("constrain", "steps", got=steps, rule="given without keep and bits: they decide the levels")
    modules = dict(made.named_modules())
    new: dict[str, Form] = {}
    for name, form in forms.items():
        layer = name if name in modules else name.rpartition(".")[0]
        if steps is not None and name in steps:
            new[name] = _on_steps(name, form, steps[name])
        elif steps is None and (chosen is None or chosen(layer, modules[layer])):
            new[name] = _constrained(name, form, _given(keep, name), _given(bits, name))
    if not new:
        raise LayerError(type(model).__name__, "has no factorized layer to constrain", hint='call factorize(model, "dense") first')
    exchange_factors(made, new)
    return made


def _on_steps(name: str, form: Form, step: float) -> Form:
    try:
        made: Form = Rounded.on(form, step)
        return made
    except SettingError as error:
        raise LayerError(name, str(error), hint="leave it out of steps, so that it is not trained") from None


def _given(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else value


def _constrained(name: str, form: Form, keep: int | float | None, bits: int | None) -> Form:
    if isinstance(form, TaskFactors | QuaternionFactors):
        raise LayerError(
            name, f"is held as {form.called}", hint="merge first: of several tasks and of quaternions no parts are pruned or rounded"
        )
    if keep is not None:
        form = Sparse.of(form, keep)
    return form if bits is None else Rounded.of(form, bits)
