"""`prune_optimizer_state` transforms an optimizer's moments by a cut."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from spectrim.checks import check
from spectrim.errors import LayerError
from spectrim.forms.following import followed
from spectrim.forms.form import Form

FIRST = ("exp_avg", "momentum_buffer", "grad_avg", "mu_product", "prev")
"""Optimizer states that are linear in gradients."""


SQUARED = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "variance")
"""Optimizer states that hold squares of gradients."""


MAGNITUDES = ("exp_inf", "step_size")
"""Optimizer states that hold sizes of gradients or of steps; never negative."""


AVERAGES = ("ax",)
"""Optimizer states that are an average of the parameter itself."""


def prune_optimizer_state(optimizer: Optimizer, old: nn.Module, new: nn.Module) -> None:
    """Make `optimizer`, which trains `old`, train `new` instead, with its moments carried over; in place.

    The cut rotates and truncates each factor: with ``P = U_old^T U_new`` and ``Q = Vh_old Vh_new^T``, a gradient for ``U_new`` is
    ``G P`` where ``G`` is one for ``U_old``, and likewise ``Q^T G`` for ``Vh``; first moments follow exactly that, second moments with the
    entries of ``P`` and ``Q`` squared. For ``S`` the products ``P_ij Q_ij`` are taken: other terms are left out.
    Where the cut only drops values this is slicing. An average of the weights (`torch.optim.ASGD`) is cut as a weight is. Any other
    state of a factor (Adafactor's rows and columns, `torch.optim.LBFGS`) is dropped, so that the optimizer starts it again at its next
    step; a `UserWarning` names it. Learning rates, schedulers and other references to the optimizer stay valid.

    Args:
        optimizer: any torch optimizer over parameters of `old`.
        old: the model before `prune`.
        new: the model that `prune(old, ...)` returned.

    Raises:
        LayerError: when the optimizer holds a parameter that is not in both models; nothing is changed then.
    """
    check("prune_optimizer_state", optimizer=optimizer, old=old, new=new)
    before, after = dict(old.named_parameters()), dict(new.named_parameters())
    _check_trained(optimizer, before, after)
    modules = {name: module for name, module in new.named_modules() if isinstance(module, Form)}
    pairs = ((name, module, modules[name]) for name, module in old.named_modules() if isinstance(module, Form) and name in modules)
    _move(optimizer, before, after, {name: (module, other) for name, module, other in pairs})


def _check_trained(optimizer: Optimizer, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
    """Raise a LayerError unless everything that the optimizer holds is in both models."""
    names = {id(parameter): name for name, parameter in before.items()}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if names.get(id(parameter)) not in after:
            name = names.get(id(parameter), f"tensor {tuple(parameter.shape)}")
            raise LayerError(name, "is trained by the optimizer but is not in both models")


def _move(
    optimizer: Optimizer,
    before: Mapping[str, nn.Parameter],
    after: Mapping[str, nn.Parameter],
    cuts: Mapping[str, tuple[Form, Form]],
) -> None:
    """Exchange the optimizer's parameters by name and carry its state over.

    Args:
        optimizer: trains `before`.
        before: parameters before the cut.
        after: parameters of the same names after it.
        cuts: factors before and after, by the name of their module; the old ones still hold their own tensors.
    """
    maps = _turns((name, *pair) for name, pair in cuts.items())
    averages = _averages(optimizer, cuts)
    names = {id(parameter): name for name, parameter in before.items()}
    dropped: dict[str, int] = {}
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            name = names[id(parameter)]
            group["params"][index] = after[name]
            state = optimizer.state.pop(parameter, None)
            if state is None:
                continue
            unknown = [key for key, value in state.items() if name in maps and not _is_known(key, value, parameter)]
            if unknown or isinstance(optimizer, LBFGS):
                for key in unknown or ["the whole history"]:
                    dropped[key] = dropped.get(key, 0) + 1
                continue
            optimizer.state[after[name]] = {
                key: averages[name, key]
                if (name, key) in averages
                else _carry(value, key, after[name], maps[name])
                if name in maps and isinstance(value, Tensor) and value.dim()
                else value
                for key, value in state.items()
            }
    if isinstance(optimizer, LBFGS):
        optimizer._numel_cache = None  # else it splits its direction by the old sizes
    if dropped:
        _warn(optimizer, dropped)


def _is_known(key: str, value: Any, parameter: Tensor) -> bool:
    """Whether an entry of a factor's state can go through a cut: a number, or of the parameter's shape and of a known meaning."""
    if isinstance(value, Tensor) and value.dim():
        carried = key in FIRST + SQUARED + MAGNITUDES + AVERAGES
        return carried and value.shape == parameter.shape and value.is_floating_point()
    return value is None or isinstance(value, Tensor | int | float | str)


def _warn(optimizer: Optimizer, dropped: Mapping[str, int]) -> None:
    """Say which state a cut could not carry over."""
    what = ", ".join(f"'{key}' ({count} parameter{'s' * (count > 1)})" for key, count in dropped.items())
    message = f"{type(optimizer).__name__}: a cut cannot carry its state {what}; the optimizer starts it again for the factors"
    warnings.warn(message, UserWarning, stacklevel=2)


def _averages(optimizer: Optimizer, cuts: Mapping[str, tuple[Form, Form]]) -> dict[tuple[str, str], Tensor]:
    """Return averages of factors after the cut, by the parameter's name and the key of the state."""
    found: dict[tuple[str, str], Tensor] = {}
    for name, (old, new) in cuts.items():
        parts = old._parameters
        states = {part: optimizer.state.get(parameter, {}) for part, parameter in parts.items() if parameter is not None}
        for key in (key for key in AVERAGES if any(key in state for state in states.values())):
            held = {part: states[part].get(key, parts[part]) for part in states}
            cut = followed(old.like(*held.values()), new)
            for part, like in held.items():
                found[f"{name}.{part}".removeprefix("."), key] = getattr(cut, part).detach().to(like)
    return found


def _turns(pairs: Iterable[tuple[str, Form, Form]]) -> dict[str, dict[int, Tensor]]:
    """Return for each parameter of a form the matrices that its moments are multiplied with, by axis."""
    turned = ((name, old.turns(new)) for name, old, new in pairs)
    return {f"{name}.{part}".removeprefix("."): axes for name, turns in turned for part, axes in turns.items()}


def _carry(value: Tensor, key: str, new: Tensor, turns: Mapping[int, Tensor]) -> Tensor:
    """Carry one entry of an optimizer's state, shaped like the old parameter, over to the new one."""
    squared = key in SQUARED + MAGNITUDES
    moved = value.double().square() if key in MAGNITUDES else value.double()
    for axis, matrix in turns.items():
        turn = (matrix.square() if squared else matrix).to(moved.device)
        if axis >= 0:
            moved = torch.tensordot(moved, turn, dims=([axis], [0])).movedim(-1, axis)
        elif axis == -2:
            moved = turn.mT @ moved
        else:
            moved = moved @ turn if moved.dim() >= turn.dim() else (moved.unsqueeze(-2) @ turn).squeeze(-2)
    if key in MAGNITUDES:
        moved = moved.sqrt()
    return torch.as_tensor(moved, dtype=value.dtype, device=value.device).reshape(new.shape).contiguous()
