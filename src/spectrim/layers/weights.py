"""Factorized layers with one weight, which is observed and written here, and with several."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectrim.errors import LayerError
from spectrim.layers.base import FactorizedLayer
from spectrim.layers.exchanged import Share
from spectrim.layers.uses import Features, Side
from spectrim.linalg.fold import Fold
from spectrim.linalg.writings import write
from spectrim.plain.composed import Composed
from spectrim.plain.writing import interpolative_layer

ROWS_SIZE = 2**22
"""Elements of the rows that a layer gives at a time: 32 MB in float64."""


def refuse_to_set(layer: nn.Module, name: str) -> None:
    """Raise a LayerError for the name of a weight that is composed."""
    if name in layer.__dict__.get("_modules", {}).get("factors", ()):
        hint = "set U, S and Vh, or factorize again"
        raise LayerError(layer._get_name(), f"its {name} is composed and cannot be set", hint=hint)  # type: ignore[no-untyped-call]


def composed_weight(layer: FactorizedLayer, name: str) -> Tensor:
    """Return one weight in torch's layout, composed when its values are asked for; inside a compiler at once."""
    if torch.compiler.is_compiling():
        return layer.dense_weight(name)
    factors = layer.factors_of(name)
    shape = layer.unfold(layer, name, torch.empty(factors.folded_shape, device="meta"), layer.scheme).shape
    trained = any(parameter.requires_grad for parameter in factors.parameters())
    made = Composed(layer._get_name(), lambda: layer.dense_weight(name), shape, factors.dtype, factors.device, trained)
    made._layer = layer
    return made


def refuse_reset(layer: FactorizedLayer) -> None:
    """Raise a LayerError for `reset_parameters`, by which torch draws every parameter a layer has, factors too."""
    raise LayerError(layer._get_name(), "its weights are factors, which are not drawn again", hint="factorize a new layer")


class OneWeight(FactorizedLayer):
    """A factorized layer with the single weight called ``weight``."""

    def interpolated(self, share: Share) -> nn.Module | None:
        """Return the plain layer that holds ``r (m + n - r)`` numbers; None where the pair is written."""
        if not self.interpolates("weight", self.rank):
            return None
        factors, layer = self.factors_of("weight"), cast(Any, self)
        kind = self.interpolated_kind(self, self.scheme)
        made = write(factors.U.detach(), factors.Vh.detach(), factors.S.detach(), kind=str(kind), dtype=factors.dtype).interpolation
        if made is None:
            return None
        plain = interpolative_layer(layer, made.side, made.kept, made.mix, start=made.start, order=made.order)
        for part in (plain.kept, plain.mix):
            part.requires_grad_(factors.S.requires_grad)
        return plain

    def params_written(self, name: str, rank: int | None, site: str) -> dict[str, int]:
        """Two tensors, which layers with the same weight share."""
        if rank is None or not self.factors_of(name).is_matrix or self.interpolates(name, rank):
            return super().params_written(name, rank, site)
        out, in_ = self.factors_of(name).shape
        return {"left": rank * out, "right, transposed" if self.looks_up else "right": rank * in_}

    def _features_at(self, side: Side, x: Any) -> Iterator[Features]:
        """Yield the input or output of a layer that multiplies features with its weight; its features lie where torch has them."""
        if isinstance(x, Tensor):
            yield Features(self.factors_of("weight"), side, x, -1 - len(getattr(self, "kernel_size", ())))

    @property
    def U(self) -> Tensor:
        """Left factor ``(..., out, rank)``."""
        return self.factors_of("weight").U

    @property
    def S(self) -> Tensor:
        """Singular values ``(..., rank)``, signed."""
        return self.factors_of("weight").S

    @property
    def Vh(self) -> Tensor:
        """Right factor ``(..., rank, in)``."""
        return self.factors_of("weight").Vh

    @property
    def rank(self) -> int:
        """Number of singular values held."""
        return self.factors_of("weight").rank

    @property
    def weight(self) -> Tensor:
        """The dense weight in torch's layout, composed when its values are asked for; read only.

        Dtype, device and shape cost nothing, gradients reach the factors, and a change in place is an error.
        """
        return composed_weight(self, "weight")

    @weight.setter
    def weight(self, value: Tensor) -> None:
        raise LayerError(self._get_name(), "its weight is composed and cannot be set", hint="set U, S and Vh, or factorize again")

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_to_set(self, name)
        super().__setattr__(name, value)

    def input_rows(self, x: Tensor, output_shape: Sequence[int], scheme: Fold | None = None) -> Iterator[Tensor]:
        """Yield what the folded matrix is multiplied with as the layer runs on `x`: rows ``(blocks, n, in)``, a part at a time.

        Args:
            x: the layer's input.
            output_shape: of its output.
            scheme: how the matrix is folded; the layer's own way when omitted.
        """
        yield from _parts(x)

    def output_rows(self, y: Tensor, input_shape: Sequence[int]) -> Iterator[Tensor]:
        """Yield the outputs of the folded matrix, or gradients at them: rows ``(blocks, n, out)``, a part at a time, in that order.

        Args:
            y: of the shape of the layer's output.
            input_shape: of its input.
        """
        yield from _parts(y)


def _parts(x: Tensor) -> Iterator[Tensor]:
    """Yield the rows of ``(..., features)``, several at a time."""
    for rows in torch.split(x.reshape(-1, x.shape[-1]), max(1, ROWS_SIZE // x.shape[-1])):
        yield rows.unsqueeze(0)


class SeveralWeights(FactorizedLayer):
    """A factorized layer with several weights, which go by torch's names: ``layer.weight_ih_l0`` is composed on each access."""

    def reset_parameters(self) -> None:
        """Refuse to draw the factors again."""
        refuse_reset(self)

    def _reset_parameters(self) -> None:
        refuse_reset(self)

    def __getattr__(self, name: str) -> Any:
        """Return a weight by torch's name; it is composed when its values are asked for, and refuses changes."""
        factors = self.__dict__.get("_modules", {}).get("factors")
        return composed_weight(self, name) if factors is not None and name in factors else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_to_set(self, name)
        nn.Module.__setattr__(self, name, value)  # not torch's own, which keeps lists of weights

    def composed(self, **more: Any) -> Any:
        """Return this layer as torch's own forward wants it: with weights composed once, for a single call.

        Args:
            more: further attributes.
        """
        layer: Any = object.__new__(type(self))
        layer.__dict__.update(self.__dict__)
        layer.__dict__.update({name: self.dense_weight(name) for name in self.factors}, **more)
        return layer
