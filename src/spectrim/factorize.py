"""`factorize` and its inverse `merge`."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from operator import index
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor, nn

from spectrim import linalg
from spectrim.errors import LayerError, RankError, SettingError
from spectrim.layers import FactorizedLayer, Factors, factor_name, kind_of, named_factors, plain_attention
from spectrim.linalg import Fold
from spectrim.protocols import LayerFilter, RankRule
from spectrim.surgery import carry_hooks, decide, duplicate, replace

Scheme = Literal["auto", "channel", "spatial"]
Ranks = SupportsIndex | RankRule | Mapping[str, SupportsIndex]

AUTO_ENERGY = 0.95
"""Spectral energy at which ``scheme="auto"`` compares the two schemes."""


def chooser(ranks: Ranks | None, name: str, shape: tuple[int, int], held: int) -> Callable[[Tensor], int]:
    """Return the function that chooses one weight's rank from its spectrum.

    Args:
        ranks: a number (capped at the full rank), a rule, a mapping from names to ranks, or None to keep all.
        name: the weight's name, as `named_factors` gives it.
        shape: ``(out, in)``, for the message of an error.
        held: number of singular values at hand.

    Raises:
        RankError: when the chosen rank is not an integer in ``[1, held]``.
    """

    def choose(spectrum: Tensor) -> int:
        rank: Any
        if ranks is None:
            rank = held
        elif isinstance(ranks, Mapping):
            rank = ranks.get(name, held)
        elif isinstance(ranks, SupportsIndex):
            rank = min(ranks if isinstance(ranks, bool) else index(ranks), held)
        else:
            rank = ranks(spectrum)
        if isinstance(rank, bool) or not isinstance(rank, SupportsIndex) or not 1 <= index(rank) <= held:
            raise RankError(name, got=rank, out=shape[0], in_=shape[1], held=held)
        return index(rank)

    return choose


def pick_scheme(module: Any, scheme: Scheme) -> Fold:
    """Return the scheme for one layer: the asked one where it exists; for ``auto`` the one with fewer MACs at equal energy."""
    kind = kind_of(module)
    assert kind is not None
    offered = kind.schemes(module)
    if scheme != "auto":
        return scheme if scheme in offered else offered[0]
    if len(offered) == 1:
        return offered[0]

    def macs(fold: Fold) -> float:
        matrix = kind.fold(module, "weight", module.weight.detach(), fold).double()
        rank = linalg.rank_at_energy(linalg.pooled_spectrum(torch.linalg.svdvals(matrix)), AUTO_ENERGY)
        return kind.work(module, "weight", fold, rank, None)

    return min(offered, key=macs)


def factorize(
    model: nn.Module,
    scheme: Scheme = "auto",
    where: LayerFilter | None = None,
    *,
    rank: Ranks | None = None,
) -> nn.Module:
    """Return a copy of `model` in which dense layers hold ``U diag(|S|) Vh``; the function is preserved at full rank.

    Args:
        model: any module; it is left untouched.
        scheme: how 2-D convolution kernels are folded: ``channel``, ``spatial``, or ``auto``, which takes for each layer the one with fewer
            MACs at 95 % of the spectral energy. Other layers have one scheme only.
        where: selects layers by name and module, see `match`; everything but the classifier head when omitted.
        rank: how many singular values to keep from the start: a number (capped at each layer's full rank), a rank rule, or a mapping
            ``{layer: rank}`` (layers it does not name keep all). All when omitted.

    Returns:
        The factorized model. Tied weights share their factors, shared modules stay shared; dtype, device, hooks, `requires_grad` and
        training mode are kept. `coverage` says what became of each layer.

    Raises:
        SettingError: for an unknown scheme.
        RankError: for a rank outside ``[1, full]``.
        LayerError: when nothing can be factorized, when `rank` names a layer that is not, or when a weight is not finite.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
        >>> low = factorize(model, scheme="channel")
        >>> low[0].U.shape, low[0].S.shape, low[0].Vh.shape
        (torch.Size([8, 8]), torch.Size([8]), torch.Size([8, 27]))

    Source: Yang et al., arXiv 2004.09031, section 3.1.
    Deviation: factors start from the SVD of the present weights; the published code starts CNN factors at random.
    """
    if scheme not in ("auto", "channel", "spatial"):
        raise SettingError("factorize", "scheme", got=scheme, rule="'auto', 'channel' or 'spatial'")

    def of(name: str, weight: Tensor, matrix: Tensor) -> Factors:
        if not torch.isfinite(weight).all():
            raise LayerError(name, "its weight holds NaN or infinite values", hint="load a sound checkpoint")
        shape = (matrix.shape[-2], matrix.shape[-1])
        return Factors.of(weight, matrix, chooser(rank, name, shape, min(shape)))

    reasons = decide(model, where)
    chosen = {name: None for name, reason in reasons.items() if reason is None}
    if not chosen:
        listed = "; ".join(f"'{name}': {reason}" for name, reason in list(reasons.items())[:5]) or "it has no parameters"
        raise LayerError(type(model).__name__, "nothing to factorize", hint=listed)
    low = build(model, lambda name, module: pick_scheme(module, scheme) if name in chosen else None, of)
    if isinstance(rank, Mapping):
        check_names(low, rank)
    return low


def check_names(model: nn.Module, ranks: Mapping[str, SupportsIndex]) -> None:
    """Raise a LayerError when a mapping names something that is not a factorized weight of `model`."""
    known = [name for name, _ in named_factors(model)]
    for name in ranks:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"factorized are: {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}"
            raise LayerError(name, "is not a factorized weight of this model", hint=hint)


def build(model: nn.Module, choose: Callable[[str, nn.Module], Fold | None], make: Callable[[str, Tensor, Tensor], Factors]) -> nn.Module:
    """Return a copy of `model` with chosen layers factorized: the one place where dense layers are exchanged.

    Args:
        model: left untouched.
        choose: layer name, module → scheme, or None to leave the layer.
        make: weight name, weight, folded matrix → factors; called once for tied weights.
    """
    clone = duplicate(model)
    made: dict[int, tuple[Fold, Factors]] = {}
    replacements: dict[int, nn.Module] = {}
    for name, module in list(clone.named_modules()):
        kind = kind_of(module)
        scheme = choose(name, module) if kind else None
        if kind is None or scheme is None:
            continue
        factors = {}
        for weight_name in kind.weights(module):
            weight: Tensor = getattr(module, weight_name)
            if id(weight) in made:
                scheme, factors[weight_name] = made[id(weight)]
                continue
            matrix = kind.fold(module, weight_name, weight.detach(), scheme)
            factors[weight_name] = make(factor_name(name, weight_name), weight, matrix)
            made[id(weight)] = (scheme, factors[weight_name])
        replacements[id(module)] = kind.adopt(module, factors, scheme)
    return replace(clone, replacements)


def merge(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with ordinary layers only: two small ones below a layer's break-even rank, one dense one above it.

    The result holds `torch.nn` layers and needs nothing of this package; LSTM, GRU and MultiheadAttention, whose fused kernels take
    dense weights only, become the small modules of `spectrim.layers.plain` (a single file that imports torch alone) where that costs
    fewer MACs. What will be written for each layer is in `coverage(model)`. Two things a pair of layers cannot do: take the ``output_size``
    of a transposed convolution, and tie an embedding to a head by more than their larger factor.

    Args:
        model: factorized, wholly or in part; it is left untouched. A dense model comes back as a copy.

    Returns:
        A model with the same function, up to rounding.

    Examples:
        >>> low = factorize(nn.Sequential(nn.Linear(64, 64)), rank=8)
        >>> [tuple(p.shape) for p in merge(low).parameters()]
        [(8, 64), (64, 8), (64,)]
    """
    clone = duplicate(model)
    shared: dict[tuple[int, str, tuple[int, ...]], nn.Parameter] = {}

    def share(factors: Factors, part: str, tensor: Tensor) -> nn.Parameter:
        key = (id(factors), part, tuple(tensor.shape))
        if key not in shared:
            shared[key] = nn.Parameter(tensor.detach(), requires_grad=factors.S.requires_grad)
        return shared[key]

    replacements: dict[int, nn.Module] = {}
    belongs: set[int] = set()
    for module in clone.modules():
        if isinstance(module, nn.MultiheadAttention):
            belongs.add(id(module.out_proj))
            plain = plain_attention(module)
            if plain is not None:
                replacements[id(module)] = carry_hooks(module, plain)
                continue
            if isinstance(module.out_proj, FactorizedLayer):
                replacements[id(module.out_proj)] = module.out_proj.release(share)
        if isinstance(module, FactorizedLayer) and id(module) not in belongs:
            pair = module.split(share)
            replacements[id(module)] = module.release(share) if pair is None else carry_hooks(module, pair)
    return replace(clone, replacements)
