"""One layer as two that hold r of its rows or columns, and the coefficients of the others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .composed import Composed
from .pieces import PlainInterpolative, blocks, check_joint, kernel, width


class PlainRows(PlainInterpolative):
    """``y = P [k; mix(k)]`` with ``k = kept(x)``: r output channels by rows of the dense layer, the others mixed from them.

    Args:
        kept: `nn.Linear`, `nn.Embedding` (of which r columns are kept) or a convolution, plain or transposed, to r channels; with the bias
            of the kept channels.
        mix: ``r -> m - r``; with ``b_others - mix b_kept`` as bias.
        start: as for `PlainInterpolative`; channels of the output.
        order: as for `PlainInterpolative`.
        conv1d: as for `PlainInterpolative`.

    Examples:
        >>> rows = PlainRows(nn.Linear(8, 2), nn.Linear(2, 4), start=3)
        >>> rows.weight.shape, rows(torch.zeros(5, 8)).shape, list(rows.state_dict())
        (torch.Size([6, 8]), torch.Size([5, 6]), ['kept.weight', 'kept.bias', 'mix.weight', 'mix.bias'])
    """

    def forward(self, input, output_size: Any = None):  # type: ignore[no-untyped-def]
        """Run both layers.

        Args:
            input (Any): as for the dense layer; not annotated, as torch.fx gives a proxy and torch.jit takes no other type than a tensor.
            output_size: of a transposed convolution, as `nn.ConvTranspose2d` takes it.
        """
        if not torch.jit.is_scripting() and output_size is not None:  # type: ignore[attr-defined]
            return self._sized(input, output_size)
        kept = self.kept(input)
        return self._together(kept, self.mix(kept), self._axis)

    @torch.jit.unused
    def _sized(self, input: Tensor, output_size: Sequence[int]) -> Tensor:
        if not getattr(self.kept, "transposed", False):
            raise TypeError(f"PlainRows: only a transposed convolution takes an output_size, not {type(self.kept).__name__}")
        kept = self.kept(input, output_size)
        return self._together(kept, self.mix(kept), self._axis)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the dense layer, composed of those of both layers; read only."""
        if isinstance(self.kept, nn.Embedding):
            raise AttributeError("an embedding has no bias")  # then torch says that there is no such attribute
        kept, mix = self.kept.bias, self.mix.bias
        if kept is None:
            return None
        if torch.compiler.is_compiling() or not isinstance(mix, Tensor):
            return self._composed_bias()
        trained = bool(kept.requires_grad or mix.requires_grad or self.mix.weight.requires_grad)
        shape = (self._dense_sizes()[1],)
        return Composed("PlainRows", self._composed_bias, shape, mix.dtype, mix.device, trained)

    def _composed_bias(self) -> Tensor:
        kept: Any = self.kept.bias
        mixing: Any = self.mix.weight.reshape(self._groups, -1, self._rank)  # type: ignore[operator]
        others = (mixing @ kept.reshape(self._groups, self._rank, 1)).flatten() + self.mix.bias
        return self._together(kept, others, -1)

    def _get_name(self) -> str:
        return "PlainRows"

    def _gathering(self, order: Tensor) -> Tensor:
        return order.argsort().to(torch.int32)

    def _standing(self) -> Tensor | None:
        return self.gather

    def _composed(self) -> Tensor:  # with sizes known beforehand, as torch.fx gives proxies for weights
        kept, mix = self.kept.weight, self.mix.weight
        if isinstance(self.kept, nn.Embedding):
            return self._together(kept, kept @ mix.T, -1)  # type: ignore[operator, arg-type]
        if isinstance(self.kept, nn.Linear):
            whole = self._together(kept, mix @ kept, -2)  # type: ignore[operator, arg-type]
            return whole.T if hasattr(self, "nx") else whole
        split = blocks(self.kept, rows="out")
        others = (mix.reshape(self._groups, -1, self._rank) @ split.flatten(2)).flatten(0, 1)  # type: ignore[operator]
        whole = self._together(split.flatten(0, 1).flatten(1), others, -2)
        return kernel(whole, self, rows="out")

    def _sizes(self, kept: Any, mix: Any) -> tuple[int, int]:
        rank, others = width(kept, "out"), width(mix, "out")
        check_joint(self._get_name(), rank, width(mix, "in"), others, kept, mix)
        if (getattr(kept, "bias", None) is None) != (mix.bias is None):
            raise ValueError("PlainRows: kept and mix must both have a bias, or none of them")
        return rank, others

    def _dense_sizes(self) -> tuple[int, int]:
        return width(self.kept, "in"), width(self.kept, "out") + width(self.mix, "out")


