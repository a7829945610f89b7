"""Multiply-accumulates, counted while the model runs."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from spectrim.checks import unwrapped
from spectrim.errors import SpectrimError
from spectrim.metrics.calls import arguments, evaluating
from spectrim.metrics.inputs import batch_size_of, check_batch_size
from spectrim.metrics.tensors import send

SKIP = "__dynamo_disable"
"""Where torch keeps what it calls in place of a function that must not be compiled."""


def count_macs(model: nn.Module, inputs: Any, *, batch_size: int | None = None) -> int:
    """Count the multiply-accumulates for one example, in eval mode; training flags are as before afterwards.

    Counted are matrix products and convolutions (padding included; bias and elementwise operations left out), by torch's
    `FlopCounterMode` with formulas for the kernels that it does not know: fused attention and recurrent layers, the fast paths of
    `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`, products with vectors, distances, `nn.Bilinear`, quantized linear layers.
    Masked and causal attention counts in full; nested tensors count without padding. Looking up an embedding costs nothing. Sparse matrices
    count as dense ones. Not counted: Fourier transforms, decompositions of `torch.linalg`, and custom kernels
    (C++ or Triton extensions that have registered no formula).

    Args:
        model: any module; of a compiled one the original is run.
        inputs: one batch: a tensor, a tuple of arguments or a dict of keyword arguments.
        batch_size: examples in `inputs`; None to find it by agreement of sizes, see `batch_size_of`. Give 1 for an unbatched input.

    Returns:
        Multiply-accumulates divided by the batch, to the nearest integer (sequences of different length may differ in cost).

    Raises:
        SettingError: inputs and output agree on no batch size.
        SpectrimError: the model runs a kernel that is known to work but cannot be counted (quantized convolutions and recurrent layers).

    Examples:
        >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 10, 10))
        21600
    """
    check_batch_size(inputs, batch_size)
    model = unwrapped(model)
    args, kwargs = send(arguments(inputs, model), model)
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    counter.mod_tracker = _Whole()  # type: ignore[assignment]
    with (
        evaluating(model),
        _frozen(model),
        _without_compiler(),
        counter,
    ):  # the counter fails for a parameter that a model hands to one of its layers
        output = model(*args, **kwargs)
    batch = batch_size_of(inputs, batch_size, model=model, output=output)
    return (counter.get_total_flops() + batch) // (2 * batch)


class _Whole:
    """Takes the place of torch's tracker of modules, which costs more than the counting: all operations belong to the whole model."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Track nothing."""

    def __exit__(self, *_: object) -> None:
        """Track nothing."""


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Inside, torch's counter does not import the compiler, which takes a second, only to say that it must not be compiled itself."""
    inner: Any = getattr(flop_counter, "_FlopCounterMode", None)  # private: other versions of torch may have none
    handler: Any = getattr(getattr(inner, "__torch_dispatch__", None), "__wrapped__", None)
    if handler is None or "torch._dynamo" in sys.modules or hasattr(handler, SKIP):
        yield
        return
    setattr(handler, SKIP, handler)
    try:
        yield
    finally:
        delattr(handler, SKIP)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside; `requires_grad` is restored afterwards."""
    trained = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


# Formulas for the kernels that torch's counter does not know. Each returns the multiply-accumulates of one call.


@dataclasses.dataclass(frozen=True)
class _Formula:
    """Calls a formula as the counter wants it: with the tensors themselves, for floating-point operations."""

    macs: Callable[..., int]
    _get_raw: bool = True

    def __call__(self, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return 2 * self.macs(out_val, *args, **kwargs)


def _attention(out: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Scores and their product with the values."""
    return math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _lengths(x: Tensor) -> list[int]:
    """Return the length of each sequence of ``(batch, time, features)``, nested or not."""
    return x._nested_tensor_size()[:, 0].tolist() if x.is_nested else [x.shape[1]] * x.shape[0]


def _multihead(out: Any, query: Tensor, key: Tensor, value: Tensor, embed: int, *_: Any, **__: Any) -> int:
    """Projections of query, key, value and output, scores and their product with the values."""
    pairs = zip(_lengths(query), _lengths(key), strict=True)
    return sum(2 * embed * (embed * (target + source) + target * source) for target, source in pairs)


def _encoder_layer(out: Any, x: Tensor, embed: int, *rest: Any, **__: Any) -> int:
    """Attention, and the two linear layers behind it."""
    first, second = rest[12], rest[14]
    behind: int = sum(_lengths(x)) * (first.numel() + second.numel())
    return _multihead(out, x, x, x, embed) + behind


