"""`correct` refits the weights of a cut network to what the network before the cut computes."""

from collections import Counter, deque
from collections.abc import Iterable
from contextlib import closing, suppress
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from spectrim import linalg
from spectrim.checks import check, outside_inference_mode, unwrapped
from spectrim.checks.words import worded
from spectrim.errors import LayerError, SettingError
from spectrim.forms.svd import Factors
from spectrim.layers import named_layers, sites
from spectrim.layers.weights import OneWeight
from spectrim.metrics.calls import evaluating
from spectrim.surgery.exchange import duplicate
from spectrim.surgery.moments import WIDE, WIDEST_INPUTS, Calibration
from spectrim.surgery.observing import batches_of, check_examples, isolated
from spectrim.surgery.regression import folded, moments_of, refit_
from spectrim.surgery.side_by_side import ALIVE, Unpaired, _Both, _in_one_pass, _layer_by_layer, _Met, _order, _Unsteady, paired, room
from spectrim.surgery.wide import basis_of, refit_by_steps_

ROWS, FEWEST_ROWS = 128, 2**18
"""Positions that are looked at for each input of a weight, drawn among those of all examples, and how many they are at least.

In a trial of two seeds, with a quarter of them the refit of ResNet-8 at a fifth of its multiply-accumulates ended up to 0.6 nats higher.
"""


WIDE_INPUTS, WIDE_PATCHES = 1536, 6144
"""Weights with more inputs, and more taps of both operations, are refitted in a few directions of them, see `basis_of`.

Equations for all inputs would take most of the time. On ResNet-8, where neither is needed, the directions cost 0.01 to 0.15 nats in the
channel scheme.
"""


