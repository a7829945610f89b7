"""Batches as `transformers` gives them, one dict, for verbs that take ``(inputs, target)``."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spectrim.errors import SettingError


@dataclass(frozen=True)
class Pairs:
    """Dict batches as ``(batch, batch[label])``, again at each pass; all else, such as the sampler, is that of `data`.

    The labels stay among the inputs, so that the model computes its loss itself: `model_loss` reads it.

    Args:
        data: gives dicts of keyword arguments, labels included: a `DataLoader` or any iterable with a length.
        label: the key of the labels.

    Raises:
        SettingError: for a batch that is not a dict, or has no such key.

    Examples:
        >>> import torch
        >>> [(inputs, target)] = Pairs([{"x": torch.ones(2), "labels": torch.zeros(2)}])
        >>> sorted(inputs), target
        (['labels', 'x'], tensor([0., 0.]))
    """

    data: Any
    label: str = "labels"

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.data)

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield ``(inputs, target)``."""
        for batch in self.data:
            if not isinstance(batch, Mapping):
                raise SettingError("pairs", "data", got=type(batch), rule="batches that are dicts of keyword arguments")
            if self.label not in batch:
                raise SettingError("pairs", "label", got=self.label, rule=f"a key of the batches: {', '.join(batch)}")
            yield dict(batch), batch[self.label]

    def __getattr__(self, name: str) -> Any:
        """Give what `data` has: its sampler and its generator, which `fit` seeds and keeps, and ``set_epoch``."""
        if name == "data":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.data, name)


def pairs(data: Iterable[Any], label: str = "labels") -> Pairs:
    """Return dict batches as the pairs ``(inputs, target)`` that `fit`, `compress`, `evaluate` and `calibrate` take, see `Pairs`.

    Args:
        data: gives dicts of keyword arguments, labels included: a `DataLoader` or any iterable with a length.
        label: the key of the labels; of several, any one. `evaluate` weighs each batch by its number of elements, padding included.
    """
    return Pairs(data, label)


def model_loss(output: Any, target: Any) -> Tensor:
    """Return the loss that a model of `transformers` computed itself, from the labels among its inputs: the `loss` for `pairs`.

    Args:
        output: what the model returned; its ``loss`` is read.
        target: not looked at.

    Raises:
        SettingError: when the output has no loss.
    """
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        rule = "one that holds a loss"
        hint = "the labels must be among the inputs, as pairs(data) leaves them, and the model's class must have a loss"
        raise SettingError("model_loss", "output", got=type(output), rule=rule, hint=hint)
    return loss
