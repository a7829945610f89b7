"""`factorize`: factorized layers in place of dense ones."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import Timer
from typing import Any, Literal, SupportsIndex

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from spectrim import linalg
from spectrim.checks import check, outside_inference_mode, unwrapped
from spectrim.checks.words import worded
from spectrim.errors import LayerError, SettingError
from spectrim.forms import FORMS, Factors, Form
from spectrim.layers import factor_name, kind_of, named_factors, named_layers, sites
from spectrim.layers.exchanged import Writing
from spectrim.layers.weights import OneWeight
from spectrim.linalg.fold import KERNELS, MATRICES, Fold
from spectrim.linalg.spectral import OVERSAMPLE
from spectrim.plain.encoder import follow_layers
from spectrim.protocols import Where
from spectrim.surgery.exchange import FINISHED, HELD, copy_without
from spectrim.surgery.head import call_order
from spectrim.surgery.ranks import Ranks, check_names, chooser
from spectrim.surgery.select import decide, layer_filter

Scheme = Literal["auto", "all", "channel", "spatial", "input", "tucker", "cp", "tt", "quaternion", "dense"]


Method = Literal["exact", "randomized", "auto"]


AUTO_ENERGY = 0.8
"""Spectral energy at which ``scheme="auto"`` compares the schemes.

About what the layers of small residual networks keep at a third to a half of their multiply-accumulates.
"""


PATIENCE_S = 2.0
"""Seconds before a progress bar appears."""


def pick_scheme(module: Any, scheme: Scheme) -> Fold:
    """Return the scheme for one layer: the asked one where it exists; for ``auto`` the one with fewer MACs at equal energy."""
    kind = kind_of(module)
    assert kind is not None
    offered = kind.schemes(module)
    if scheme == "dense" and issubclass(kind, OneWeight) and offered != ("quaternion",):
        return scheme
    if scheme == "tt" and scheme not in offered and "tucker" in offered:
        return "tucker"  # which a tensor train along one axis of taps is
    if scheme not in ("auto", "all"):
        return scheme if scheme in offered else offered[0]
    offered = tuple(fold for fold in offered if fold in MATRICES) or offered
    if len(offered) == 1 or module.weight.is_meta:
        return offered[0]

    def macs(fold: Fold) -> float:
        spectrum = linalg.spectrum(kind.fold(module, "weight", module.weight.detach(), fold))
        rank = linalg.rank_at_energy(linalg.pooled_spectrum(spectrum), AUTO_ENERGY)
        return kind.work(module, "weight", fold, rank, None)

    return min(offered, key=macs)


def decomposition(method: Method, rank: int | None, full: int) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return the SVD for one weight: randomized where `method` asks for it, or where ``auto`` finds it several times faster.

    Args:
        method: as for `factorize`.
        rank: the rank to keep; None when the spectrum has to be known first.
        full: the full rank. A sketch as wide as that saves nothing, so the exact SVD is taken.
    """
    if rank is None or method == "exact":
        return linalg.svd
    widest = full // 4 if method == "auto" else full - 1
    return partial(linalg.randomized_svd, rank=rank) if rank + OVERSAMPLE <= widest else linalg.svd


