"""`Order`: the state of data that determines the order of their batches, for a checkpoint."""

import random
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectrim.training.data import places_of

PLAIN = (bool, int, float, str)
"""Attributes in which a data set can count its own passes."""


class Order:
    """The state from which data draw their order, for a checkpoint: ``state_dict`` where they have one, random generators, and counts.

    Counts are attributes of the user's own classes that changed since the start: numbers, texts, lists of these and arrays of indices,
    such as a number of passes, or an order that is shuffled in place. What else changes, such as a file that is read on and on, cannot be
    set from outside: `warn` names it.
    """

    def __init__(self, *data: Any) -> None:
        """Look at the data before the first pass.

        Args:
            data: as the user gave them; None for none.
        """
        places = [place for each in data if each is not None for place in places_of(each)]
        self.persistent = any(getattr(place, "persistent_workers", False) for place in places)
        self.stateful = [place for place in places if _has_state(place)]
        rest = [place for place in places if not any(place is other for other in self.stateful) and hasattr(place, "__dict__")]
        self.random = [value for place in rest for value in vars(place).values() if _is_random(value)]
        known = ("torch.", "accelerate.")
        own = [place for place in rest if not hasattr(place, "set_epoch") and not type(place).__module__.startswith(known)]
        told = [
            id(place)
            for each in data
            if hasattr(each, "set_epoch") and not type(each).__module__.startswith(known)
            for place in places_of(each)
        ]
        self.watched = [place for place in own if id(place) not in told]  # what is told the epoch sees to what lies inside
        self.came = self._counts()

    def _counts(self) -> list[dict[str, Any]]:
        return [{key: _kept(value) for key, value in vars(place).items() if _is_count(value)} for place in self.watched]

    def warn(self) -> None:
        """Warn, when a run goes on, of what the data hold that cannot be restored."""
        places = ((type(place).__name__, vars(place)) for place in self.watched)
        lost = [f"{kind}.{key}" for kind, held in places for key, value in held.items() if hasattr(value, "__next__")]
        lost += ["persistent workers"] * self.persistent
        if lost:
            hint = "give the data set_epoch(epoch), or state_dict and load_state_dict"
            what = f"the data go on in {', '.join(lost)} from pass to pass, which a checkpoint cannot restore"
            message = f"fit: {what}: the batches of this resumed run may differ from those of an uninterrupted one; {hint}"
            warnings.warn(message, UserWarning, stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the passes so far."""
        both = zip(self.came, self._counts(), strict=True)
        counts = [{key: _plain_of(now[key]) for key in now if key not in came or not _equal(now[key], came[key])} for came, now in both]
        changed = [(type(place).__qualname__, count) for place, count in zip(self.watched, counts, strict=True)]
        states = [place.state_dict() for place in self.stateful]
        return {"states": states, "random": [_state(value) for value in self.random], "changed": changed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        for place, own in zip(self.stateful, state["states"], strict=True):
            place.load_state_dict(own)
        for generator, own in zip(self.random, state["random"], strict=True):
            _restore(generator, own)
        for place, (kind, counts) in zip(self.watched, state["changed"], strict=False):  # other data may follow
            for key, value in counts.items() if kind == type(place).__qualname__ else ():
                _set(place, key, _arrays_of(value))


def _is_count(value: Any) -> bool:
    """Whether data may keep in a value how far they are: a number, a text, a list of these, or an array of indices."""
    if isinstance(value, list):
        return all(type(entry) in PLAIN for entry in value)
    if isinstance(value, Tensor):
        return value.dim() == 1 and not value.is_floating_point() and not value.is_complex()
    return type(value) in PLAIN or (isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu")


def _kept(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value.copy() if isinstance(value, np.ndarray | list) else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor | np.ndarray) or isinstance(other, Tensor | np.ndarray):
        return type(one) is type(other) and one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    return type(one) is type(other) and bool(one == other)


def _set(place: Any, key: str, value: Any) -> None:
    """Set an attribute, a list or an array in place where it has the same length: samplers may hold the same one."""
    held = vars(place).get(key)
    if isinstance(held, Tensor | np.ndarray | list) and type(held) is type(value) and len(held) == len(value):
        rest: Any = held
        rest[:] = value
    else:
        setattr(place, key, value)


def _has_state(place: Any) -> bool:
    """Whether data can give and take their state; accelerate's loaders have the methods whether or not what they wrap can."""
    able = hasattr(place, "state_dict") and hasattr(place, "load_state_dict")
    return able and (not type(place).__module__.startswith("accelerate.") or hasattr(place.base_dataloader, "state_dict"))


def _is_random(value: Any) -> bool:
    return isinstance(value, random.Random | np.random.Generator | np.random.RandomState)


def _state(generator: Any) -> Any:
    """Return the state of a generator as plain data and tensors."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return _plain_of(generator.get_state(legacy=False))
    return _plain_of(generator.bit_generator.state)


def _restore(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_arrays_of(state))
    else:
        generator.bit_generator.state = _arrays_of(state)


def _plain_of(value: Any) -> Any:
    """Return nested data with arrays of unsigned integers as tensors of int64, which a checkpoint can hold."""
    if isinstance(value, dict):
        return {key: _plain_of(one) for key, one in value.items()}
    if isinstance(value, np.ndarray):
        return {"array": torch.from_numpy(value.astype(np.uint64).view(np.int64).copy()), "dtype": str(value.dtype)}
    return value.item() if isinstance(value, np.generic) else value


def _arrays_of(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("array"), Tensor):
        return value["array"].numpy().view(np.uint64).astype(value["dtype"])
    return {key: _arrays_of(one) for key, one in value.items()} if isinstance(value, dict) else value
