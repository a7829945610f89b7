"""A lesson that brings hidden representations of one class together."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.protocols import Seen


def same_class_share(features: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared distance of pairs of one class over that of all pairs of a batch, a scalar; in float32 at least.

    0 where each class is one point, about 1 where classes do not matter; 0 for a batch without two examples of one class.

    Args:
        features: ``(batch, ...)``.
        target: classes ``(batch,)``.

    Examples:
        >>> same_class_share(torch.tensor([[0.0], [1.0], [4.0], [5.0]]), torch.tensor([0, 0, 1, 1])).item()  # 1 over 34 / 3
        0.0882...

    Source: see `ClassInvariance`.
    """
    x = features.flatten(1).to(torch.promote_types(features.dtype, torch.float32))
    x = x - x.mean(0)
    member = torch.nn.functional.one_hot(target.long()).to(x)
    counts, squares = member.sum(0), x.square().sum(1)
    within = 2 * (counts * (member.mT @ squares) - (member.mT @ x).square().sum(1)).sum()  # over ordered pairs
    pairs = (counts * (counts - 1)).sum()
    total = 2 * len(x) * squares.sum()
    scale = len(x) * (len(x) - 1) / pairs.clamp(min=1)
    return torch.where((pairs > 0) & (total > 0), scale * within / total.clamp(min=torch.finfo(x.dtype).tiny), 0.0)


@dataclass(frozen=True)
class ClassInvariance:
    """``loss + weight * sum_l mean |h_i - h_j|^2 over pairs of one class / that over all pairs``: for few labelled examples.

    The ratio does not change with the scale of a layer. It is the variability within classes that NC1 of
    `spectrim.analysis.collapse` measures, as a term of the loss.

    Args:
        layers: names of the modules whose outputs are compared, ``(batch, ...)``.
        weight: >= 0.

    Raises:
        SettingError: for no layers, or a weight outside its range.

    Examples:
        >>> from spectrim import fit
        >>> data, net = [(torch.randn(8, 4), torch.arange(8) % 2)], nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> history = fit(net, data, nn.CrossEntropyLoss(), epochs=1, lessons=[ClassInvariance(["1"], 0.1)], progress=False)
        >>> history.last["ClassInvariance"] > 0
        True

    Source: Belharbi et al., arXiv 1709.01867 (invariance of the representations within a class).
    Deviation: all pairs of a batch, relative to those of all classes; distances of whole batches without loops over pairs.
    """

    layers: Sequence[str]
    weight: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) or not self.layers:
            raise SettingError("ClassInvariance", "layers", got=self.layers, rule="a list of at least one name of a module")
        if not 0 <= self.weight < float("inf"):
            raise SettingError("ClassInvariance", "weight", got=self.weight, rule="a finite number >= 0")

    def watched_layers(self, model: nn.Module) -> Sequence[str]:
        """Return the names of the layers, see `Lesson`."""
        return self.layers

    def __call__(self, seen: Seen) -> Tensor:
        """Return the loss of a step with the share of each layer added, see `Lesson`."""
        if not isinstance(seen.target, Tensor) or seen.target.is_floating_point() or seen.target.dim() != 1:
            raise SettingError("ClassInvariance", "targets", got=seen.target, rule="classes, integers of shape (batch,)")
        shares = [same_class_share(seen.layers[name], seen.target) for name in self.layers]
        return seen.loss + self.weight * torch.stack(shares).sum()
