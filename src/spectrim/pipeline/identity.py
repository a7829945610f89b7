"""What a folder of `compress` belongs to: everything that changes the result, as short plain data."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from spectrim.layers import named_factors
from spectrim.protocols import Latencies


def digest(values: Iterable[Any]) -> str:
    """Return a short digest of tensors (dtype, shape and bytes) and of other values (by their text).

    Args:
        values: in order.

    Examples:
        >>> digest([torch.ones(2)]) == digest([torch.ones(2)]), digest([torch.ones(2)]) == digest([torch.zeros(2)])
        (True, False)
    """
    made = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            made.update(f"{value.dtype} {tuple(value.shape)}".encode())
            made.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            made.update(repr(value).encode())
    return made.hexdigest()[:16]


def of_weights(model: nn.Module) -> str:
    """Return the digest of a network's class and state."""
    state = [part for name, value in model.state_dict().items() for part in (name, *tree_leaves(value))]
    return digest([type(model).__qualname__, *state])


def of_data(data: Any, known: Sequence[Any]) -> str:
    """Return the digest of the training data, as far as it does not depend on the order in which they come.

    Of a list all of it; of other data the calibration set; but of a shuffled `DataLoader` the tensors and arrays that its data set holds,
    and the first, middle and last item, unless they are drawn at random, and of data with a ``set_epoch``, which come in another order in
    each epoch, the tensors that they hold, and their length.

    Args:
        data: as `compress` takes it.
        known: the first batches.
    """
    length = len(data) if hasattr(data, "__len__") else None
    if isinstance(data, DataLoader) and not isinstance(data.sampler, SequentialSampler):
        return digest([length, *_items(data.dataset), *_held(data.dataset)])
    if isinstance(data, list | tuple):
        return digest([length, *tree_leaves(data)])
    if not hasattr(data, "set_epoch"):
        return digest([length, *(leaf for batch in known for leaf in tree_leaves(batch))])
    held = [value for value in vars(data).values() if isinstance(value, Tensor)]
    shapes = [tuple(leaf.shape[1:]) for leaf in tree_leaves(known[:1]) if isinstance(leaf, Tensor) and leaf.dim()]
    return digest([length, *shapes, *held])


def _items(dataset: Any) -> list[Any]:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or not len(dataset):
        return []
    places = sorted({0, len(dataset) // 2, len(dataset) - 1})
    with torch.random.fork_rng([]):
        once, again = (digest(leaf for place in places for leaf in tree_leaves(dataset[place])) for _ in range(2))
    return [len(dataset), once if once == again else "drawn at random"]


def _held(dataset: Any) -> Iterator[Tensor]:
    """Yield the tensors and arrays that a data set holds itself, in lists, and in the data sets that it wraps."""
    for value in tree_leaves([vars(dataset) if hasattr(dataset, "__dict__") else {}]):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            yield torch.from_numpy(np.ascontiguousarray(value))
        elif isinstance(value, Dataset):
            yield from _held(value)


def of_optimizer(make: Callable[[Iterable[nn.Parameter]], Any] | None, model: nn.Module) -> str:
    """Return the class of an optimizer and the settings of its groups, as text."""
    if make is None:
        return "default"
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return "nothing to train"
    made = make(parameters)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in made.param_groups]
    return f"{type(made).__qualname__} {groups!r}"


def of_latency(latency: Latencies | None, model: nn.Module) -> str | None:
    """Return the digest of a latency table."""
    if latency is None:
        return None
    if hasattr(latency, "to_dict"):
        return digest([json.dumps(latency.to_dict(), sort_keys=True, default=str)])
    return digest([name, latency.seconds(name, None), latency.seconds(name, 1)] for name, _ in named_factors(model))