class PlainColumns(PlainInterpolative):
    """``y = kept(x_kept + mix(x_others))``: r input channels times columns of the dense layer; the others are mixed into them first.

    Args:
        kept: `nn.Linear` or a convolution, plain or transposed, of r channels; with the bias.
        mix: ``n - r -> r``, without bias.
        start: as for `PlainInterpolative`; channels of the input.
        order: as for `PlainInterpolative`.
        conv1d: as for `PlainInterpolative`.

    Examples:
        >>> columns = PlainColumns(nn.Linear(2, 6), nn.Linear(6, 2, bias=False), start=0)
        >>> columns.weight.shape, columns(torch.zeros(5, 8)).shape, list(columns.state_dict())
        (torch.Size([6, 8]), torch.Size([5, 6]), ['kept.weight', 'kept.bias', 'mix.weight'])
    """

    def forward(self, input, output_size: Any = None):  # type: ignore[no-untyped-def]
        """Run both layers.

        Args:
            input (Any): as for the dense layer; not annotated, as torch.fx gives a proxy and torch.jit takes no other type than a tensor.
            output_size: of a transposed convolution, as `nn.ConvTranspose2d` takes it.
        """
        kept, others = self._parts(input, self._axis)
        mixed = kept + self.mix(others)
        if not torch.jit.is_scripting() and output_size is not None:  # type: ignore[attr-defined]
            return self._sized(mixed, output_size)
        return self.kept(mixed)

    @torch.jit.unused
    def _sized(self, mixed: Tensor, output_size: Sequence[int]) -> Tensor:
        if not getattr(self.kept, "transposed", False):
            raise TypeError(f"PlainColumns: only a transposed convolution takes an output_size, not {type(self.kept).__name__}")
        return self.kept(mixed, output_size)  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the dense layer, a parameter of `kept`."""
        return self.kept.bias  # type: ignore[return-value]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "bias":
            self.kept.bias = value
        else:
            super().__setattr__(name, value)

    def _get_name(self) -> str:
        return "PlainColumns"

    def _gathering(self, order: Tensor) -> Tensor:
        return order.to(torch.int32)

    def _standing(self) -> Tensor | None:
        return None if self.gather is None else self.gather.argsort()

    def _composed(self) -> Tensor:
        kept, mix = self.kept.weight, self.mix.weight
        if isinstance(self.kept, nn.Linear):
            whole = self._together(kept, kept @ mix, -1)  # type: ignore[operator, arg-type]
            return whole.T if hasattr(self, "nx") else whole
        split = blocks(self.kept, rows="in")
        others = (mix.reshape(self._groups, self._rank, -1).mT @ split.flatten(2)).flatten(0, 1)  # type: ignore[operator]
        whole = self._together(split.flatten(0, 1).flatten(1), others, -2)
        return kernel(whole, self, rows="in")

    def _sizes(self, kept: Any, mix: Any) -> tuple[int, int]:
        if isinstance(kept, nn.Embedding):
            raise TypeError("PlainColumns: an embedding has no input to mix; write it as PlainRows, which keeps columns of its table")
        rank, others = width(kept, "in"), width(mix, "in")
        check_joint(self._get_name(), rank, width(mix, "out"), others, kept, mix)
        if mix.bias is not None:
            raise ValueError("PlainColumns: mix must have no bias")
        return rank, others

    def _dense_sizes(self) -> tuple[int, int]:
        return width(self.kept, "in") + width(self.mix, "in"), width(self.kept, "out")
