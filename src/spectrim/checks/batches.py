"""The rules for data and for single batches."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from spectrim.checks.messages import Text, fail
from spectrim.errors import SettingError

READ_ONCE = "a generator can be read only once: give a list or a DataLoader"


BATCHES = "an iterable of batches (inputs, target), such as a DataLoader or a list"


INPUTS = "one batch of inputs: a tensor, a tuple of arguments or a dict of keyword arguments"


def _data(verb: str, name: str, value: Any, *, rule: str = BATCHES, bare: bool = False, once: bool = False) -> None:
    hint = ""
    if isinstance(value, Dataset) and not isinstance(value, IterableDataset):
        hint = "a Dataset gives single examples: DataLoader(dataset, batch_size=32) makes batches"
    elif isinstance(value, type | str | bytes | os.PathLike | Mapping | nn.Module):
        hint = "a dict of tensors is one batch: [(batch, target)]" if isinstance(value, Mapping) else " "
    elif isinstance(value, Tensor | np.ndarray):
        hint = "make batches: DataLoader(TensorDataset(x, y), batch_size=32), after torch.from_numpy for arrays"
    elif not isinstance(value, Iterable) and not hasattr(value, "__getitem__"):
        hint = " "
    elif isinstance(value, Iterator) and not once:
        hint = READ_ONCE
    if hint:
        raise fail(verb, name, value, rule, hint.strip())
    if isinstance(value, list | tuple):
        if not value:
            raise fail(verb, name, value, "at least one batch")
        _first(verb, name, value, rule, bare)


def _first(verb: str, name: str, value: Sequence[Any], rule: str, bare: bool) -> None:
    """Check the first batch of a list."""
    first = value[0]
    if isinstance(value, tuple) and len(value) == 2 and isinstance(first, Tensor | np.ndarray) and not bare:
        raise fail(verb, name, value, rule, "a pair of tensors is one batch: [(x, y)], or DataLoader(TensorDataset(x, y), batch_size=32)")
    pair = isinstance(first, tuple | list) and len(first) == 2
    if pair and any(isinstance(part, np.ndarray) for part in first):
        raise SettingError(verb, name, got=Text("batches of numpy arrays"), rule="batches of tensors", hint="torch.from_numpy(array)")
    if bare and isinstance(first, Tensor | tuple | list | Mapping):
        return
    if not pair and not isinstance(first, Mapping):  # a dict has a separate message, see `pair_of`
        count = f"tuples of {len(first)}" if isinstance(first, tuple | list) else f"a {type(first).__name__}"
        hint = "several inputs go into a tuple: ((a, b), target)" if isinstance(first, tuple | list) else ""
        raise SettingError(verb, name, got=Text(f"batches that are {count}"), rule="batches (inputs, target)", hint=hint)


def inputs_rule(verb: str, name: str, value: Any) -> None:
    """Accept one batch of inputs."""
    if isinstance(value, np.ndarray):
        raise fail(verb, name, value, INPUTS, "torch.from_numpy(array)")
    packed = isinstance(value, nn.utils.rnn.PackedSequence)
    if not (packed or isinstance(value, Tensor | Mapping | tuple | list)):
        hint = (
            "give one batch of it: inputs, target = next(iter(loader))"
            if isinstance(value, Iterable) and not isinstance(value, str)
            else ""
        )
        raise fail(verb, name, value, INPUTS, hint)
    if isinstance(value, list | tuple) and not value:
        raise fail(verb, name, value, INPUTS)
    if isinstance(value, list | tuple) and any(isinstance(part, np.ndarray) for part in value):
        raise SettingError(verb, name, got=Text("numpy arrays"), rule=INPUTS, hint="torch.from_numpy(array)")


def reread(verb: str, name: str, value: Any) -> None:
    """Accept batches that can be iterated again."""
    _data(verb, name, value)


def read_once(verb: str, name: str, value: Any) -> None:
    """Accept batches, also those that can be read only once."""
    _data(verb, name, value, once=True)


def bare(verb: str, name: str, value: Any) -> None:
    """Accept batches or bare inputs, read once."""
    _data(verb, name, value, bare=True, once=True, rule="an iterable of batches, (inputs, target) or bare inputs")


def reread_bare(verb: str, name: str, value: Any) -> None:
    """Accept batches or bare inputs that can be iterated again."""
    _data(verb, name, value, bare=True, rule="an iterable of batches, (inputs, target) or bare inputs")
