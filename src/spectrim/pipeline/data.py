"""The data of a run: every pass starts as in an uninterrupted run."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import ConcatDataset, DataLoader, RandomSampler, SequentialSampler, Subset, TensorDataset

from spectrim.errors import RecipeError
from spectrim.pipeline.components import Component, _made, seed_everything
from spectrim.training.checkpoint import generators_of, random_state, restore_random_state
from spectrim.zoo.data import Batches

SPLITS = ("train", "val", "test")


@runtime_checkable
class Data(Protocol):
    """What a recipe's data must return: three splits, each an iterable of batches ``(inputs, target)``."""

    train: Any
    val: Any
    test: Any


class Source:
    """Makes the data of a recipe, as they are before their first pass, any number of times.

    Data may count their passes, or hold their own generators. When finished stages are skipped, their state would differ; so every
    stage, and every pass over data inside a stage, begins with fresh data. Lists, `Batches` and loaders of tensors are reset; anything
    else is made again by calling the code that the recipe names.
    """

    def __init__(self, component: Component, seed: int) -> None:
        """Make the data once.

        Args:
            component: of the recipe.
            seed: of every generator while the data are made, which may draw a split at random.
        """
        self.component, self.seed = component, seed
        self.data = self._make()

    def fresh(self, seed: int) -> Data:
        """Return the data before their first pass; the global generators are left as they are.

        Args:
            seed: of the generators that loaders hold.
        """
        if all(_is_stateless(getattr(self.data, split)) for split in SPLITS):
            for part in (getattr(self.data, split) for split in SPLITS):
                if isinstance(part, Batches):
                    part.set_epoch(0)
        else:
            state = random_state()
            self.data = self._make()
            restore_random_state(state)
        for generator in (generator for split in SPLITS for generator in generators_of(getattr(self.data, split))):
            generator.manual_seed(seed)
        return self.data

    def _make(self) -> Data:
        seed_everything(self.seed)
        data = _made(self.component, "data")
        for split in SPLITS:
            if not hasattr(data, split):
                problem = f"{self.component['class_path']} gives a {type(data).__name__} without '{split}'"
                raise RecipeError("data", problem, allowed="an object with train, val, test")
        for split in SPLITS:
            if not hasattr(part := getattr(data, split), "__iter__") and not hasattr(part, "__getitem__"):
                problem = f"{self.component['class_path']} gives a {type(part).__name__} as '{split}'"
                raise RecipeError("data", problem, allowed="an iterable of batches (inputs, target)")
        return data  # type: ignore[no-any-return]


def _is_stateless(part: Any) -> bool:
    """Return whether passes over a split leave nothing behind but the state of generators and of `Batches`."""
    if isinstance(part, list | tuple) or type(part) is Batches:
        return True
    if type(part) is not DataLoader or type(part.sampler) not in (RandomSampler, SequentialSampler):
        return False
    return _is_plain(part.dataset)


def _is_plain(dataset: Any) -> bool:
    if type(dataset) is Subset:
        return _is_plain(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(map(_is_plain, dataset.datasets))
    return type(dataset) is TensorDataset


def replayed(train: Any, val: Any, say: Callable[[str], None]) -> Any:
    """Return training data that catch up on the passes of an earlier process when `fit` goes on from a checkpoint.

    Data that have ``set_epoch`` or ``state_dict``, and those that leave nothing behind, need no help and are returned as they are.

    Args:
        train: fresh.
        val: what `fit` evaluates on after each epoch, fresh.
        say: called with a message when data are read for that reason.
    """
    knows = any(hasattr(train, name) for name in ("set_epoch", "state_dict")) or _is_stateless(train)
    return train if knows or int(os.environ.get("WORLD_SIZE", "1")) > 1 else _Replayed(train, val, say)


class _Replayed:
    """Data whose earlier passes are repeated before `fit` resumes from a checkpoint."""

    def __init__(self, train: Any, val: Any, say: Callable[[str], None]) -> None:
        self.train, self.val, self.say, self.passes = train, val, say, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.train)

    def __len__(self) -> int:
        return len(self.train)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["train"], name)

    def set_epoch(self, epoch: int) -> None:
        """Read training and validation data once for each epoch that is missing; generators are left as they are."""
        if self.passes >= epoch:
            return
        self.say(f"reading the data {epoch - self.passes} times first, as in the epochs before the checkpoint: they may count their passes")
        generators = generators_of(self.train)
        state = random_state(generators)
        while self.passes < epoch:
            _exhaust(self)
            _exhaust(self.val)
        restore_random_state(state, generators)


def _exhaust(data: Iterable[Any]) -> None:
    for _ in data:
        pass
