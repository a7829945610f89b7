"""`correct` refits the weights of a cut network to what the network before the cut computes."""

import math
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from spectrim import linalg
from spectrim.checks import check, outside_inference_mode, unwrapped
from spectrim.errors import LayerError, SettingError
from spectrim.forms.svd import Factors
from spectrim.layers import factor_name, named_layers
from spectrim.layers.base import OneWeight
from spectrim.layers.embedding import FactorizedEmbedding
from spectrim.linalg.fold import leading
from spectrim.metrics.inputs import evaluating
from spectrim.surgery.calibrate import WIDE, WIDEST_INPUTS, Calibration, batches_of, check_examples, isolated
from spectrim.surgery.decompositions import unit_rows
from spectrim.surgery.exchange import duplicate
from spectrim.surgery.side_by_side import ALIVE, _Both, _in_one_pass, _layer_by_layer, _Met, _order, _Unsteady, room

CUTOFF = 1e-6
"""Directions of the inputs whose second moment is far below this share of its Frobenius norm keep the dense weight: they tell nothing."""


REFINEMENTS = 4
"""Solutions of the regularised equations that are added up, each for what the ones before have left."""


FLOOR = 1e-12
"""Added to the second moments of all inputs, as a share of the largest: above what rounding leaves of constant inputs when centered."""


ROWS, FEWEST_ROWS = 128, 2**18
"""Positions that are looked at for each input of a weight, drawn among those of all examples, and how many they are at least.

In a trial of two seeds, with a quarter of them the refit of ResNet-8 at a fifth of its multiply-accumulates ended up to 0.6 nats higher.
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
    inside = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    users: dict[int, int] = {}
    for _, layer in named_layers(model):
        for _, factors in layer.named_factors():
            users[id(factors)] = users.get(id(factors), 0) + 1
    reasons = {}
    for layer_name, layer in named_layers(model):
        for weight, factors in layer.named_factors():
            name = factor_name(layer_name, weight)
            if isinstance(layer, FactorizedEmbedding):
                reasons[name] = "an embedding looks rows up"
            elif not isinstance(layer, OneWeight) or id(layer) in inside:
                reasons[name] = "its inputs are inside a fused kernel"
            elif users[id(factors)] > 1:
                reasons[name] = "it is tied to another layer's"
            elif factors.shape[1] > WIDEST_INPUTS:
                reasons[name] = WIDE
    return reasons


@outside_inference_mode
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

    In the order the layers run, each gets the weight of its rank, and the bias, that minimise ``sum ||W x + b - W' x~ - b'||^2``: ``x`` is
    what reaches the layer in the dense network, ``x~`` what reaches it here, behind layers that are corrected already. Without the rank
    that is the regression ``W_t = W + W (C_xx~ - C) C^+`` with ``C = C_x~x~``, moments centered where there is a bias; the best weight of
    the rank is then the truncation of ``W_t`` in the norm ``||(W_t - W') C^1/2||``. In the other schemes, where a weight of low rank is no
    truncation of that regression, the second factor is refitted to the output with the first one given, once with the one held and once
    with that of the truncation over columns, and the better is taken. Where nothing improves on the present weight it stays.

    The closed form of what the first steps of fine-tuning would do, and no more: errors on the calibration data fall, layer by layer, but
    few examples and wide layers fit those examples. BatchNorm layers keep their statistics, which `recalibrate` renews afterwards. Of the
    positions in images and sequences some are drawn, 128 for each input of a weight and at least 262,144 over all examples.

    Takes one pass over the data through both networks, which wait at each layer while that is refitted. Where a layer runs more than once
    or half of the free memory would not hold what waits, each layer takes a pass of its own, as far as that layer. Refitted are linear
    layers and convolutions; `uncorrected` lists what is not.

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
        SettingError: for `examples` below 1, or when `data` holds nothing.

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
    iterated Tikhonov regularisation; no response of a non-linearity is fitted; the spatial and the input scheme are ours.
    """
    check("correct", cut_model=cut, dense=dense, batches=data, calibration=calibration)
    check_examples("correct", examples)
    cut, dense = unwrapped(cut), unwrapped(dense)
    corrected = duplicate(cut)
    changed = correct_(corrected, dense, data, calibration=calibration, examples=examples, progress=progress)
    with torch.no_grad():
        for factors in changed:
            for parameter, value in zip((factors.U, factors.S, factors.Vh), linalg.svd_of_product(*_parts(factors)), strict=True):
                parameter.copy_(value.reshape(parameter.shape))
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

        def refit(meetings: Iterable[tuple[str, Iterable[_Met]]]) -> None:
            bar = track(meetings, "correct", len(order), console=console, transient=True, disable=not (progress and console.is_terminal))
            for name, met in bar:
                layer, original = layers[name], originals[name]
                left = None if calibration is None else calibration.metrics(name, layer.factors_of("weight").shape)[0]
                dense = _folded(layer, original)
                most = max(FEWEST_ROWS, ROWS * dense.shape[-1]) / (len(batches) * order[name])
                moments = _moments(layer, met, dense.shape[:-1].numel(), most)
                if not (torch.isfinite(moments.own).all() and torch.isfinite(moments.cross).all()):
                    raise LayerError(name, "its inputs are not finite", hint="look for NaN or overflow in the data or either model")
                if _refit(layer, original, dense, moments, left):
                    changed.append(layer.factors_of("weight"))

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


