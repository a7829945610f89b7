"""The weights that are rounded with feedback: matrices of ordinary layers, and what they are multiplied with."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.forms.svd import Factors
from spectrim.layers import OneWeight, is_factorized, kind_of, renew
from spectrim.surgery.moments import WIDEST_INPUTS


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight that one ordinary layer multiplies its inputs with.

    Attributes:
        name: of the layer.
        layer: linear or a convolution.
        geometry: a factorized layer of the same sizes, which tells the rows that the matrix is multiplied with.
    """

    name: str
    layer: Any
    geometry: Any

    def matrices(self) -> Tensor:
        """Return the folded weight, ``(blocks, out, in)``, in float64."""
        matrix: Tensor = self.geometry.fold(self.layer, "weight", self.layer.weight.detach().double(), "channel")
        return matrix if matrix.dim() == 3 else matrix.unsqueeze(0)

    def set_(self, matrices: Tensor) -> None:
        """Write the folded weight, in place."""
        folded = matrices if matrices.shape[0] > 1 else matrices[0]
        with torch.no_grad():
            self.layer.weight.copy_(self.geometry.unfold(self.layer, "weight", folded, "channel"))

    def inputs(self, x: Tensor, output_shape: Sequence[int]) -> Iterator[Tensor]:
        """Yield the rows that the matrix is multiplied with, ``(blocks, n, in)``, a part at a time."""
        yield from self.geometry.input_rows(x, output_shape, "channel")

    def outputs(self, y: Tensor, input_shape: Sequence[int]) -> Iterator[Tensor]:
        """Yield the rows of outputs, ``(blocks, n, out)``, a part at a time."""
        yield from self.geometry.output_rows(y, input_shape)


def weights_of(model: nn.Module) -> dict[str, Weight]:
    """Return the weights that can be rounded with feedback, by the names of their layers.

    Linear layers and convolutions whose weight is theirs alone. Others (tied, recurrent, embeddings, attention's packed projections) are
    rounded without feedback.

    Args:
        model: of ordinary layers.
    """
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found = {}
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is None or not issubclass(kind, OneWeight) or is_factorized(module):
            continue
        weight = module._parameters.get("weight")
        if weight is None or users[id(weight)] > 1 or not weight.is_floating_point():
            continue
        matrix = kind.fold(module, "weight", weight.detach(), "channel")
        factors = {"weight": Factors.empty(weight, matrix, 1)}
        geometry = kind.adopt(renew(module, type(module)), factors, "channel")
        if not geometry.looks_up and matrix.shape[-1] <= WIDEST_INPUTS:
            found[name] = Weight(name, module, geometry)
    return found
