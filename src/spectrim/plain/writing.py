"""From a layer, and the parts of its weight by rows or columns, to the plain layer that has them."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from .interpolative import PlainColumns, PlainRows
from .pieces import PlainInterpolative

Side = Literal["rows", "columns"]
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def interpolative_layer(
    layer: Any, side: Side, kept: Tensor, mix: Tensor, *, start: int | None = None, order: Tensor | None = None
) -> PlainInterpolative:
    """Write a layer by rows or columns of its weight and the coefficients of the others.

    Of a convolution ``rows`` are output channels, those of the matrix ``out x (in * taps)``; ``columns`` are input channels, those of the
    matrix ``(out * taps) x in``, output channels first. Of an embedding only ``columns`` can be kept.

    Args:
        layer: an `nn.Linear`, ``Conv1D`` of transformers, `nn.Embedding` or a convolution, or one that has the attributes of one (a
            factorized layer); gives the geometry, the bias, dtype, and which of them are trained. Its weight is not used.
        side: which side of the matrix is kept.
        kept: ``(r, n)`` for rows, ``(m, r)`` for columns; of a grouped convolution ``(groups, ...)``.
        mix: ``(m - r, r)`` for rows, ``(r, n - r)`` for columns; the same.
        start: first kept position of a cyclic window in each group.
        order: in its place, for free pivots: the kept positions, then the others, ``(m,)`` or ``(n,)``, or ``(groups, ...)``.

    Raises:
        ValueError: when nothing is left to mix, for shapes that do not fit, or a layer for which this is not defined.

    Examples:
        >>> layer = nn.Linear(3, 2)
        >>> kept, mix = layer.weight.detach()[:1], torch.tensor([[2.0]])
        >>> interpolative_layer(layer, "rows", kept, mix, start=0).weight.shape
        torch.Size([2, 3])

    """
    if not isinstance(layer, nn.Embedding) and not hasattr(layer, "nf") and not isinstance(layer, nn.Linear | _any_convolution()):
        raise ValueError(f"interpolative_layer: layer must be a Linear, an Embedding or a convolution, got {type(layer).__name__}")
    if kept.numel() == 0 or mix.numel() == 0:
        raise ValueError("interpolative_layer: nothing is left to mix at full rank; write the dense layer")
    dtype, trained = layer.weight.dtype, bool(layer.weight.requires_grad)
    if isinstance(layer, nn.Embedding):
        made: PlainInterpolative = _embedding(layer, side, kept.to(dtype), mix.to(dtype), start, order)
    elif side == "rows":
        made = _by_rows(layer, kept, mix, start, order, dtype)
    else:
        made = _by_columns(layer, kept.to(dtype), mix.to(dtype), start, order)
    for part in (made.kept, made.mix):
        part.weight.requires_grad_(trained)
    return made.train(layer.training)


def _any_convolution() -> Any:
    return nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def _embedding(layer: nn.Embedding, side: Side, kept: Tensor, mix: Tensor, start: int | None, order: Tensor | None) -> PlainRows:
    """Look up the kept columns and mix the others of them."""
    if side != "columns":
        raise ValueError("interpolative_layer: an embedding is a look-up; write it by columns")
    if layer.max_norm is not None or layer.sparse:
        raise ValueError("interpolative_layer: an embedding with max_norm or sparse gradients needs its dense table")
    options = {"padding_idx": layer.padding_idx, "scale_grad_by_freq": layer.scale_grad_by_freq, "device": "meta"}
    table = nn.Embedding(layer.num_embeddings, kept.shape[1], **options)  # type: ignore[arg-type]
    return PlainRows(_with(table, kept.contiguous()), _linear(mix.T, None, False), start=start, order=order)


def _by_rows(layer: Any, kept: Tensor, mix: Tensor, start: int | None, order: Tensor | None, dtype: torch.dtype) -> PlainRows:
    groups, rank, size = getattr(layer, "groups", 1), kept.shape[-2], kept.shape[-2] + mix.shape[-2]
    positions = _positions(size, rank, start, order, groups)
    first, second = _biases(layer.bias, positions, rank, mix)
    trained = layer.bias is not None and bool(layer.bias.requires_grad)
    kept, mix = kept.to(dtype), mix.to(dtype)
    if not hasattr(layer, "kernel_size"):
        one, two = _linear(kept, first, trained), _linear(mix, second, trained)
        return PlainRows(one, two, start=start, order=order, conv1d=hasattr(layer, "nf"))
    blocks = kept.reshape(groups, rank, -1, *layer.kernel_size)
    own = _convolution(layer, blocks.transpose(1, 2) if layer.transposed else blocks, layer.in_channels, groups * rank, first, trained)
    pointwise = _pointwise(layer, mix, second, trained)
    return PlainRows(own, pointwise, start=start, order=_global(order, rank, groups))


def _by_columns(layer: Any, kept: Tensor, mix: Tensor, start: int | None, order: Tensor | None) -> PlainColumns:
    trained, rank = layer.bias is not None and bool(layer.bias.requires_grad), kept.shape[-1]
    if not hasattr(layer, "kernel_size"):
        one, two = _linear(kept, layer.bias, trained), _linear(mix, None, False)
        made = PlainColumns(one, two, start=start, order=order, conv1d=hasattr(layer, "nf"))
    else:
        groups = layer.groups
        blocks = kept.reshape(groups, -1, *layer.kernel_size, rank).movedim(-1, 1)  # (groups, r, out, taps...)
        blocks = blocks if layer.transposed else blocks.transpose(1, 2)
        own = _convolution(layer, blocks, groups * rank, layer.out_channels, layer.bias, trained)
        made = PlainColumns(own, _pointwise(layer, mix, None, False), start=start, order=_global(order, rank, groups))
    if layer.bias is not None:
        made.kept.bias = layer.bias  # the very parameter
    return made


def _positions(size: int, rank: int, start: int | None, order: Tensor | None, groups: int) -> Tensor:
    """Return the kept positions of each group, then the others, ``(groups, size)``."""
    if order is not None:
        return order.reshape(groups, size)
    inside = torch.zeros(size, dtype=torch.bool)
    inside[((start or 0) + torch.arange(rank)) % size] = True
    return torch.cat([inside.nonzero(), (~inside).nonzero()]).T.expand(groups, -1)


def _biases(bias: Tensor | None, positions: Tensor, rank: int, mix: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return ``b_kept`` and ``b_others - mix b_kept``."""
    if bias is None:
        return None, None
    ordered = bias.detach().double().reshape(positions.shape).gather(1, positions.to(bias.device))
    kept, others = ordered[:, :rank], ordered[:, rank:]
    mixing = mix.reshape(len(positions), -1, rank).to(bias.device).double()
    return kept.flatten(), (others - (mixing @ kept.unsqueeze(-1)).squeeze(-1)).flatten()


