"""Positions of the kept rows or columns of a layer and of the others, and the dense layer's attributes."""

from typing import Any

import torch
from torch import Tensor, nn

from .chain import TwoLayers
from .composed import Composed


class PlainInterpolative(TwoLayers):
    """Base of `PlainRows` and `PlainColumns`: positions of the pieces, and the dense layer's attributes.

    ``weight`` is the dense weight, ``stride`` its stride. Reading dtype, device or shape of ``weight`` costs nothing; any other use of it
    multiplies the parts, and gradients reach both. To change it, change the two layers.

    Args:
        kept: the layer that holds the kept rows or columns, with the stride, padding and dilation of the dense layer.
        mix: the layer that holds the coefficients of the others: an `nn.Linear`, or a convolution of kernel size one.
        start: first kept channel of a cyclic window; in each group for a grouped convolution.
        order: instead of `start`: all channels, those of `kept` first, then those of `mix`; applied by a gather.
        conv1d: the `nn.Linear` layers stand for the ``Conv1D`` of transformers, whose weight is ``(in, out)``.
    """

    gather: Tensor | None

    def __init__(
        self, kept: nn.Module, mix: nn.Module, *, start: int | None = None, order: Tensor | None = None, conv1d: bool = False
    ) -> None:
        super().__init__()
        rank, others = self._sizes(kept, mix)
        if (start is None) == (order is None):
            raise ValueError(f"{self._get_name()}: set exactly one of start and order ({'neither' if start is None else 'both'} is set)")
        self.kept, self.mix = kept, mix
        groups = int(getattr(kept, "groups", 1))
        size = (rank + others) // groups
        if start is not None and not 0 <= start < size:
            raise ValueError(f"{self._get_name()}: start must be in [0, {size - 1}], got {start}")
        self.register_buffer("gather", None if order is None else self._gathering(_checked(order, rank + others, self._get_name())))
        self.start = start
        self._place(start or 0, size, rank // groups, groups)
        self.__dict__.update(self._settings(conv1d))

    def _place(self, start: int, size: int, rank: int, groups: int) -> None:
        """Note what is cut where: the inner piece stands at `cut` within the outer one."""
        self._axis = -1 - len(getattr(self.kept, "kernel_size", ()))
        self._groups, self._rank, self._wraps = groups, rank, start + rank > size
        self._cut = start + rank - size if self._wraps else start
        self._inner = size - rank if self._wraps else rank
        self._outer = size - self._inner

    @property
    def weight(self) -> Tensor:
        """The weight of the dense layer, in its layout; read only."""
        kept, mix = self.kept.weight, self.mix.weight
        if torch.compiler.is_compiling() or not isinstance(mix, Tensor):  # then it is a proxy of torch.fx
            return self._composed()
        trained = bool(kept.requires_grad or mix.requires_grad)
        return Composed(self._get_name(), self._composed, self._weight_shape(), mix.dtype, mix.device, trained)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            kind = self._get_name()
            raise AttributeError(f"{kind}: its {name} is composed of its two layers' and cannot be set; set those of its kept and mix")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Say where the kept channels stand."""
        return f"start={self.start}" if self.gather is None else "free pivots"

    def _get_name(self) -> str:
        raise NotImplementedError

    def _sizes(self, kept: Any, mix: Any) -> tuple[int, int]:
        raise NotImplementedError

    def _composed(self) -> Tensor:
        raise NotImplementedError

    def _gathering(self, order: Tensor) -> Tensor:
        """Return what `forward` gathers by."""
        raise NotImplementedError

    def _standing(self) -> Tensor | None:
        """Return where each of the dense layer's channels stands among those of both parts; None for a window."""
        raise NotImplementedError

    def _size_names(self) -> tuple[str, str]:
        if isinstance(self.kept, nn.Embedding):
            return "num_embeddings", "embedding_dim"
        return ("in_features", "out_features") if isinstance(self.kept, nn.Linear) else ("in_channels", "out_channels")

    def _settings(self, conv1d: bool) -> dict[str, Any]:
        """Return the attributes of the dense layer."""
        kept: Any = self.kept
        own: tuple[str, ...] = ()
        if isinstance(kept, nn.Embedding):
            own = ("num_embeddings", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        elif not isinstance(kept, nn.Linear):
            own = ("kernel_size", "stride", "padding", "dilation", "output_padding", "groups", "padding_mode", "transposed")
        in_, out = self._dense_sizes()
        names = ("nx", "nf") if conv1d else self._size_names()
        return {name: getattr(kept, name) for name in own} | dict(zip(names, (in_, out), strict=True))

    def _dense_sizes(self) -> tuple[int, int]:
        raise NotImplementedError

    def _weight_shape(self) -> tuple[int, ...]:
        layer: Any = self
        in_, out = self._dense_sizes()
        if isinstance(self.kept, nn.Embedding) or hasattr(self, "nx"):
            return in_, out
        if isinstance(self.kept, nn.Linear):
            return out, in_
        sides = (in_, out) if layer.transposed else (out, in_)
        return sides[0], sides[1] // layer.groups, *layer.kernel_size

    def _cat(self, kept: Tensor, others: Tensor, axis: int) -> Tensor:
        """Bring the two parts of one group into the order of the dense layer's channels."""
        inner, outer = (others, kept) if self._wraps else (kept, others)
        if self._cut == 0:
            return torch.cat([inner, outer], axis)
        if self._cut == self._outer:
            return torch.cat([outer, inner], axis)
        return torch.cat([outer.narrow(axis, 0, self._cut), inner, outer.narrow(axis, self._cut, self._outer - self._cut)], axis)

    def _together(self, kept: Tensor, others: Tensor, axis: int) -> Tensor:
        """The same of all groups along `axis`, which is negative."""
        gather = self._standing()
        if gather is not None:
            return torch.cat([kept, others], axis).index_select(axis, gather)
        if self._groups == 1:
            return self._cat(kept, others, axis)
        blocks = (self._groups, -1)
        split = self._cat(kept.unflatten(axis, blocks), others.unflatten(axis, blocks), axis)  # type: ignore[no-untyped-call]
        return split.flatten(axis - 1, axis)

    def _parts(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Take the kept channels and the others out of the dense layer's: the inverse of `_together`."""
        gather = self.gather
        if gather is not None:
            x, rank = x.index_select(axis, gather), self._groups * self._inner
            return x.narrow(axis, 0, rank), x.narrow(axis, rank, x.shape[axis] - rank)
        if self._groups == 1:
            return self._split(x, axis)
        kept, others = self._split(x.unflatten(axis, (self._groups, -1)), axis)  # type: ignore[no-untyped-call]
        return kept.flatten(axis - 1, axis), others.flatten(axis - 1, axis)

    def _split(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        behind = self._cut + self._inner
        inner = x.narrow(axis, self._cut, self._inner)
        if self._cut == 0:
            outer = x.narrow(axis, behind, self._outer)
        elif self._cut == self._outer:
            outer = x.narrow(axis, 0, self._outer)
        else:
            outer = torch.cat([x.narrow(axis, 0, self._cut), x.narrow(axis, behind, self._outer - self._cut)], axis)
        return (outer, inner) if self._wraps else (inner, outer)


def width(layer: Any, side: str) -> int:
    """Return the number of input or output channels."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings if side == "in" else layer.embedding_dim
    return int(getattr(layer, f"{side}_features" if isinstance(layer, nn.Linear) else f"{side}_channels"))


def blocks(conv: Any, rows: str) -> Tensor:
    """Return a kernel as ``(groups, rows, columns, taps...)``, with output or input channels of a group as rows."""
    groups, sides = conv.groups, (conv.out_channels // conv.groups, conv.in_channels // conv.groups)
    blocks = conv.weight.reshape(groups, *(sides[::-1] if conv.transposed else sides), *conv.kernel_size)
    return blocks.transpose(1, 2) if conv.transposed == (rows == "out") else blocks  # type: ignore[no-any-return]


def kernel(matrix: Tensor, conv: Any, rows: str) -> Tensor:
    """Return a kernel in torch's layout from ``(groups * rows, columns * taps)``: the inverse of `_blocks`."""
    groups, sides = conv.groups, (conv.out_channels // conv.groups, conv.in_channels // conv.groups)
    blocks = matrix.reshape(groups, *(sides if rows == "out" else sides[::-1]), *conv.kernel_size)
    return (blocks.transpose(1, 2) if conv.transposed == (rows == "out") else blocks).flatten(0, 1)


def check_joint(owner: str, rank: int, met: int, others: int, kept: Any, mix: Any) -> None:
    """Raise where the two layers do not fit together."""
    if rank != met or others < 1:
        rule = "must have the same rank, with channels left to mix (at full rank write the dense layer)"
        raise ValueError(f"{owner}: kept and mix {rule}; got {rank} and {met}, and {others} to mix")
    if isinstance(mix, nn.Linear) == isinstance(kept, nn.Linear | nn.Embedding):
        one = isinstance(mix, nn.Linear) or (mix.groups == kept.groups and all(size == 1 for size in mix.kernel_size))
        if one and not getattr(mix, "transposed", False):
            return
    raise ValueError(f"{owner}: mix must be a Linear, or for a convolution one of kernel size 1 with as many groups; got {mix}")


def _checked(order: Tensor, size: int, owner: str) -> Tensor:
    """Check that an order is a permutation and return it."""
    if tuple(order.shape) != (size,) or not (order.is_meta or torch.equal(order.sort().values.cpu(), torch.arange(size))):
        raise ValueError(f"{owner}: order must hold each of 0 ... {size - 1} once, got shape {tuple(order.shape)}")
    return order.long()
