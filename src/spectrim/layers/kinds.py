"""The table of kinds of layers, what finds a layer's kind in it, and what adds a row."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from spectrim.errors import LayerError
from spectrim.layers.attention import FactorizedMultiheadAttention
from spectrim.layers.base import FactorizedLayer
from spectrim.layers.conv import (
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConv3d,
    FactorizedConvTranspose1d,
    FactorizedConvTranspose2d,
    FactorizedConvTranspose3d,
)
from spectrim.layers.embedding import FactorizedEmbedding
from spectrim.layers.linear import FactorizedConv1D, FactorizedLinear
from spectrim.layers.own import check_kind
from spectrim.layers.quaternion import FactorizedQConv1d, FactorizedQConv2d, FactorizedQConv3d, FactorizedQLinear
from spectrim.layers.reader import FactorizedReader
from spectrim.layers.recurrent import FactorizedGRU, FactorizedLSTM
from spectrim.layers.weights import OneWeight
from spectrim.plain.quaternion import QConv1d, QConv2d, QConv3d, QLinear
from spectrim.tables import Row

CARD = "svd-training"


@dataclass(frozen=True)
class Example:
    """One dense layer of a kind, and what it is called with.

    Attributes:
        make: returns the layer, with random weights.
        inputs: returns the arguments of a call, floating-point ones in a dtype.
        case: what is special about it, in a few words.
        of: the package that the layer's class is from, other than torch.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype], tuple[Any, ...]]
    case: str = ""
    of: str = ""


def numbers(*shapes: Sequence[int]) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    """Return a function that makes random tensors of these shapes in a dtype."""
    return lambda dtype: tuple([torch.randn(*shape, dtype=torch.float64).to(dtype) for shape in shapes])


def tokens(count: int, *shape: int) -> Callable[[torch.dtype], tuple[Tensor]]:
    """Return a function that makes random indices below `count`."""
    return lambda dtype: (torch.randint(0, count, shape),)


def _of_gpt2() -> nn.Module:
    from transformers.pytorch_utils import Conv1D  # an extra

    made: nn.Module = Conv1D(10, 14)  # type: ignore[no-untyped-call]
    return made


LAWS = {
    "one weight": "runs as one operation and as several, with the same output and gradients; its work is what torch counts for either",
    "several weights": "the work of each weight is what torch counts for a linear layer of its shape, alone and as two",
}
"""What a kind of layer may promise beyond the contract of `FactorizedLayer`."""

METHODS: list[Row[Sequence[Example]]] = [
    Row(FactorizedLinear, example=(Example(lambda: nn.Linear(12, 9), numbers((6, 12))),), card=CARD, laws={"one weight"}),
    Row(FactorizedConv1d, example=(Example(lambda: nn.Conv1d(6, 8, 3), numbers((2, 6, 11))),), card=CARD, laws={"one weight"}),
    Row(
        FactorizedConv2d,
        example=(
            Example(lambda: nn.Conv2d(6, 8, 3, padding=1), numbers((2, 6, 7, 9))),
            Example(
                lambda: nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, padding_mode="reflect"),
                numbers((2, 8, 7, 9)),
                "stride, padding, dilation, padding modes",
            ),
            Example(lambda: nn.Conv2d(8, 12, 3, groups=2), numbers((2, 8, 7, 9)), "2 groups"),
            Example(lambda: nn.Conv2d(8, 12, 1), numbers((2, 8, 7, 9)), "1x1"),
            Example(lambda: nn.Conv2d(8, 12, (64, 1)), numbers((2, 8, 70, 1)), "taps along one axis"),
        ),
        card=CARD,
        laws={"one weight"},
    ),
    Row(
        FactorizedConv3d,
        example=(
            Example(lambda: nn.Conv3d(4, 6, 3, stride=(1, 2, 1), padding=1), numbers((2, 4, 4, 5, 6))),
            Example(lambda: nn.Conv3d(8, 12, (1, 3, 3)), numbers((2, 8, 2, 5, 6)), "each image by itself"),
        ),
        card=CARD,
        laws={"one weight"},
    ),
    Row(
        FactorizedConvTranspose1d,
        example=(Example(lambda: nn.ConvTranspose1d(6, 8, 3, stride=2, padding=1, output_padding=1), numbers((2, 6, 7))),),
        card=CARD,
        laws={"one weight"},
    ),
    Row(
        FactorizedConvTranspose2d,
        example=(Example(lambda: nn.ConvTranspose2d(6, 8, 3), numbers((2, 6, 5, 4))),),
        card=CARD,
        laws={"one weight"},
    ),
    Row(
        FactorizedConvTranspose3d,
        example=(Example(lambda: nn.ConvTranspose3d(4, 6, 2), numbers((1, 4, 2, 3, 2))),),
        card=CARD,
        laws={"one weight"},
    ),
    Row(FactorizedEmbedding, example=(Example(lambda: nn.Embedding(11, 8), tokens(11, 4, 6)),), card=CARD, laws={"one weight"}),
    Row(
        FactorizedLSTM,
        example=(
            Example(lambda: nn.LSTM(12, 8), numbers((5, 3, 12))),
            Example(lambda: nn.LSTM(32, 16, num_layers=2, bidirectional=True), numbers((5, 3, 32)), "2 layers, both directions"),
            Example(lambda: nn.LSTM(16, 768), numbers((5, 3, 16)), "large state"),
        ),
        card=CARD,
        laws={"several weights"},
    ),
    Row(FactorizedGRU, example=(Example(lambda: nn.GRU(32, 16), numbers((5, 3, 32))),), card=CARD, laws={"several weights"}),
    Row(
        FactorizedMultiheadAttention,
        example=(
            Example(lambda: nn.MultiheadAttention(16, 4), lambda dtype: numbers((4, 2, 16))(dtype) * 3, "packed projection"),
            Example(
                lambda: nn.MultiheadAttention(16, 4, kdim=8, vdim=12), numbers((4, 2, 16), (6, 2, 8), (6, 2, 12)), "separate projections"
            ),
        ),
        card=CARD,
        laws={"several weights"},
    ),
    Row(FactorizedConv1D, example=(Example(_of_gpt2, numbers((2, 5, 14)), "GPT-2", "transformers"),), card=CARD, laws={"one weight"}),
    Row(
        FactorizedQLinear,
        example=(Example(lambda: QLinear(20, 16), numbers((3, 2, 20)), "`spectrim.plain.quaternion`"),),
        card="quaternion-svd",
        laws={"one weight"},
    ),
    Row(
        FactorizedQConv1d,
        example=(Example(lambda: QConv1d(12, 16, 3, padding="same", dilation=2), numbers((12, 9)), "dilation"),),
        card="quaternion-svd",
        laws={"one weight"},
    ),
    Row(
        FactorizedQConv2d,
        example=(
            Example(lambda: QConv2d(8, 12, (3, 2), (2, 1), (1, 0), (1, 2), bias=False), numbers((2, 8, 7, 6)), "stride, padding, dilation"),
        ),
        card="quaternion-svd",
        laws={"one weight"},
    ),
    Row(
        FactorizedQConv3d,
        example=(Example(lambda: QConv3d(8, 12, 2, padding="valid"), numbers((1, 8, 3, 4, 3))),),
        card="quaternion-svd",
        laws={"one weight"},
    ),
    Row(FactorizedReader, example=(), card=CARD),  # of classes outside: tests/unit/layers/test_reader.py has examples
]
"""Every kind with its examples; the first row that accepts a layer is its kind. The last one takes what no other does."""