def _global(order: Tensor | None, rank: int, groups: int) -> Tensor | None:
    """Number the channels of all groups: the kept ones of each group first, then the others of each."""
    if order is None:
        return None
    order = order.reshape(groups, -1)
    order = order + order.shape[1] * torch.arange(groups, device=order.device).unsqueeze(1)
    return torch.cat([order[:, :rank].flatten(), order[:, rank:].flatten()])


def _linear(weight: Tensor, bias: Tensor | None, trained: bool) -> nn.Linear:
    out, in_ = weight.shape
    made = nn.Linear(in_, out, bias=bias is not None, device="meta")
    return _with(made, weight.contiguous(), bias, trained)  # type: ignore[no-any-return]


def _pointwise(layer: Any, mix: Tensor, bias: Tensor | None, trained: bool) -> Any:
    """Return a convolution of kernel size one that mixes channels within each group."""
    axes, groups = len(layer.kernel_size), layer.groups
    weight = mix.reshape(-1, mix.shape[-1], *(1,) * axes)
    made = CONVOLUTIONS[axes - 1](groups * mix.shape[-1], len(weight), 1, groups=groups, bias=bias is not None, device="meta")
    return _with(made, _as_laid_out(layer, weight), bias, trained)


def _convolution(layer: Any, blocks: Tensor, in_: int, out: int, bias: Tensor | None, trained: bool) -> Any:
    """Return a convolution of the layer's own geometry."""
    kind = (TRANSPOSED if layer.transposed else CONVOLUTIONS)[len(layer.kernel_size) - 1]
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    options = {name: getattr(layer, name) for name in names}
    if layer.transposed:
        options["output_padding"] = layer.output_padding
    made = kind(in_, out, bias=bias is not None, device="meta", **options)
    return _with(made, _as_laid_out(layer, blocks.flatten(0, 1)), bias, trained)


def _as_laid_out(layer: Any, weight: Tensor) -> Tensor:
    """Return a kernel in the memory format of the layer's own, which a factorized layer notes in ``channels_last``."""
    last = CHANNELS_LAST.get(weight.dim())
    if last is None:
        return weight.contiguous()
    own = layer.weight
    laid_out = isinstance(own, nn.Parameter) and own.is_contiguous(memory_format=last) and not own.is_contiguous()
    return weight.contiguous(memory_format=last if getattr(layer, "channels_last", laid_out) else torch.contiguous_format)


def _with(made: Any, weight: Tensor, bias: Tensor | None = None, trained: bool = False) -> Any:
    made.weight = nn.Parameter(weight)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(weight.dtype).contiguous(), requires_grad=trained)
    return made
