"""`tensor_train`: a trained linear layer as a tensor train."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.linalg.tensor_train import full_ranks, tt_svd
from spectrim.plain.tensor_train import PlainTensorTrain


def balanced_sizes(features: int, axes: int) -> tuple[int, ...]:
    """Fold a number of features into axes of sizes as equal as its divisors allow, ascending.

    Examples:
        >>> balanced_sizes(784, 2), balanced_sizes(120, 3), balanced_sizes(7, 2)
        ((28, 28), (4, 5, 6), (1, 7))
    """
    if axes == 1:
        return (features,)
    root = features ** (1 / axes)
    first = max(divisor for divisor in range(1, int(root + 1e-9) + 1) if features % divisor == 0)
    return tuple(sorted((first, *balanced_sizes(features // first, axes - 1))))


@torch.no_grad()
def tensor_train(
    layer: nn.Linear, rank: int | Sequence[int], *, in_sizes: Sequence[int] | None = None, out_sizes: Sequence[int] | None = None
) -> PlainTensorTrain:
    """Return a linear layer as a tensor train near to it: its weight folded to ``(out_1 in_1) x (out_2 in_2) x ...``, by `tt_svd`.

    Args:
        layer: with its weight and bias; left as it is.
        rank: one for each cut, or one number for all; at most the full rank of each, where the function is that of the layer.
        in_sizes: how input features are folded; into two nearly equal axes when omitted.
        out_sizes: the same of the outputs.

    Returns:
        A plain module, to take the layer's place: ``model.fc1 = tensor_train(model.fc1, 8)``.

    Raises:
        SettingError: for sizes whose product is another, or ranks that are not whole numbers of at least 1.

    Examples:
        >>> layer = nn.Linear(12, 8)
        >>> train = tensor_train(layer, 99)
        >>> train.ranks, bool((train.weight - layer.weight).norm() < 1e-5)
        ((6,), True)

    Source: Novikov, Podoprikhin, Osokin and Vetrov, arXiv 1509.06569, section 4.
    """
    into = tuple(in_sizes or balanced_sizes(layer.in_features, len(out_sizes or (1, 1))))
    onto = tuple(out_sizes or balanced_sizes(layer.out_features, len(into)))
    for name, sizes, features in (("in_sizes", into, layer.in_features), ("out_sizes", onto, layer.out_features)):
        if math.prod(sizes) != features or len(into) != len(onto):
            raise SettingError("tensor_train", name, got=sizes, rule=f"{len(into)} sizes with the product {features}")
    most = full_ranks([o * i for o, i in zip(onto, into, strict=True)])
    wanted = [rank] * len(most) if isinstance(rank, int) else list(rank)
    if len(wanted) != len(most) or any(isinstance(each, bool) or not isinstance(each, int) or each < 1 for each in wanted):
        raise SettingError("tensor_train", "rank", got=rank, rule=f"a number of at least 1, or {len(most)} of them")
    ranks = tuple(min(each, limit) for each, limit in zip(wanted, most, strict=True))
    made = PlainTensorTrain(into, onto, ranks, layer.bias is not None).to(layer.weight)
    for core, found in zip(made.cores, _cores(layer.weight, into, onto, ranks), strict=True):
        core.copy_(found.reshape(core.shape))
        core.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None and made.bias is not None:
        made.bias.copy_(layer.bias)
    return made.train(layer.training)


def _cores(weight: Tensor, into: tuple[int, ...], onto: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[Tensor, ...]:
    axes = len(into)
    folded = weight.reshape(*onto, *into).permute([axis for k in range(axes) for axis in (k, axes + k)])
    if axes == 1:
        return (weight,)
    return tt_svd(folded.reshape([o * i for o, i in zip(onto, into, strict=True)]), ranks)