def _originals(dense: nn.Module, layers: dict[str, OneWeight]) -> dict[str, nn.Module]:
    """Return the layers of the dense network by the names of those that are corrected."""
    modules, found = dict(dense.named_modules()), {}
    for name, layer in layers.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != layer.weight.shape:
            raise LayerError(name, "is not in the network before the cut", hint="give the very network that was factorized and cut")
        found[name] = modules[name]
    return found


@dataclass(frozen=True)
class _Moments:
    """Of the inputs of one layer, dense ``x`` and present ``x~``, as rows of the channel fold: means over rows, in float64.

    Attributes:
        own: ``E[x~ x~^T]``, ``(blocks, in, in)``; less the means where the layer has a bias.
        cross: ``E[x x~^T]``, likewise.
        dense_mean: ``E[x]``, ``(blocks, in)``.
        own_mean: ``E[x~]``.
    """

    own: Tensor
    cross: Tensor
    dense_mean: Tensor
    own_mean: Tensor


def _moments(layer: OneWeight, met: Iterable[_Met], outputs: int, most: float) -> _Moments:
    """Add up over what a layer meets.

    Args:
        layer: of the corrected network.
        met: what it meets, each time it is called.
        outputs: of the layer, at one position.
        most: how many rows to look at each time, drawn among all; neighbours tell little more.
    """
    generator = torch.Generator().manual_seed(0)
    own = cross = dense_sum = own_sum = torch.zeros((), dtype=torch.float64)
    count = 0
    for x, shape, x_now in met:
        share = most * outputs / max(1, shape.numel())
        for pair in zip(layer.input_rows(x, shape, "channel"), layer.input_rows(x_now, shape, "channel"), strict=True):
            if share < 1:
                size = pair[0].shape[-2]
                drawn = torch.randperm(size, generator=generator)[: math.ceil(share * size)].to(x.device)
                rows, rows_now = (part.index_select(-2, drawn).double() for part in pair)
            else:
                rows, rows_now = (part.double() for part in pair)
            own, cross = own + rows_now.mT @ rows_now, cross + rows.mT @ rows_now
            dense_sum, own_sum = dense_sum + rows.sum(-2), own_sum + rows_now.sum(-2)
            count += rows.shape[-2]
    own, cross, dense_mean, own_mean = own / count, cross / count, dense_sum / count, own_sum / count
    floor = torch.diag_embed(FLOOR * own.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True).expand_as(own_mean))
    own, cross = own + floor, cross + floor  # in both: what the inputs never do asks for no change of the weight
    if layer.bias is not None:
        own = own - own_mean.unsqueeze(-1) * own_mean.unsqueeze(-2)
        cross = cross - dense_mean.unsqueeze(-1) * own_mean.unsqueeze(-2)
    return _Moments(own, cross, dense_mean, own_mean)


def _folded(layer: Any, original: Any) -> Tensor:
    """Return the weight that a layer had before the cut, in the channel fold, ``(blocks, out, in)``, in float64."""
    matrix: Tensor = layer.fold(original, "weight", original.weight.detach().double(), "channel")
    return matrix if matrix.dim() == 3 else matrix.unsqueeze(0)


def _refit(layer: Any, original: Any, dense: Tensor, moments: _Moments, left: Tensor | None) -> bool:
    """Give one layer its best weight and bias, in place; ``dense`` is the original's weight, folded, ``(blocks, out, in)``.

    Returns:
        Whether the weight is another one.
    """
    factors = layer.factors_of("weight")
    held = _composed(layer, *_parts(factors))
    wanted = dense @ moments.cross
    target = dense + _divided(wanted - dense @ moments.own, moments.own)
    candidates = (
        _of_columns(layer, wanted, target, moments, left)
        if layer.scheme != "channel"
        else [_truncated(factors.rank, target, moments.own, left)]
    )
    judged = left if layer.scheme == "channel" else None
    best, error = None, _error(held, wanted, moments.own, judged)
    for candidate in candidates:
        found = _error(_composed(layer, *candidate), wanted, moments.own, judged)
        if found < error:
            best, error = candidate, found
    with torch.no_grad():
        if best is not None:
            for parameter, value in zip((factors.U, factors.S, factors.Vh), best, strict=True):
                parameter.copy_(value.reshape(parameter.shape))
        if layer.bias is not None and original.bias is not None:
            weight = _composed(layer, *_parts(factors))
            shift = dense @ moments.dense_mean.unsqueeze(-1) - weight @ moments.own_mean.unsqueeze(-1)
            layer.bias.copy_(original.bias.detach().double() + shift.flatten())
    return best is not None