@outside_inference_mode
@worded
def factorize(
    model: nn.Module,
    scheme: Scheme = "auto",
    where: Where | None = None,
    *,
    rank: Ranks | None = None,
    method: Method = "exact",
    writing: Writing = "pair",
    example_inputs: Any = None,
    progress: bool = False,
) -> nn.Module:
    """Return a copy of `model` in which dense layers hold ``U diag(S) Vh``; the function is preserved at full rank.

    Takes memory for the factors, a copy of what stays dense, and the decomposition of one weight at a time. On the meta device nothing is
    computed: factors of the right shapes are made there.

    Args:
        model: any module; it is left untouched.
        scheme: how convolution kernels are folded, see `linalg.to_matrix`: ``channel``, all taps first and then a 1x1; ``input``, a
            1x1 and then all taps; ``spatial``, the taps of one axis and then those of the others; ``tucker``, a 1x1, all taps and a
            1x1, with two ranks (`spectrim.forms.Tucker2`); ``cp``, the same with depthwise taps and one rank (`spectrim.forms.CP`);
            ``tt``, a 1x1, the taps of each axis and a 1x1 (`spectrim.forms.TensorTrain`); or ``auto``, which takes for each layer
            the matrix with the fewest MACs at 80 % of the spectral energy (``channel`` on the meta device), as does ``all``, which
            `compress` and `plan` then exchange for the best of all forms at the budget. A layer without the asked scheme, as 1x1
            kernels and layers that are no convolutions, takes ``channel``; a kernel along one axis, ``tucker`` for ``tt``.
            ``dense`` decomposes nothing: each weight is held as it is, to be pruned and rounded by
            `spectrim.surgery.constrain.constrain`. Quaternion layers (`spectrim.plain.quaternion`) always take ``quaternion``.
        where: selects layers: a name, a glob, a list of these, or a predicate of name and module, see `match`; everything but the
            classifier head when omitted.
        rank: how many singular values to keep from the start: a number (capped at each layer's full rank), a rank rule, or a mapping
            ``{layer: rank}`` (layers it does not name keep all). All when omitted.
        method: ``exact``, the SVD in float64; ``randomized``, a sketch of ``rank + 16`` columns with four power iterations in the weight's
            precision (float32 at least), whose error is within 1 % of the best possible one, see `linalg.randomized_svd`; ``auto``, that
            where ``rank + 16`` is at most a quarter of the full rank. A sketch needs a number or a mapping; otherwise ``auto`` is exact.
        writing: how `merge` will write what is cut, which `allocate` prices: ``pair``, two operations through the rank,
            ``r (m + n)`` numbers of an ``m x n`` weight; ``interpolative``, ``r`` of its rows or columns and the coefficients that mix the
            others, ``r (m + n - r)`` numbers, so that any cut saves. Tied weights and layers that cannot be written so (recurrent ones,
            attention's input projections, the spatial scheme) keep the pair.
        example_inputs: one batch of inputs; the classifier head is the last layer called for the output. Without it names and sizes decide.
        progress: whether to show a progress bar, on stderr and on a terminal only, once it has taken two seconds.

    Returns:
        The factorized model. Tied weights share their factors, shared modules stay shared; dtype, device, hooks, `requires_grad` and
        training mode are kept. `coverage` lists each layer.

    Raises:
        SettingError: for an unknown scheme or method, for ``randomized`` without a `rank` that is a number or a mapping, and for a rank
            rule on the meta device.
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
    check("factorize", model=model, where=where, rank=rank, example_inputs=example_inputs)
    model = unwrapped(model)
    stated = isinstance(rank, Mapping | SupportsIndex)
    if method == "randomized" and not stated:
        rule = "a number or a mapping {layer: rank} with method='randomized'"
        raise SettingError("factorize", "rank", got=rank, rule=rule, hint="rules need the whole spectrum: method='exact'")

    def of(name: str, weight: Tensor, matrix: Tensor, scheme: Fold) -> Form:
        tick(name)
        if scheme not in MATRICES:
            return kernel(name, weight, matrix, scheme)
        shape = (matrix.shape[-2], matrix.shape[-1])
        choose = chooser(rank, name, shape, min(shape))
        if weight.is_meta:
            if not (stated or rank is None):
                raise SettingError("factorize", "rank", got=rank, rule="a number or a mapping on the meta device, which has no spectra")
            return Factors.empty(weight, matrix, choose(matrix))
        if not torch.isfinite(weight.detach()).all():
            raise LayerError(name, "its weight holds NaN or infinite values", hint="load an undamaged checkpoint")
        return Factors.of(weight, matrix, choose, decomposition(method, choose(matrix) if stated else None, min(shape)), name)

    def kernel(name: str, weight: Tensor, folded: Tensor, scheme: Fold) -> Form:
        if weight.is_meta and (scheme in KERNELS or not (stated or rank is None)):
            raise SettingError("factorize", "scheme", got=scheme, rule="one of matrices on the meta device: sizes depend on values")
        if weight.is_meta:
            most: Any = FORMS[scheme].full_size_of(folded)
            return FORMS[scheme].empty(weight, folded, chooser(rank, name, (folded.shape[0], folded.shape[1]), most)(folded))
        if not torch.isfinite(weight.detach()).all():
            raise LayerError(name, "its weight holds NaN or infinite values", hint="load an undamaged checkpoint")
        form = FORMS[scheme].of(weight, folded, None, name=name)
        if isinstance(rank, Mapping):
            return form.cut_to(form.checked(name, rank.get(name, form.size)))
        return form if rank is None else form.cut(chooser(rank, name, form.shape))

    order = None if example_inputs is None or where is not None else call_order(model, example_inputs)
    reasons = decide(model, layer_filter(where, model), order=order)
    chosen = {name: None for name, reason in reasons.items() if reason is None}
    if not chosen:
        listed = "; ".join(f"'{name}': {reason}" for name, reason in list(reasons.items())[:5]) or "it has no parameters"
        if next(named_factors(model), None) is not None:
            listed = f"it is factorized already, merge(model) makes it dense; {listed}"
        raise LayerError(type(model).__name__, "nothing to factorize", hint=listed)
    modules = dict(model.named_modules())
    count = sum(len(kind.weights(modules[name])) for name in chosen if (kind := kind_of(modules[name])))
    with _ticker(progress, count) as tick:
        low = build(model, lambda name, module: pick_scheme(module, scheme) if name in chosen else None, of)
    if next(named_layers(low), None) is None:
        raise LayerError(type(model).__name__, "nothing to factorize", hint=f"of {len(chosen)} layers each: {HELD}")
    if isinstance(rank, Mapping):
        check_names(low, rank)
    set_writing(low, writing)
    return low


def set_writing(model: nn.Module, writing: Writing) -> None:
    """Set how `merge` will write each layer, in place; layers with tied factors keep the pair, whose halves can be shared."""
    uses = Counter(site.factors for site in sites(model))
    for _, layer in named_layers(model):
        tied = any(uses[factors] > 1 for _, factors in layer.named_factors())
        layer.__dict__["writing"] = "pair" if tied else writing


@contextmanager
def _ticker(progress: bool, total: int) -> Iterator[Callable[[str], None]]:
    """Yield what is called with the name of the weight at hand; it shows names on stderr once `PATIENCE_S` have passed."""
    console = Console(stderr=True)
    if not progress or not console.is_terminal:
        yield lambda name: None
        return
    bar = Progress(console=console, transient=True)
    task = bar.add_task("factorize", total=total, completed=-1)  # the first tick starts the first weight
    timer = Timer(PATIENCE_S, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda name: bar.update(task, advance=1, description=f"factorize {name}")
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


def build(
    model: nn.Module, choose: Callable[[str, nn.Module], Fold | None], make: Callable[[str, Tensor, Tensor, Fold], Form]
) -> nn.Module:
    """Return a copy of `model` with chosen layers factorized: the one place where dense layers are exchanged.

    Weights that are exchanged are read from `model` and never copied. In the copy a layer stays the object that everything else refers to.

    Args:
        model: left untouched.
        choose: layer name, module → scheme, or None to leave the layer.
        make: weight name, weight, folded weight, scheme → its form; called once for tied weights.
    """
    schemes: dict[str, Fold] = {}
    chosen: dict[str, tuple[str, ...]] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if (kind := kind_of(module)) is not None and (scheme := choose(name, module)) is not None:
            schemes[name], chosen[name] = scheme, kind.weights(module)
    copied = copy_without(model, chosen)
    made: dict[int, tuple[Fold, Form]] = {}
    for name in (name for name in chosen if name in copied.missing):
        kind, scheme, factors = kind_of(modules[name]), schemes[name], {}
        assert kind is not None
        for key in chosen[name]:
            weight: Tensor = getattr(modules[name], key)
            if id(weight) not in made:
                matrix = kind.fold(modules[name], key, weight.detach(), scheme)
                made[id(weight)] = scheme, make(factor_name(name, key), weight, matrix, scheme)
            scheme, factors[key] = made[id(weight)]
        kind.adopt(copied.layers[name], factors, scheme)
    follow_layers(copied.model)
    for mark in FINISHED:
        mark(copied.model)
    return copied.model
