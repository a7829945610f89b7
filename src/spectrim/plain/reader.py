"""A layer with a forward of its own that reads weights, with two thin ones in place of each."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .chain import refuse_dense
from .product import Product, kernels


class ThinPair(nn.Module):
    """Two thin factors of one weight.

    Args:
        left: ``(..., out, rank)``.
        right: ``(..., rank, in)``.
        shape: of the weight.
        groups: of the convolution whose kernel it is; 0 for what is no kernel.
    """

    def __init__(self, left: Tensor, right: Tensor, shape: Sequence[int], groups: int) -> None:
        super().__init__()
        self.left, self.right = (part if isinstance(part, nn.Parameter) else nn.Parameter(part) for part in (left, right))
        self.shape, self.groups = tuple(shape), groups

    def forward(self) -> Tensor:
        """Compose the weight."""
        return (self.left @ self.right).reshape(self.shape)

    def extra_repr(self) -> str:
        """Return the shapes."""
        return f"{tuple(self.left.shape)} @ {tuple(self.right.shape)}"


class PlainReader(nn.Module):
    """First base of a merged layer whose own forward runs on products of thin factors, see `Product`.

    Args:
        pairs: by the name of a weight.
    """

    def __init__(self, pairs: Mapping[str, ThinPair]) -> None:
        super().__init__()
        self.thin_weights = nn.ModuleDict(dict(pairs))

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Run the layer's own forward; a weight that has to be composed is composed once."""
        with held(self):
            return super().forward(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        """Return a weight by its name as a product."""
        pairs = self.__dict__.get("_modules", {}).get("thin_weights")
        if pairs is None or name not in pairs:
            return super().__getattr__(name)
        pair = pairs[name]
        if torch.compiler.is_compiling():
            return pair()
        trained, compose = pair.left.requires_grad or pair.right.requires_grad, once(self, name, pair)
        made: Any = Product("PlainReader", compose, pair.shape, pair.left.dtype, pair.left.device, trained)
        return made.with_thin(lambda: kernels(pair.left, pair.right, pair.shape, pair.groups), pair.groups)

    @classmethod
    def stands_for(cls, base: type) -> bool:
        """Whether it behaves as a layer of class `base` does: its forward is that of the class."""
        return True

    @staticmethod
    def takes_over(layer: nn.Module) -> tuple[str, ...]:
        """Return no names: the weights are gone already."""
        return ()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        refuse_dense(self.thin_weights, state_dict, prefix, rest[-1])
        super()._load_from_state_dict(state_dict, prefix, *rest)


@contextmanager
def held(layer: nn.Module) -> Iterator[None]:
    """Keep what is composed inside until the end: each weight is composed once in a forward pass."""
    outer = layer.__dict__.get("composed_now")
    layer.__dict__["composed_now"] = {}
    try:
        yield
    finally:
        if outer is None:
            del layer.__dict__["composed_now"]
        else:
            layer.__dict__["composed_now"] = outer


def once(layer: nn.Module, name: str, compose: Any) -> Any:
    """Return a function that composes a weight, inside a forward pass once."""

    def composed() -> Any:
        kept = layer.__dict__.get("composed_now")
        if kept is None:
            return compose()
        key = name, torch.is_grad_enabled()
        if key not in kept:
            kept[key] = compose()
        return kept[key]

    return composed
