"""`merge` writes plain layers in the place of factorized ones."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from spectrim.checks import check, outside_inference_mode, unwrapped
from spectrim.errors import LayerError
from spectrim.forms.svd import Factors
from spectrim.layers import FactorizedLayer, plain_attention
from spectrim.layers.attention import become_attention
from spectrim.layers.base import Share, become
from spectrim.plain.encoder import follow_layers
from spectrim.protocols import Latencies
from spectrim.surgery.batchnorm import fold_batchnorms
from spectrim.surgery.coverage import break_evens
from spectrim.surgery.exchange import duplicate
from spectrim.surgery.factorize import set_writing


@outside_inference_mode
def merge(model: nn.Module, *, latency: Latencies | None = None, fold_batchnorm: bool = False) -> nn.Module:
    """Return a copy of `model` with ordinary layers only: two small ones below a layer's break-even rank, one dense one above it.

    The break-even rank is where two operations take as many multiply-accumulates as the dense one, or with `latency` as many seconds.

    All parameters are in `torch.nn` layers. Two layers in the place of one are a `PlainPair`: an `nn.Sequential` that also answers for the
    dense layer, as models read ``weight.dtype`` or ``stride`` of their layers. LSTM, GRU and MultiheadAttention, whose fused kernels take
    dense weights only, become `PlainRecurrent` and `PlainAttention` where that costs less. These three are `spectrim.plain.parts`, a
    single file that imports torch alone; nothing else of this package is needed. What will be written for each layer is in
    `coverage(model, latency=...)`. Hooks, training flags and the memory format of convolutions are kept. An embedding that is tied to a
    head stays tied by the larger factor; the smaller one is there twice.

    Args:
        model: factorized, wholly or in part; it is left untouched. A dense model comes back as a copy.
        latency: a `LatencyTable` of this model, before or after a cut: each layer is written in the form that is faster on that machine.
        fold_batchnorm: multiply each BatchNorm in eval mode that follows a convolution or a linear layer, and nothing else, into that
            layer, see `fold_batchnorms`; an `Identity` takes its place. For shipping: such a network should not be
            trained any further.

    Returns:
        A model with the same function, up to rounding.

    Raises:
        LayerError: when `latency` is of another model; with `fold_batchnorm`, when the model is in training mode or cannot be traced.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> low = factorize(nn.Sequential(nn.Linear(64, 64)), rank=8)
        >>> [tuple(p.shape) for p in merge(low).parameters()]
        [(8, 64), (64, 8), (64,)]
    """
    check("merge", model=model, latency=latency)
    clone = duplicate(unwrapped(model))
    shared: dict[tuple[int, str, tuple[int, ...]], nn.Parameter] = {}

    def share(factors: Factors, part: str, tensor: Tensor) -> nn.Parameter:
        key = (id(factors), part, tuple(tensor.shape))
        if key not in shared:
            shared[key] = nn.Parameter(tensor.detach(), requires_grad=factors.S.requires_grad)
        return shared[key]

    if latency is not None:
        set_writing(clone, "pair")  # the only writing that tables time
    limits = break_evens(clone, latency)

    def paying(layer: nn.Module) -> list[str]:
        held = layer.named_factors() if isinstance(layer, FactorizedLayer) else []
        return [weight for weight, factors in held if factors.rank <= limits[id(layer), weight]]

    for name, module in list(clone.named_modules()):
        if "forward" in vars(module) and isinstance(module, FactorizedLayer):
            raise LayerError(name, "its forward was replaced on this very layer", hint="take that away before merging")
        if isinstance(module, nn.MultiheadAttention):
            _merge_attention(module, paying, share)
        elif isinstance(module, FactorizedLayer):
            pair = module.split(share, paying(module))
            module.release(share) if pair is None else become(module, pair)
    follow_layers(clone)
    if fold_batchnorm:
        fold_batchnorms(clone)
    return clone


def _merge_attention(attention: nn.MultiheadAttention, paying: Callable[[nn.Module], list[str]], share: Share) -> None:
    """Merge an attention, any part of it factorized, with its output projection, which torch's own forward reads and does not call."""
    out = attention.out_proj
    plain: Any = plain_attention(attention, [*paying(attention), *(f"out_proj.{weight}" for weight in paying(out))])
    pair = out.split(share, paying(out)) if isinstance(out, FactorizedLayer) else None
    if isinstance(out, FactorizedLayer) and pair is None:
        out.release(share)
    if plain is not None:
        plain.out_proj = out if pair is None else pair
        become_attention(attention, plain)
    elif isinstance(attention, FactorizedLayer):
        attention.release(share)
