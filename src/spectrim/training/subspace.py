"""`Subspace`: a torch optimizer that moves all parameters of a network within a few directions."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectrim.errors import SettingError
from spectrim.training.basis import Basis, check_shapes
from spectrim.training.quasi_newton import BFGS

Closure = Callable[[], Any]


class Subspace(Optimizer):
    """SGD with momentum, or BFGS, in the span of a `Basis`: ``w - lr P^T m`` with ``m = momentum m + P g`` (P-SGD).

    In any loop, with `fit`, and with any schedule of the learning rate. Buffers are not parameters: BatchNorm updates its statistics as
    it always does.

    With ``bfgs=BFGS()`` (P-BFGS) `step` needs a closure that zeroes gradients, computes the loss, calls ``backward`` and returns the loss;
    `fit` gives none. `lr` is then the length of the first trial.

    Args:
        params: all parameters of the trajectory, in its order: ``model.parameters()``. They are left as they are; training begins there.
        basis: the directions; a copy lies on the device of the parameters.
        lr: learning rate, >= 0.
        momentum: of P-SGD, in [0, 1).
        weight_decay: ``weight_decay w`` is added to the gradient, >= 0.
        bfgs: settings of P-BFGS; None for P-SGD.
        residual: also move along what is left of the gradient outside of the subspace, ``w - lr residual r`` with
            ``r = residual_momentum r + (g - P^T P g)``; 0 for not at all.
        residual_momentum: in [0, 1).

    Raises:
        LayerError: for parameters of other shapes than in the basis.
        SettingError: for a value outside its range, several parameter groups, or a state of another subspace.

    Examples:
        >>> model = nn.Linear(3, 1)
        >>> optimizer = Subspace(model.parameters(), Basis.of(model, torch.eye(2, 4)), lr=0.1)
        >>> before = model.weight.detach().clone()
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> optimizer.step()
        >>> (model.weight.detach() - before)[0, 2].item()
        0.0

    Source: Li et al., "Low dimensional trajectory hypothesis is true: DNNs can be trained in tiny subspaces", TPAMI 2022; code nblt/DLDR.
    Deviation: the rate of the residual is relative to `lr`, so that schedules reach it, and P-SGD can have one.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | Iterable[tuple[str, nn.Parameter]],
        basis: Basis,
        lr: float = 1.0,
        momentum: float = 0.9,
        *,
        weight_decay: float = 0.0,
        bfgs: BFGS | None = None,
        residual: float = 0.0,
        residual_momentum: float = 0.9,
    ) -> None:
        if not isinstance(basis, Basis):
            hint = "trajectory.basis(size) makes one"
            raise SettingError("Subspace", "basis", got=type(basis).__name__, rule="a Basis", hint=hint)
        if bfgs is not None and not isinstance(bfgs, BFGS):
            raise SettingError("Subspace", "bfgs", got=bfgs, rule="BFGS(...) or None")
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("residual", residual)):
            if not value >= 0:
                raise SettingError("Subspace", name, got=value, rule="a number >= 0")
        for name, value in (("momentum", momentum), ("residual_momentum", residual_momentum)):
            if not 0 <= value < 1:
                raise SettingError("Subspace", name, got=value, rule="a number in [0, 1)")
        rates = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, rates | {"residual": residual, "residual_momentum": residual_momentum, "basis": basis.digest})
        if len(self.param_groups) != 1:
            raise SettingError("Subspace", "params", got=f"{len(self.param_groups)} groups", rule="one group: all parameters share a rate")
        check_shapes(basis.layout, self.parameters, "Subspace")
        self.bfgs, self.layout = bfgs, basis.layout
        self.directions = basis.directions.to(self.parameters[0].device)

    @property
    def needs_closure(self) -> bool:
        """Whether `step` needs one."""
        return self.bfgs is not None

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters, in the order of the basis."""
        held: list[Tensor] = self.param_groups[0]["params"]
        return held

    @property
    def memory(self) -> dict[str, Any]:
        """What the next step depends on; torch keeps state by parameter, and this is that of the first one."""
        found: dict[str, Any] = self.state[self.parameters[0]]
        return found

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Make a step.

        Args:
            closure: computes the loss and its gradients again and returns the loss; needed for P-BFGS.
        """
        check_shapes(self.layout, self.parameters, "Subspace")
        if self.bfgs is not None:
            return self._bfgs_step(self.bfgs, closure)
        loss = None if closure is None else self._called(closure)
        if all(parameter.grad is None for parameter in self.parameters):
            return loss
        group, memory = self.param_groups[0], self.memory
        gradient = self._gradient()
        inner = self.directions @ gradient
        memory["momentum"] = memory["momentum"].mul_(group["momentum"]).add_(inner) if "momentum" in memory else inner.clone()
        self._move(self.directions.mT @ memory["momentum"], -float(group["lr"]))
        self._move_outside(gradient, inner)
        return loss

    def _bfgs_step(self, bfgs: BFGS, closure: Closure | None) -> Any:
        if closure is None:
            hint = "zero the gradients, compute the loss, call backward and return the loss in it; fit gives none: use P-SGD there"
            raise SettingError("Subspace", "closure", got=None, rule="given for P-BFGS", hint=hint)
        memory = self.memory
        loss = self._called(closure)
        gradient = self._gradient()
        inner = self.directions @ gradient
        here = inner.cpu().double()
        inverse = memory.get("inverse", torch.eye(len(here), dtype=torch.float64)).cpu()
        if bfgs.curvature == "steps" and "step" in memory:
            inverse = bfgs.updated(inverse, memory["step"].cpu(), here - memory["gradient"].cpu())
        direction = -(inverse @ here)
        taken = self._search(bfgs, closure, _number(loss), direction, float(here @ direction))
        if taken is None:
            memory.pop("step", None)
            inverse = torch.eye(len(here), dtype=torch.float64)
        elif bfgs.curvature == "batch":
            inverse = bfgs.updated(inverse, taken, (self.directions @ self._gradient()).cpu().double() - here)
        else:
            memory["step"], memory["gradient"] = taken, here
        memory["inverse"] = inverse
        self._move_outside(gradient, inner)
        return loss

    def _search(self, bfgs: BFGS, closure: Closure, loss: float, direction: Tensor, slope: float) -> Tensor | None:
        """Move to the first trial that decreases the loss enough and return that step; None, and nothing moved, where there is none."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        decay, start = float(self.param_groups[0]["weight_decay"]), self._norm()
        length = float(self.param_groups[0]["lr"])
        vector = self.directions.mT @ direction.to(self.directions)
        for _ in range(bfgs.trials):
            self._move(vector, length)
            found = _number(self._called(closure)) + 0.5 * decay * (self._norm() - start)
            if found <= loss + bfgs.armijo * length * slope:
                return length * direction
            self._put_back(before)
            length *= bfgs.shrink
        return None

    def _called(self, closure: Closure) -> Any:
        """Call the closure, with gradients, and count the call."""
        self.memory["calls"] = self.memory.get("calls", 0) + 1
        with torch.enable_grad():
            return closure()

    def _gradient(self) -> Tensor:
        """Return the gradient of all parameters, ``(parameters,)``, with the decay; zeros for parameters that have none."""
        decay = float(self.param_groups[0]["weight_decay"])
        parts = []
        for p in self.parameters:
            part = torch.zeros_like(p) if p.grad is None else p.grad.to_dense() if p.grad.is_sparse else p.grad
            parts.append((part + decay * p if decay else part).reshape(-1).to(self.directions))
        return torch.cat(parts)

    def _norm(self) -> float:
        """Return the squared norm of all parameters where they decay, else 0."""
        if not self.param_groups[0]["weight_decay"]:
            return 0.0
        return sum(float(p.detach().double().square().sum()) for p in self.parameters)

    def _move(self, vector: Tensor, factor: float) -> None:
        """Add a multiple of a vector to the parameters."""
        parts = torch.split(vector, [p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.add_(part.view(parameter.shape).to(parameter.dtype), alpha=factor)

    def _move_outside(self, gradient: Tensor, inner: Tensor) -> None:
        """Move along what is left of the gradient outside of the subspace, where that is asked for."""
        group, memory = self.param_groups[0], self.memory
        if not group["residual"]:
            return
        rest = gradient - self.directions.mT @ inner
        memory["rest"] = memory["rest"].mul_(group["residual_momentum"]).add_(rest) if "rest" in memory else rest
        self._move(memory["rest"], -float(group["lr"]) * float(group["residual"]))

    def _put_back(self, before: list[Tensor]) -> None:
        for parameter, values in zip(self.parameters, before, strict=True):
            parameter.copy_(values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict`, in the dtypes in which it was kept.

        Raises:
            SettingError: for the state of another subspace.
        """
        (group,) = state_dict["param_groups"]
        own = self.param_groups[0]["basis"]
        if group.get("basis") != own:
            hint = "take the basis from the same samples, with the same size and dtype"
            raise SettingError("Subspace", "state", got=f"that of basis {group.get('basis')}", rule=f"that of basis {own}", hint=hint)
        super().load_state_dict(state_dict)
        kept = state_dict["state"].get(group["params"][0], {})
        self.state[self.parameters[0]] = {key: _copied(value, self.directions.device) for key, value in kept.items()}

    def __getstate__(self) -> dict[str, Any]:
        more = {"bfgs": self.bfgs, "layout": self.layout, "directions": self.directions}
        return super().__getstate__() | more


def _number(loss: Any) -> float:
    """Return a loss as a number."""
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def _copied(value: Any, device: torch.device) -> Any:
    """Return a copy of an entry of the memory; small matrices of BFGS stay in float64, and on the CPU where a device has none."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if value.dtype == torch.float64 else value.detach().to(device, copy=True)
