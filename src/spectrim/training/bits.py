"""What a training step costs in bit operations, and the bits that cost a given share."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spectrim.errors import SettingError
from spectrim.forms.arithmetic import Arithmetic
from spectrim.layers import has_matrix, kind_of, named_factors
from spectrim.layers.rounded import computed, lend, lending, operations_of
from spectrim.linalg.rounding import EXACT
from spectrim.metrics.calls import call_model, evaluating, unfused
from spectrim.metrics.inputs import batch_size_of

Vector = NDArray[np.float64]

STATIC = 8
"""Bits of the training that a cost is a share of: inputs, weights and gradients."""


def bit_operations(macs: Any, bits: Any, gradient_bits: int) -> Any:
    """Return the bit operations of one training step: ``macs (b b + b g + b g)``, forward, gradient of inputs, gradient of weights.

    Args:
        macs: multiply-accumulates of the forward pass.
        bits: ``b``, of inputs and weights.
        gradient_bits: ``g``, of the gradients of outputs.

    Examples:
        >>> bit_operations(10, 8, 8)
        1920

    Source: GATECH-EIC/CPT and GATECH-EIC/FracTrain, which divide by ``3 * 32^2 macs``.
    """
    return macs * (bits * bits + 2 * bits * gradient_bits)


def counted(owner: str, model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Run a model once in eval mode, and return what it computes: ``macs`` of one example by operation, and ``sizes`` by weight.

    Args:
        owner: for errors.
        model: dense or factorized; factors count as the operations that they are.
        inputs: one batch.

    Raises:
        SettingError: for a model without a layer that can compute in fewer bits.
    """
    held = computed(model)
    trial = {name: Arithmetic([STATIC] * len(operations_of(name, module))) for name, module in held.items()}
    with lending(model, trial), unfused(), evaluating(model):
        call_model(model, inputs)
    batch = batch_size_of(inputs, model=model, unknown=1)
    macs = {
        operation: done / batch
        for name, module in held.items()
        for operation, done in zip(operations_of(name, module), trial[name].macs, strict=True)
        if done
    }
    if not macs:
        rule = "a network with linear layers or convolutions that are called"
        raise SettingError(owner, "model", got=type(model).__name__, rule=rule)
    return {"macs": macs, "sizes": sizes_of(model)}


def left_in_float(model: nn.Module, macs: Mapping[str, float]) -> list[str]:
    """Return the names of layers with matrices of which nothing is counted: recurrent layers, attention, transposed ones."""
    done = {name for name, module in computed(model).items() if any(operation in macs for operation in operations_of(name, module))}
    layers = {name for name, module in model.named_modules() if has_matrix(module) and not _looks_up(module)}
    return sorted(name for name in layers if not any(name == one or one.startswith(f"{name}.") for one in done))


def _looks_up(module: nn.Module) -> bool:
    """Whether a layer looks rows up and multiplies nothing."""
    kind = kind_of(module)
    return bool(getattr(module if kind is None else kind, "looks_up", False))


def sizes_of(model: nn.Module) -> dict[str, Any]:
    """Return the present size of each factorized weight, which its multiply-accumulates depend on."""
    return {name: form.size for name, form in named_factors(model)}


def arithmetics(model: nn.Module, bits: Mapping[str, int], gradient_bits: int, *, learned: bool = False) -> dict[str, Arithmetic]:
    """Return the arithmetic of each weight that has an operation in `bits`; other operations are exact."""
    made = {}
    for name, module in computed(model).items():
        operations = operations_of(name, module)
        if any(operation in bits for operation in operations):
            made[name] = Arithmetic([bits.get(operation, EXACT) for operation in operations], gradient_bits, learned=learned)
    return made


def lend_bits(model: nn.Module, bits: Mapping[str, int], gradient_bits: int, *, learned: bool = False) -> None:
    """Let a model compute in these bits, by operation, until they are taken back."""
    lend(model, arithmetics(model, bits, gradient_bits, learned=learned))


def slopes_of(model: nn.Module, lent: Mapping[str, Arithmetic]) -> dict[str, float]:
    """Return the gradient of the loss with respect to the bits, by operation, the mean over processes; none where nothing was learned."""
    held = computed(model)
    grads = {name: arithmetic.slopes.grad for name, arithmetic in lent.items()}
    found = [grad for grad in grads.values() if grad is not None]
    if not found:
        return {}
    together = torch.cat([torch.zeros_like(lent[name].slopes) if grad is None else grad for name, grad in grads.items()]).double()
    together = _over_processes(together.detach())
    names = [operation for name in grads for operation in operations_of(name, held[name])]
    return dict(zip(names, together.tolist(), strict=True))


def _over_processes(values: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(values)
        values = values / torch.distributed.get_world_size()
    return values


def shifted_to(values: Vector, cost: float, macs: Vector, limits: tuple[int, int], gradient_bits: int) -> Vector:
    """Shift bits by a common number until they cost so much, within limits; all at a limit where that is not enough.

    Args:
        values: bits, by operation.
        cost: wanted bit operations.
        macs: multiply-accumulates, by operation.
        limits: least and most bits.
        gradient_bits: see `bit_operations`.

    Examples:
        >>> shifted_to(np.array([3.0, 5.0]), 4.0**2 + 6.0**2, np.ones(2), (3, 8), 0).round(6)
        array([4., 6.])
    """
    from scipy.optimize import brentq  # here, because it takes long to import and few commands need it

    least, most = limits

    def at(shift: float) -> Vector:
        return np.clip(values + shift, least, most)

    def excess(shift: float) -> float:
        return float(bit_operations(macs, at(shift), gradient_bits).sum()) - cost

    low, high = least - float(values.max()), most - float(values.min())
    if excess(low) >= 0:
        return at(low)
    return at(high) if excess(high) <= 0 else at(float(brentq(excess, low, high, xtol=1e-9)))
