"""`monte_carlo`: the accuracy of a network over draws of a device."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from spectrim.checks import check
from spectrim.errors import SettingError
from spectrim.metrics.evaluate import evaluate
from spectrim.runtimes.crossbar.device import Device
from spectrim.runtimes.crossbar.layers import on_crossbars
from spectrim.runtimes.crossbar.mapping import Mapping


@dataclass(frozen=True)
class Draws:
    """Scores of a network on several devices of one kind.

    Attributes:
        accuracies: of each draw, in [0, 1]; empty where the loss has no accuracy.
        losses: of each draw.
    """

    accuracies: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def accuracy(self) -> tuple[float, float]:
        """Mean and sample standard deviation of the accuracy."""
        return statistics.mean(self.accuracies), statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def monte_carlo(
    model: nn.Module,
    data: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    device: Device,
    mapping: Mapping | None = None,
    *,
    draws: int = 10,
    seed: int = 0,
) -> Draws:
    """Program a network on so many devices, one after the other, and evaluate each.

    Args:
        model: dense or merged; it is left untouched.
        data: batches ``(inputs, target)``, iterable more than once.
        loss: as for `evaluate`.
        device: see `Device`.
        mapping: see `Mapping`.
        draws: >= 1.
        seed: of the first draw; each further one has the next.

    Raises:
        SettingError: for `draws` below 1.

    Examples:
        >>> import torch
        >>> data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> len(monte_carlo(nn.Linear(4, 3), data, nn.CrossEntropyLoss(), Device(programming=0.1), draws=3).accuracies)
        3
    """
    check("monte_carlo", model=model, data=data, loss=loss)
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise SettingError("monte_carlo", "draws", got=draws, rule="a whole number >= 1")
    scores = [evaluate(on_crossbars(model, device, mapping, seed=seed + draw), data, loss) for draw in range(draws)]
    return Draws(
        tuple(float(found["accuracy"]) for found in scores if "accuracy" in found), tuple(float(found["loss"]) for found in scores)
    )
