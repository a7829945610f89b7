"""Model and optimizer as accelerate runs them while training lasts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectrim.errors import SettingError
from spectrim.layers.sharded import has_shards, reshard
from spectrim.training import processes

Precision = Literal["no", "bf16", "fp16"]


def make_accelerator(precision: Precision) -> Any:
    """Make an accelerator; accelerate keeps one state for the process, which is renewed when the precision differs."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision)
    if precision != "no" and not accelerator.native_amp:  # accelerate would silently use float32
        where = "a CPU" if accelerator.device.type == "cpu" else "this device"
        raise SettingError("fit", "precision", got=precision, rule=f"'no' or 'bf16' on {where}")
    return accelerator


class Prepared:
    """What is called in training in place of the model: the model, or with several processes its wrapper."""

    def __init__(self, accelerator: Any, model: nn.Module, optimizer: Optimizer, compiled: bool) -> None:
        self.accelerator, self.plain, self.optimizer, self.compiled = accelerator, model, optimizer, compiled
        self.had_forward = "forward" in vars(model)
        self.model = processes.wrap(accelerator, model)
        self.call = self._callable()

    def _callable(self) -> Callable[..., Any]:
        if not self.compiled:
            return self.model
        torch.compiler.reset()  # torch keeps eight programs per code object and runs further ones uncompiled
        return torch.compile(self.model, dynamic=False)  # else the last batch of an epoch slows down all later ones

    def renew(self) -> None:
        """Wrap the model again when its parameters were exchanged; all processes go on with what the main one has."""
        if self.model is not self.plain:
            self.close()
            self.model = processes.wrap(self.accelerator, self.plain)
            processes.same_moments(self.accelerator, self.optimizer)
        self.call = self._callable()

    def close(self) -> None:
        """Make the model what it was before."""
        processes.unwrap(self.accelerator, self.model, self.plain)
        if not self.had_forward:
            vars(self.plain).pop("forward", None)


@contextmanager
def prepared(accelerator: Any, model: nn.Module, optimizer: Optimizer, compiled: bool) -> Iterator[tuple[Prepared, Any]]:
    """Give the model and optimizer to accelerate for the time of training; afterwards the model is what it was before, or sharded."""
    if not has_shards(model):
        model.to(accelerator.device)
        for state in optimizer.state.values():
            state.update({key: value.to(accelerator.device) for key, value in state.items() if isinstance(value, Tensor) and value.dim()})
    made = Prepared(accelerator, model, optimizer, compiled)
    stepper = accelerator.prepare_optimizer(optimizer)
    try:
        yield made, stepper
    finally:
        made.close()
        reshard(model)
        accelerator._optimizers = [held for held in accelerator._optimizers if held is not stepper]