def _recurrent_layer(out: Any, x: Tensor, weight_ih: Tensor, weight_hh: Tensor, *_: Any, **__: Any) -> int:
    """Both matrices at each time step of each sequence."""
    return math.prod(x.shape[:-1]) * (weight_ih.numel() + weight_hh.numel())


def _recurrent(out: Any, x: Tensor, weights: list[Tensor], *_: Any, **__: Any) -> int:
    """All matrices, of all layers and directions, at each time step of each sequence."""
    return math.prod(x.shape[:-1]) * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _product(out: Any, *args: Any, **_: Any) -> int:
    """Every row of the last matrix but one with every column of the last."""
    a = args[-2] if len(args) == 2 else args[1]
    return int(out.numel() * a.shape[-1])


def _convolution(out: Tensor, x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, turned: bool, *_: Any) -> int:
    """Torch's formula, on the shapes."""
    return conv_flop_count(list(x.shape), list(weight.shape), list(out.shape), transposed=turned) // 2


def _linear(out: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    """Every feature of `x` in every feature of the output."""
    return x.numel() * out.shape[-1]


def _grouped(out: Any, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """A product for each group: of the rows of `a`, of the columns of `b`, or of both batches."""
    return (a.shape[0] if a.dim() == b.dim() == 3 else 1) * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _bilinear(out: Any, a: Tensor, weight: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """For each row, ``a @ weight`` and the product of that with ``b``."""
    return a.shape[0] * weight.shape[0] * weight.shape[2] * (weight.shape[1] + 1)


_KNOWN: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm"), _product),  # torch has these, too, at ten times the time
    "aten.convolution": _convolution,
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_fused_attention_overrideable": _attention,
    "aten._scaled_dot_product_attention_math_for_mps": _attention,
    "aten._native_multi_head_attention": _multihead,
    "aten._transformer_encoder_layer_fwd": _encoder_layer,
    "aten.mkldnn_rnn_layer": _recurrent_layer,
    "aten._cudnn_rnn": _recurrent,
    "aten.miopen_rnn": _recurrent,
    "aten._lstm_mps": lambda out, x, hx, weights, *_, **__: _recurrent(out, x, weights),
    "aten._trilinear": _bilinear,
    "aten._cdist_forward": lambda out, a, b, *_, **__: out.numel() * a.shape[-1],
    "aten._euclidean_dist": lambda out, a, b: out.numel() * a.shape[-1],
    "aten.mv": lambda out, a, v: a.numel(),
    "aten.addmv": lambda out, c, a, v, **_: a.numel(),
    "aten.dot": lambda out, a, b: a.numel(),
    "aten.vdot": lambda out, a, b: a.numel(),
    "aten.addr": lambda out, c, a, b, **_: a.numel() * b.numel(),
    "aten.addbmm": lambda out, c, a, b, **_: a.numel() * b.shape[-1],
    "aten._addmm_activation": lambda out, c, a, b, **_: a.numel() * b.shape[-1],
    "aten._int_mm": _linear,
    "aten._weight_int8pack_mm": _linear,
    "aten._weight_int4pack_mm": _linear,
    "aten._weight_int4pack_mm_for_cpu": _linear,
    "aten._dyn_quant_matmul_4bit": _linear,
    "aten._grouped_mm": _grouped,
    "aten._scaled_grouped_mm": _grouped,
    **{f"quantized.linear{kind}": _linear for kind in ("", "_relu", "_dynamic", "_relu_dynamic", "_dynamic_fp16")},
}


_UNKNOWN = (
    *(f"quantized.conv{n}d{kind}" for n in (1, 2, 3) for kind in ("", "_relu", "_dynamic")),
    *(f"quantized.conv_transpose{n}d{kind}" for n in (1, 2, 3) for kind in ("", "_dynamic")),
    *("aten.quantized_lstm", "aten.quantized_gru", "aten.mkldnn_linear", "aten.mkldnn_convolution"),
)


@functools.cache
def _formulas() -> dict[Any, _Formula]:
    """Return the formulas by kernel, for those that this torch has."""

    def no_formula(name: str) -> Callable[..., int]:
        def fail(out: Any, *args: Any, **kwargs: Any) -> int:
            raise SpectrimError(
                f"count_macs: the model runs {name}, whose cost cannot be derived from its arguments; count its float version"
            )

        return fail

    table = _KNOWN | {name: no_formula(name) for name in _UNKNOWN}
    kernels = {name: getattr(getattr(torch.ops, name.split(".")[0]), name.split(".")[1], None) for name in table}
    return {kernel: _Formula(table[name]) for name, kernel in kernels.items() if kernel is not None}