def uncorrected(model: nn.Module) -> dict[str, str]:
    """Return the factorized weights that `correct` leaves as they are, by name, and why.

    Args:
        model: factorized.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> list(uncorrected(factorize(nn.LSTM(4, 4))).values())
        ['its inputs are inside a fused kernel', 'its inputs are inside a fused kernel']
    """
    inside: set[nn.Module] = {module.out_proj for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    users = Counter(site.factors for site in sites(model))
    reasons = {}
    for site in sites(model):
        if site.layer.looks_up:
            reasons[site.name] = "an embedding is a look-up"
        elif not isinstance(site.layer, OneWeight) or site.layer in inside:
            reasons[site.name] = "its inputs are inside a fused kernel"
        elif not site.factors.is_matrix:
            reasons[site.name] = "its form is no product of two matrices"
        elif users[site.factors] > 1:
            reasons[site.name] = "it is tied to another layer's"
        elif site.factors.shape[1] > WIDEST_INPUTS:
            reasons[site.name] = WIDE
    return reasons


@outside_inference_mode
@worded
def correct(
    cut: nn.Module,
    dense: nn.Module,
    data: Iterable[Any],
    *,
    calibration: Calibration | None = None,
    examples: int | None = 1024,
    progress: bool = False,
) -> nn.Module:
    """Return a copy of a cut network whose weights are refitted, layer by layer, to the outputs of the network before the cut.

    In the order the layers run, each gets the weight of its rank, and the bias, that minimize ``sum ||W x + b - W' x~ - b'||^2``: ``x`` is
    the input of the layer in the dense network, ``x~`` its input here, after the layers that are corrected already. Without the rank
    that is the regression ``W_t = W + W (C_xx~ - C) C^+`` with ``C = C_x~x~``, moments centered where there is a bias; the best weight of
    the rank is then the truncation of ``W_t`` in the norm ``||(W_t - W') C^1/2||``. In the other schemes, where a weight of low rank is no
    truncation of that regression, the second factor is refitted to the output with the first one given, once with the one held and once
    with that of the truncation over columns, and the better is taken. Where nothing improves on the present weight it stays.

    It replaces the first steps of fine-tuning: errors on the calibration data fall, layer by layer, but with few examples wide layers
    overfit them. BatchNorm layers keep their statistics, which `recalibrate` renews afterwards. Of the
    positions in images and sequences some are drawn, 128 for each input of a weight and at least 262,144 over all examples.

    Takes one pass over the data through both networks, which wait at each layer while that is refitted. Where a layer runs more than once
    or the waiting data would need more than half of the free memory, each layer takes a separate pass, up to that layer. Linear layers and
    convolutions are refitted; `uncorrected` lists the others.

    Args:
        cut: factorized, at its final ranks; it is left untouched.
        dense: the network before the cut, dense or factorized, with layers of the same names.
        data: batches ``(inputs, target)`` or inputs alone; those that are used are kept in memory.
        calibration: made with a loss, of the network before the cut: errors then count by the gradients at the layer's outputs, ``||G^1/2
            (W_t - W') C^1/2||``; in the other schemes only where the truncation over columns is taken.
        examples: stop after the batch that completes this number, counted along the leading dimension, >= 1; None for all data.
        progress: whether to show a progress bar over layers, on stderr and on a terminal only.

    Returns:
        The corrected copy, of the same ranks.

    Raises:
        LayerError: when `dense` has no layer of the name and sizes of one that is corrected, or its inputs are not finite.
        SettingError: for `examples` below 1, or when `data` is empty.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> from spectrim.surgery.prune import prune
        >>> dense, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(64, 4)
        >>> cut = prune(factorize(dense, where=lambda name, module: True), {"0": 2})
        >>> better = correct(cut, dense, [x])
        >>> bool((better(x) - dense(x)).norm() <= (cut(x) - dense(x)).norm())
        True

    Source: the asymmetric data reconstruction of Zhang, Zou, He and Sun, arXiv 1505.06798, section 3.3, for linear responses.
    Deviation: the regression starts from ``W``, so that directions that the data leave out keep the dense weight; pseudo-inverses by
    iterated Tikhonov regularization; no response of a non-linearity is fitted; the spatial and the input scheme are ours.
    """
    check("correct", cut_model=cut, dense=dense, batches=data, calibration=calibration)
    check_examples("correct", examples)
    cut, dense = unwrapped(cut), unwrapped(dense)
    corrected = duplicate(cut)
    changed = correct_(corrected, dense, data, calibration=calibration, examples=examples, progress=progress)
    with torch.no_grad():
        for factors in changed:
            factors.set_(*linalg.svd_of_product(*factors.block_parts()))
    return corrected


def correct_(
    corrected: nn.Module,
    dense: nn.Module,
    data: Iterable[Any],
    *,
    calibration: Calibration | None = None,
    examples: int | None = 1024,
    progress: bool = False,
) -> list[Factors]:
    """Refit a cut network in place, otherwise as `correct`; rows of ``Vh`` have length one and need not be orthogonal then.

    Args:
        corrected: factorized, at its final ranks.
        dense: as for `correct`.
        data: as for `correct`.
        calibration: as for `correct`.
        examples: as for `correct`.
        progress: as for `correct`.

    Returns:
        The factors that were changed.
    """
    check_examples("correct", examples)
    batches = [inputs for inputs, _ in batches_of(data, corrected, examples, targets=False, progress=False, title="correct")]
    if not batches:
        hint = "a generator can be read only once: give a list or a DataLoader"
        raise SettingError("correct", "data", got=f"nothing from {type(data).__name__}", rule="at least one batch", hint=hint)
    left_out = uncorrected(corrected)
    layers = {name: layer for name, layer in named_layers(corrected) if isinstance(layer, OneWeight) and name not in left_out}
    originals = _originals(dense, layers)
    both = _Both(dense, corrected, originals, layers, batches)
    console, changed = Console(stderr=True), list[Factors]()
    before = [(p, p.detach().clone()) for layer in layers.values() for p in layer.parameters()]
    with isolated(corrected), evaluating(corrected), evaluating(dense):
        order, size = _order(corrected, layers, batches[0])

        def refit_one(name: str, met: Iterable[_Met]) -> None:
            layer, original = layers[name], originals[name]
            left = None if calibration is None else calibration.metrics(name, layer.factors_of("weight").shape)[0]
            dense = folded(layer, original)
            most = max(FEWEST_ROWS, ROWS * dense.shape[-1]) / (len(batches) * order[name])
            basis = None
            if layer.scheme != "channel" and dense.shape[-1] > WIDE_PATCHES:
                if refit_by_steps_(layer, original, dense, _finite(name, met)):
                    changed.append(layer.factors_of("weight"))
                return
            if layer.scheme == "channel" and dense.shape[-1] > WIDE_INPUTS:
                met = _finite(name, met)
                basis = basis_of(layer, met, dense, most)
                dense = dense @ basis.mT
            moments = moments_of(layer, met, dense, most, basis)
            _check(name, (moments.own, moments.wanted))
            if refit_(layer, original, dense, moments, left, basis):
                changed.append(layer.factors_of("weight"))

        def refit(meetings: Iterable[tuple[str, Iterable[_Met]]]) -> None:
            bar = track(meetings, "correct", len(order), console=console, transient=True, disable=not (progress and console.is_terminal))
            for name, all_met in bar:
                try:
                    refit_one(name, paired(layers[name], all_met))
                except Unpaired:  # noqa: PERF203
                    with suppress(Unpaired):
                        deque(all_met, maxlen=0)  # both networks wait at this layer

        if max(order.values(), default=1) == 1 and ALIVE * size * len(batches) <= room(next(corrected.parameters()).device):
            try:
                with closing(_in_one_pass(both, order)) as meetings:
                    refit(meetings)
                return changed
            except _Unsteady:
                changed.clear()
                with torch.no_grad():
                    for parameter, value in before:
                        parameter.copy_(value)
        refit(_layer_by_layer(both, order))
    return changed


def _finite(name: str, met: Iterable[_Met]) -> list[_Met]:
    """Return all that a layer meets, checked."""
    found = list(met)
    for entry in found:
        _check(name, entry)
    return found


def _check(name: str, tensors: Iterable[Tensor]) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise LayerError(name, "its inputs are not finite", hint="look for NaN or overflow in the data or either model")


def _originals(dense: nn.Module, layers: dict[str, OneWeight]) -> dict[str, nn.Module]:
    """Return the layers of the dense network by the names of those that are corrected."""
    modules, found = dict(dense.named_modules()), {}
    for name, layer in layers.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != layer.weight.shape:
            raise LayerError(name, "is not in the network before the cut", hint="pass the network that was factorized and cut")
        found[name] = modules[name]
    return found