def register(kind: type[FactorizedLayer], layer: nn.Module, *inputs: Any) -> None:
    """Add a kind of layer to `METHODS`, for this process, so that `factorize` and the other verbs support it.

    The kind is checked against the laws of factorized layers on the example, in float64: `unfold` inverts `fold`, the forward computes
    what the dense one does, with composed weights and as two operations, `split` and `release` what the factorized layer does, `work` is
    proportional to the rank, and a `OneWeight` multiplies its folded matrix with its `input_rows`. Registering a kind again does nothing.

    Args:
        kind: the factorized class: a `FactorizedLayer`, or a `OneWeight` when its sole weight is called ``weight``.
        layer: a small dense layer of that kind, on the CPU, with different sizes along different axes; it is left untouched.
        inputs: what it is called with.

    Raises:
        LayerError: when a law does not hold, or when `layer` is of another kind already.

    Examples:
        >>> import torch
        >>> register(FactorizedLinear, nn.Linear(4, 3), torch.randn(2, 4))
    """
    present = kind_of(layer)
    if present is not None and present is not kind and present is not FactorizedReader:
        hint = f"a {type(layer).__name__} needs a separate class with a separate forward, so that the kinds can be told apart"
        raise LayerError(kind.__name__, f"its example is of the kind {present.__name__} already", hint=hint)
    check_kind(kind, layer, inputs)
    if all(row.method is not kind for row in METHODS):
        example = Example(lambda: copy.deepcopy(layer), lambda dtype: tuple([_to(x, dtype) for x in inputs]))
        row: Row[Sequence[Example]] = Row(kind, example=(example,), card=CARD, laws={"one weight"} if issubclass(kind, OneWeight) else ())
        METHODS.insert(len(METHODS) - 1, row)


def _to(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def row_of(module: nn.Module) -> Row[Sequence[Example]] | None:
    """Return the row of a dense layer's kind, or None."""
    return next((row for row in METHODS if row.method.accepts(module)), None)


def kind_of(module: nn.Module) -> type[FactorizedLayer] | None:
    """Return the factorized class for a dense layer, or None."""
    row = row_of(module)
    return None if row is None else row.method


def is_factorized(module: nn.Module) -> TypeGuard[FactorizedLayer]:
    """Whether a module is a factorized layer at present."""
    return isinstance(module, FactorizedLayer)


def has_matrix(module: nn.Module) -> bool:
    """Whether a module is a layer that is factorized, or whose class can be."""
    return isinstance(module, FactorizedLayer) or kind_of(module) is not None
