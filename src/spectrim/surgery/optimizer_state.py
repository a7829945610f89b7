"""`prune_optimizer_state` carries an optimizer's moments through a cut."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectrim.errors import LayerError
from spectrim.forms.svd import Factors

SQUARED = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "variance")
"""Optimizer states that hold squares of gradients."""


MAGNITUDES = ("exp_inf", "step_size")
"""Optimizer states that hold sizes of gradients or of steps; never negative."""


def prune_optimizer_state(optimizer: Optimizer, old: nn.Module, new: nn.Module) -> None:
    """Make `optimizer`, which trains `old`, train `new` instead, with its moments carried over; in place.

    The cut rotates and truncates each factor: with ``P = U_old^T U_new`` and ``Q = Vh_old Vh_new^T``, a gradient for ``U_new`` is
    ``G P`` where ``G`` is one for ``U_old``, and likewise ``Q^T G`` for ``Vh``; first moments follow exactly that, second moments with the
    entries of ``P`` and ``Q`` squared. For ``S`` the products ``P_ij Q_ij`` are taken: what ``S_old`` cannot see is left out.
    Where the cut only drops values all this is slicing. A state that holds anything else (Adafactor's rows and columns) starts anew.
    Learning rates, schedulers and everything that refers to the optimizer stay valid.

    Args:
        optimizer: any torch optimizer over parameters of `old`.
        old: the model before `prune`.
        new: the model that `prune(old, ...)` returned.

    Raises:
        LayerError: when the optimizer holds a parameter that is not in both models; nothing is changed then.
    """
    before, after = dict(old.named_parameters()), dict(new.named_parameters())
    _check_trained(optimizer, before, after)
    modules = {name: module for name, module in new.named_modules() if isinstance(module, Factors)}
    pairs = ((name, module, modules[name]) for name, module in old.named_modules() if isinstance(module, Factors) and name in modules)
    _move(optimizer, before, after, _rotations(pairs))


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
    maps: Mapping[str, tuple[str, Tensor, Tensor]],
) -> None:
    """Exchange the optimizer's parameters by name and carry its state over."""
    names = {id(parameter): name for name, parameter in before.items()}
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            name = names[id(parameter)]
            group["params"][index] = after[name]
            state = optimizer.state.pop(parameter, None)
            if state is None:
                continue
            if name in maps and any(isinstance(v, Tensor) and v.dim() > 0 and v.shape != parameter.shape for v in state.values()):
                continue
            optimizer.state[after[name]] = {
                key: _carry(value, key, after[name], maps[name]) if name in maps and isinstance(value, Tensor) and value.dim() else value
                for key, value in state.items()
            }


def _rotations(pairs: Iterable[tuple[str, Factors, Factors]]) -> dict[str, tuple[str, Tensor, Tensor]]:
    """Return for each factor parameter its role and the matrices ``P`` and ``Q``."""
    maps: dict[str, tuple[str, Tensor, Tensor]] = {}
    for name, old, new in pairs:
        U, Vh = old.U.detach().double(), old.Vh.detach().double()
        P, Q = U.mT @ new.U.detach().double(), Vh @ new.Vh.detach().double().mT
        prefix = f"{name}." if name else ""
        maps |= {f"{prefix}U": ("U", P, Q), f"{prefix}S": ("S", P, Q), f"{prefix}Vh": ("Vh", P, Q)}
    return maps


def _carry(value: Tensor, key: str, new: Tensor, rotation: tuple[str, Tensor, Tensor]) -> Tensor:
    """Carry one entry of an optimizer's state, shaped like the old parameter, over to the new one."""
    role, P, Q = rotation
    squared = key in SQUARED + MAGNITUDES
    moment = value.double().square() if key in MAGNITUDES else value.double()
    if role == "U":
        moved = moment @ (P.square() if squared else P)
    elif role == "Vh":
        moved = (Q.square() if squared else Q).mT @ moment
    else:
        mix = (P * Q).square() if squared else P * Q
        moved = (moment.unsqueeze(-2) @ mix).squeeze(-2)
    if key in MAGNITUDES:
        moved = moved.sqrt()
    return torch.as_tensor(moved, dtype=value.dtype, device=value.device).reshape(new.shape).contiguous()
