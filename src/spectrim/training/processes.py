"""Operations of several processes that train together: share batches, average, agree, synchronize weights.

Each function is called by all processes at the same moment. With one process it does nothing.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from spectrim.errors import SettingError
from spectrim.layers.sharded import has_shards, is_sharded, refuse_sharded_factors, shard_like
from spectrim.metrics.calls import evaluating
from spectrim.metrics.evaluate import evaluate, is_divided, weight_of


class Share:
    """One process's batches of an iterable: ``index``, ``index + count``, ...; the last round is filled up with the first batches."""

    def __init__(self, data: Any, index: int, count: int) -> None:
        """Refer to the whole data.

        Args:
            data: gives the same batches in the same order in every process.
            index: of this process, in ``[0, count)``.
            count: of processes.
        """
        self.data, self.index, self.count = data, index, count

    def __len__(self) -> int:
        """Return the number of rounds."""
        return -(-len(self.data) // self.count)

    def __iter__(self) -> Iterator[Any]:
        """Yield this process's batch of each round."""
        first: list[Any] = []
        for group in rounds(self.data, self.count):
            first = first or group
            yield (group + first * self.count)[self.index]


def rounds(data: Iterable[Any], count: int) -> Iterator[list[Any]]:
    """Yield the batches `count` at a time; the last round may have fewer."""
    batches = iter(data)
    while group := list(islice(batches, count)):
        yield group


def share(accelerator: Any, data: Iterable[Any]) -> Iterable[Any]:
    """Return the part of the data that this process trains on.

    A `DataLoader` is divided by accelerate, so that each process loads its own batches alone; one that accelerate has prepared, or that
    has a `DistributedSampler`, is divided already and stays as it is. Of any other iterable each process takes every n-th batch.

    Args:
        accelerator: accelerate's.
        data: batches, the same in all processes.
    """
    if accelerator.num_processes == 1 or is_divided(data):
        return data
    if isinstance(data, DataLoader):
        prepared: Iterable[Any] = accelerator.prepare_data_loader(data)
        accelerator._dataloaders = [held for held in accelerator._dataloaders if held is not prepared]
        return prepared
    return Share(data, accelerator.process_index, accelerator.num_processes)


def reduced(accelerator: Any, values: Sequence[Tensor | float], how: str = "mean") -> list[float]:
    """Return the mean (or ``sum``) over processes of some scalars, in float64 where the device has it; not finite where any is not."""
    kind = torch.float32 if accelerator.device.type == "mps" else torch.float64
    own = torch.stack([torch.as_tensor(value, dtype=kind, device=accelerator.device) for value in values])
    return list(accelerator.reduce(own, how).tolist())  # one synchronization with the accelerator


def everywhere(accelerator: Any, holds: bool) -> bool:
    """Whether something holds in every process."""
    return holds if accelerator.num_processes == 1 else reduced(accelerator, [float(not holds)], "sum") == [0.0]


def from_main(accelerator: Any, value: Any) -> Any:
    """Return the main process's value, plain data, in every process."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value], from_process=0)[0]


def from_all(accelerator: Any, value: Any) -> list[Any]:
    """Return the values, plain data, of all processes in their order."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return list(gather_object([value]))


@torch.no_grad()
def same_tensors(accelerator: Any, tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with the main process's."""
    if accelerator.num_processes > 1:
        for tensor in (tensor for tensor in tensors if tensor.numel()):
            moved = tensor.to(accelerator.device).contiguous()
            torch.distributed.broadcast(moved, 0)
            if moved is not tensor:
                tensor.copy_(moved)


def evaluate_together(accelerator: Any, model: nn.Module, data: Iterable[Any], loss: Callable[[Any, Any], Tensor]) -> dict[str, float]:
    """Evaluate on every batch of the data once, each process on its own; see `measure.evaluate`.

    In a last round that has too few batches the processes left over run the first of them, which counts nothing: with FSDP2 all have to
    run.
    """
    if accelerator.num_processes == 1:
        return evaluate(model, data, loss)
    divided, sums = is_divided(data), dict[str, float]()
    count, index = (1, 0) if divided else (accelerator.num_processes, accelerator.process_index)
    weights = 0.0
    with evaluating(model):
        for group in rounds(data, count):
            batch = group[index] if index < len(group) else group[0]
            found = evaluate(model, [batch], loss)
            weight = float(weight_of(batch[1])) if index < len(group) else 0.0
            weights += weight
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value * weight
    if not sums:
        hint = "a generator can be read only once: give a list or a DataLoader"
        raise SettingError("fit", "eval_data", got="no batches", rule="at least one batch for each process", hint=hint)
    total, *values = reduced(accelerator, [weights, *sums.values()], "sum")
    return {name: value / total for name, value in zip(sums, values, strict=True)}


def shard(accelerator: Any, model: nn.Module, optimizer: Optimizer) -> None:
    """Shard model and optimizer where the accelerator says FSDP2 and they are not yet; in place, moments included.

    Raises:
        SettingError: for FSDP1, for a plug-in that accelerate leaves aside on this device or that wraps by size, and for a model that is
            wrapped in DDP.
        LayerError: for factors that are sharded apart from their layer.
    """
    _check_shardable(accelerator, model)
    if has_shards(model) or not _uses_fsdp(accelerator):
        return
    before = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    accelerator.prepare(model, optimizer)
    after = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for old, new in zip(before, after, strict=True):
        state = optimizer.state.pop(old, None)
        if state is not None:
            optimizer.state[new] = shard_state(state, new)


def _uses_fsdp(accelerator: Any) -> bool:
    return str(accelerator.distributed_type).endswith("FSDP")


def _check_shardable(accelerator: Any, model: nn.Module) -> None:
    """Raise what `shard` raises."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise SettingError("fit", "model", got="DistributedDataParallel", rule="the model itself: fit wraps it", hint="pass model.module")
    if has_shards(model):
        refuse_sharded_factors(model)
    elif _uses_fsdp(accelerator):
        refuse_sharded_factors(model)
        if not accelerator.is_fsdp2:
            raise SettingError("fit", "accelerator", got="FSDP version 1", rule="FSDP2", hint="set fsdp_version=2")
        policy = accelerator.state.fsdp_plugin.auto_wrap_policy
        if getattr(getattr(policy, "func", policy), "__name__", "") == "size_based_auto_wrap_policy":
            rule = "transformer_based_wrap with the names of your blocks, or no_wrap; by size it would take factors out of their layers"
            raise SettingError("fit", "the accelerator's auto_wrap_policy", got="size_based_wrap", rule=rule)
    elif accelerator.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        hint = "pass the model through torch.distributed.fsdp.fully_shard and make the optimizer after that"
        rule = f"one whose FSDP plug-in is used; accelerate leaves it aside with {str(accelerator.distributed_type).rpartition('.')[2]}"
        raise SettingError("fit", "accelerator", got=str(accelerator.device), rule=rule, hint=hint)


def shard_state(state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Return the entries of an optimizer's state of one parameter, sharded as the parameter is where they have its shape."""

    def own(value: Any) -> Any:
        like = isinstance(value, Tensor) and not is_sharded(value) and value.dim() > 0 and value.shape == parameter.shape
        return shard_like(value, parameter) if like else value

    return {key: own(value) for key, value in state.items()}


def wrap(accelerator: Any, model: nn.Module) -> nn.Module:
    """Return what is called in training: the model in `DistributedDataParallel`, or the model itself when it is alone or sharded."""
    if accelerator.num_processes == 1 or has_shards(model):
        return model
    wrapped: nn.Module = accelerator.prepare_model(model)
    return wrapped


def unwrap(accelerator: Any, wrapped: nn.Module, model: nn.Module) -> None:
    """Undo `wrap`: the model is what it was before, and the accelerator forgets it."""
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    # not free_memory(): that forgets what the user prepared too, and runs a slow garbage collection
    accelerator._models = [held for held in accelerator._models if held is not wrapped]


def unsynchronised(accelerator: Any, wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Leave gradients to each process until the last batch of an accumulated step."""
    if last or accelerator.num_processes == 1:
        return nullcontext()
    context: AbstractContextManager[Any] = accelerator.no_sync(wrapped)
    return context


def same_moments(accelerator: Any, optimizer: Optimizer) -> None:
    """Overwrite the optimizer's tensors with the main process's: what a cut carries over may be rounded differently elsewhere."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [optimizer.state[parameter] for parameter in held if parameter in optimizer.state]
    same_tensors(accelerator, (value for state in states for value in state.values() if isinstance(value, Tensor) and value.dim() > 0))
