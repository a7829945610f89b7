"""What plain layers share: weights given as a tensor or a pair."""

from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor, nn

from .chain import PlainPair

Weight: TypeAlias = Tensor | tuple[Tensor, Tensor]  # dense (out, in), or the pair (out, rank), (rank, in)


def _shapes(weights: Mapping[str, Weight]) -> dict[str, list[list[int]]]:
    """Return the shapes of each weight's factors: what it takes, with the settings, to build the module again."""
    return {name: [list(part.shape) for part in ((w,) if isinstance(w, Tensor) else w)] for name, w in weights.items()}


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out, in_ = weight.shape
    layer = nn.Linear(in_, out, bias=bias is not None, device="meta", dtype=weight.dtype).to_empty(device=weight.device)
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return layer


def _projection(weight: Weight, bias: Tensor | None) -> nn.Linear | PlainPair:
    if isinstance(weight, Tensor):
        return _linear(weight, bias)
    return PlainPair(_linear(weight[1], None), _linear(weight[0], bias))


def _check_shapes(owner: str, weights: Mapping[str, Weight], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise where `weights` are not exactly those of `shapes`; only matrices may be pairs."""
    if set(weights) != set(shapes):
        missing, unknown = sorted(set(shapes) - set(weights)), sorted(set(weights) - set(shapes))
        raise ValueError(f"{owner}: weights: missing {missing}, unknown {unknown}")
    for name, weight in weights.items():
        expected = shapes[name]
        if isinstance(weight, Tensor):
            got, fits = str(tuple(weight.shape)), tuple(weight.shape) == expected
        else:
            left, right = (tuple(factor.shape) for factor in weight)
            got, fits = f"the pair {left}, {right}", len(expected) == 2 and (left[:1] + right[1:], left[1:]) == (expected, right[:1])
        if not fits:
            raise ValueError(f"{owner}: {name} must be {expected}, got {got}")