def _error(weight: Tensor, wanted: Tensor, own: Tensor, left: Tensor | None) -> float:
    """Return the mean squared error of the output, in the metric `left`, less what no weight can change; ``wanted = W C_xx~``."""
    change = weight @ own - 2 * wanted
    return float(((change if left is None else left @ change) * weight).sum())


def _divided(right: Tensor, moment: Tensor) -> Tensor:
    """Return ``right @ moment^+``, where eigenvalues far below `CUTOFF` of the norm count as zero.

    By iterated Tikhonov regularisation: an eigenvalue ``s`` is inverted to ``(1 - (r / (s + r))^n) / s``, with ``r`` the ridge and ``n``
    `REFINEMENTS`. An eigendecomposition of thousands of inputs would take ten times as long.
    """
    moment = (moment + moment.mT) / 2
    ridge = (CUTOFF * torch.linalg.matrix_norm(moment)).clamp_min(torch.finfo(moment.dtype).tiny)[..., None, None]
    triangle = torch.linalg.cholesky(moment + ridge * torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device))
    solution = torch.zeros_like(right)
    for _ in range(REFINEMENTS):
        solution = solution + torch.cholesky_solve((right - solution @ moment).mT, triangle).mT
    return solution


Parts = tuple[Tensor, Tensor, Tensor]


def _parts(factors: Factors) -> Parts:
    """Return U, ``|S|`` and Vh with blocks, in float64."""
    U, S, Vh = (part.detach().double() for part in (factors.U, factors.S, factors.Vh))
    return (U, S, Vh) if S.dim() > 1 else (U[None], S[None], Vh[None])


def _truncated(rank: int, target: Tensor, metric: Tensor, left: Tensor | None) -> Parts:
    """Return the best approximation of `target` of that rank in the metrics of the inputs and, where given, the outputs.

    Without a metric of the outputs it is the projection of `target` onto the leading eigenvectors of ``T metric T^T``.
    """
    if left is not None and rank < min(target.shape[-2:]):
        X, _, Y = linalg.weighted_svd(*linalg.svd(target), left, metric)
        return unit_rows(X[..., :rank], Y[..., :rank, :])
    Q, R = torch.linalg.qr(target)  # of the smaller side
    gram = R @ metric @ R.mT
    basis = torch.linalg.eigh((gram + gram.mT) / 2).eigenvectors[..., -rank:]
    return unit_rows(Q @ basis, basis.mT @ R)


def _sizes(layer: Any) -> tuple[int, int, int, int]:
    """Return out and in of one block, and the taps of the first and of the second operation."""
    count = leading(layer.scheme, layer.kernel_size)
    taps = (math.prod(layer.kernel_size[:count]), math.prod(layer.kernel_size[count:]))
    return (layer.out_channels // layer.groups, layer.in_channels // layer.groups, *taps)


def _composed(layer: Any, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """Return the weight ``(blocks, out, in * k...)`` of factors in the layer's scheme."""
    matrix = U * S.unsqueeze(-2) @ Vh
    if layer.scheme == "channel":
        return matrix
    out, in_, height, width = _sizes(layer)
    return matrix.reshape(-1, out, width, in_, height).permute(0, 1, 3, 4, 2).reshape(-1, out, in_ * height * width)


def _of_columns(layer: Any, wanted: Tensor, target: Tensor, moments: _Moments, metric: Tensor | None) -> list[Parts]:
    """Refit the second factor to the output, where it has taps: with the first one that is held, and with that of the truncation.

    With ``B`` the map from patches to the outputs of the first operation at each tap of the second one, ``L <- L + (W C_xx~ - L B C) B^T
    (B C B^T)^+``; ``wanted = W C_xx~``.
    """
    out, in_, height, width = _sizes(layer)
    factors = layer.factors_of("weight")
    folded = target.reshape(-1, out, in_, height, width).permute(0, 1, 4, 2, 3).reshape(-1, out * width, in_ * height)
    by_offset = moments.own.reshape(-1, in_ * height, width, in_ * height, width)
    columns = by_offset.diagonal(dim1=-3, dim2=-1).mean(-1)
    candidates = []
    for U, S, Vh in (_parts(factors), _truncated(factors.rank, folded, columns, metric)):
        rank, eye = S.shape[-1], torch.eye(width, dtype=Vh.dtype, device=Vh.device)
        left = (U * S.unsqueeze(-2)).reshape(-1, out, width * rank)
        B = torch.einsum("grm,bc->gbrmc", Vh, eye).reshape(-1, width * rank, in_ * height * width)
        seen = moments.own @ B.mT
        left = left + _divided(wanted @ B.mT - left @ (B @ seen), B @ seen)
        candidates.append(unit_rows(left.reshape(-1, out * width, rank), Vh))
    return candidates
