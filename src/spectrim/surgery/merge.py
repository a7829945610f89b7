"""`merge`: plain layers in place of factorized ones."""

from torch import Tensor, nn

from spectrim.checks import check, outside_inference_mode, unwrapped
from spectrim.checks.words import worded
from spectrim.errors import LayerError
from spectrim.forms.form import Form
from spectrim.layers import is_factorized, named_layers, sites
from spectrim.layers.attention import merge_attention_
from spectrim.layers.taking_over import write_
from spectrim.plain.encoder import follow_layers
from spectrim.protocols import Latencies
from spectrim.surgery.batchnorm import fold_batchnorms
from spectrim.surgery.coverage import break_evens
from spectrim.surgery.exchange import FINISHED, duplicate
from spectrim.surgery.factorize import set_writing
from spectrim.surgery.tasks import settle_


@outside_inference_mode
@worded
def merge(model: nn.Module, *, latency: Latencies | None = None, fold_batchnorm: bool = False) -> nn.Module:
    """Return a copy of `model` with ordinary layers only: two small ones below a layer's break-even rank, one dense one above it.

    The break-even rank is where two operations take as many multiply-accumulates as the dense one, or with `latency` as many seconds.

    All parameters are in `torch.nn` layers. Two layers in place of one are a `PlainPair`: an `nn.Sequential` with the attributes of the
    dense layer, as models read ``weight.dtype`` or ``stride`` of their layers. LSTM, GRU and MultiheadAttention, whose fused kernels take
    dense weights only, become `PlainRecurrent` and `PlainAttention` where that costs less. These three are `spectrim.plain.parts`, a
    single file that imports torch alone; nothing else of this package is needed. What will be written for each layer is in
    `coverage(model, latency=...)`. Hooks, training flags and the memory format of convolutions are kept. An embedding that is tied to a
    head stays tied by the larger factor; the smaller one is there twice.

    Args:
        model: factorized, wholly or in part; it is left untouched. A dense model comes back as a copy. Of a network with tasks the
            selected one is written.
        latency: a `LatencyTable` of this model, before or after a cut: each layer is written in the form that is faster on that machine.
        fold_batchnorm: multiply each BatchNorm in eval mode that follows a convolution or a linear layer, and nothing else, into that
            layer, see `fold_batchnorms`; an `Identity` takes its place. For deployment: do not train such a network
            further.

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
    settle_(clone)
    shared: dict[tuple[Form, str, tuple[int, ...]], nn.Parameter] = {}

    def share(factors: Form, part: str, tensor: Tensor) -> nn.Parameter:
        key = (factors, part, tuple(tensor.shape))
        if key not in shared:
            shared[key] = nn.Parameter(tensor.detach(), requires_grad=factors.trained)
        return shared[key]

    if latency is not None:
        set_writing(clone, "pair")  # the only writing that tables time
    limits = break_evens(clone, latency)

    paying: dict[nn.Module, list[str]] = {layer: [] for _, layer in named_layers(clone)}
    for site in sites(clone):
        if site.factors.rank <= limits[site.name]:
            paying[site.layer].append(site.key)
    for name, module in list(clone.named_modules()):
        if is_factorized(module) and "forward" in vars(module):
            raise LayerError(name, "its forward was replaced on this very layer", hint="remove the replacement before merging")
        if isinstance(module, nn.MultiheadAttention):
            merge_attention_(module, paying, share)
        elif is_factorized(module):
            write_(module, share, paying[module])
    follow_layers(clone)
    if fold_batchnorm:
        fold_batchnorms(clone)
    for mark in FINISHED:
        mark(clone)
    return clone
