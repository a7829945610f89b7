"""Properties of training data: number of batches, epoch, what decides their order."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from spectrim.errors import SettingError


def length_of(data: Iterable[Any], owner: str = "fit") -> int | None:
    """Return the number of batches, or None where the data do not say.

    Raises:
        SettingError: for data that can be read only once, or that have no batches.

    Examples:
        >>> length_of([1, 2]), length_of(torch.utils.data.DataLoader(range(5), batch_size=2))
        (2, 3)
    """
    if isinstance(data, Iterator) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        hint = "a generator can be read only once: give a list or a DataLoader"
        raise SettingError(owner, "data", got=type(data), rule="an iterable that starts again at each epoch", hint=hint)
    try:
        length = len(data)  # type: ignore[arg-type]
    except TypeError:
        return None
    if length == 0:
        raise SettingError(owner, "data", got="no batches", rule="at least one batch")
    return length


def count_batches(data: Iterable[Any], owner: str = "fit") -> int:
    """Return the number of batches: the length of the data, or by a pass over those that have none.

    Raises:
        SettingError: as `length_of`.
    """
    length = length_of(data, owner)
    if length is None:
        length = sum(1 for _ in data)
    if not length:
        raise SettingError(owner, "data", got="no batches", rule="at least one batch")
    return length


def places_of(data: Any) -> list[Any]:
    """Return the objects that decide which batches come: the data, their samplers and data sets, and the data sets in these, each once."""
    found, waiting = dict[int, Any](), [data]
    while waiting:
        place = waiting.pop(0)
        if place is None or id(place) in found:
            continue
        found[id(place)] = place
        waiting += [getattr(place, name, None) for name in ("sampler", "batch_sampler", "dataset")]
        inside = getattr(place, "datasets", None)
        waiting += inside if isinstance(inside, list | tuple) else []
    return list(found.values())


def generators_of(data: Any) -> list[torch.Generator]:
    """Return the generators of a `DataLoader`, its samplers and its data set, each once."""
    found = [getattr(place, "generator", None) for place in places_of(data)]
    return list({id(generator): generator for generator in found if isinstance(generator, torch.Generator)}.values())


def announce(epoch: int, *data: Any) -> None:
    """Call ``set_epoch`` of data and samplers that have it, each once."""
    parts = {id(part): part for each in data for part in (each, getattr(each, "sampler", None))}
    for part in parts.values():
        set_epoch = getattr(part, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
