"""What keeping only some singular values of a weight harms, measured in five ways: what `allocate` minimises under a budget.

`METHODS` is the table that contract tests, command line and docs read.
"""

import hashlib
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from spectrim.calibration import Calibration
from spectrim.costs import spectra
from spectrim.errors import LayerError, RankError, SettingError
from spectrim.factorize import check_names
from spectrim.files import write_text
from spectrim.layers import FactorizedLayer, Factors, named_factors, named_layers
from spectrim.layers.conv import FactorizedConv
from spectrim.layers.embedding import FactorizedEmbedding
from spectrim.layers.linear import FactorizedConv1D, FactorizedLinear
from spectrim.layers.recurrent import FactorizedRecurrent
from spectrim.linalg import pooled_spectrum, svd_of_product, tail_energy, weighted_spectrum
from spectrim.measure import call_model, evaluate, evaluating, markdown_table, unfused
from spectrim.protocols import Importance
from spectrim.surgery import break_evens, duplicate

LARGEST_LOSS = 1e6
"""Rise of the loss that stands for one that is not finite."""

TIE_BREAK = 1e-4
"""Share of the largest harm that `MeasuredLoss` spreads by spectral energy, so that ranks which measure alike are not alike."""


def harms_of(model: nn.Module, importance: Importance) -> dict[str, Tensor]:
    """Call an importance and check what it returns.

    Args:
        model: factorized, at any rank.
        importance: see `Importance`.

    Returns:
        By the names of `named_factors`, in that order: float64 ``(rank + 1,)``; rounding that makes an entry rise is taken out.

    Raises:
        LayerError: when nothing is factorized; when a weight has no harms, the wrong number of them, or some that are not finite, negative
            or rise with the rank.
        SettingError: when the importance returns no mapping.

    Examples:
        >>> from spectrim.factorize import factorize
        >>> {name: tuple(harm.shape) for name, harm in harms_of(factorize(nn.Linear(8, 6)), SpectralEnergy()).items()}
        {'': (7,)}
    """
    named = dict(named_factors(model))
    if not named:
        raise LayerError(type(model).__name__, "has no factorized layer", hint="call factorize(model) first")
    owner = getattr(importance, "__name__", type(importance).__name__)
    found = importance(model)
    if not isinstance(found, Mapping):
        raise SettingError(owner, "what it returns", got=type(found), rule="a mapping from the names of named_factors to harms")
    harms = {}
    for name, factors in named.items():
        if name not in found:
            raise LayerError(name, f"{owner} says nothing about it", hint="an importance covers every name of named_factors(model)")
        harm = torch.as_tensor(found[name]).detach().to("cpu", torch.float64)
        if harm.shape != (factors.rank + 1,):
            hint = "entry r is the harm of keeping r singular values, from none to all"
            raise LayerError(name, f"{owner} gives harms of shape {tuple(harm.shape)}, not ({factors.rank + 1},)", hint=hint)
        for problem, broken in (
            ("that are not finite", ~torch.isfinite(harm)),
            ("below zero", harm < 0),
            ("that rise with the rank", torch.cat([torch.zeros(1, dtype=torch.bool), harm.diff() > 1e-9 * harm.abs().max()])),
        ):
            if broken.any():
                rank = int(broken.nonzero()[0])
                raise LayerError(name, f"{owner} gives harms {problem}: {float(harm[rank]):.6g} at rank {rank}")
        harms[name] = harm.cummin(0).values
    return harms


def _relative(singular_values: Tensor) -> Tensor:
    """Return the tail energy at every rank as a fraction of all; zeros for a spectrum of zeros."""
    tail = tail_energy(singular_values)
    return tail / tail[0].clamp(min=1e-300)


@dataclass(frozen=True)
class SpectralEnergy:
    """The energy that a cut discards, as a fraction of the weight's: ``harm(r) = sum_{k>r} s_k^2 / sum_k s_k^2``.

    Looks at the weights alone; free, and blind to what comes in, to the normalisation behind a layer, and to the loss.

    Examples:
        >>> from spectrim.factorize import factorize
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.diag(torch.tensor([2.0, 1.0])))
        >>> [round(harm, 6) for harm in SpectralEnergy()(factorize(layer))[""].tolist()]
        [1.0, 0.2, 0.0]

    Source: Idelbayev and Carreira-Perpinan, "Low-rank compression of neural nets: learning the rank of each layer", CVPR 2020.
    """

    def __call__(self, model: nn.Module, /) -> dict[str, Tensor]:
        """Return the harms, in [0, 1].

        Args:
            model: factorized, at any rank.
        """
        return {name: _relative(values).cpu() for name, values in spectra(model).items()}


@dataclass(frozen=True, eq=False)
class NormalizedEnergy:
    """Spectral energy of ``diag(d) W diag(c)``, relative to the whole: the weight as the normalisation around it makes it matter.

    A network keeps its function when a layer's outputs are scaled and the BatchNorm behind it takes that out again, but `SpectralEnergy` of
    that layer's rows does not. So each output feature is weighed with what the normalisation multiplies it by, and each input feature with
    the gain of the normalisation it comes from:

    - ``d = |gamma| / sqrt(var + eps)`` of a BatchNorm that reads the layer's output (its running variance); of an InstanceNorm, a
      GroupNorm, or a BatchNorm without running statistics, with the variance measured on `inputs`; ``d = |gamma|`` of a LayerNorm or
      RMSNorm, whose one scale for all features cancels in a relative energy.
    - ``c = |gamma|`` of the norm whose output is the layer's input (pre-norm transformers).

    Which norm that is, is seen by running the model once: the norm reads the very numbers that the layer wrote, in the same memory and not
    written to since (so a permutation between them does no harm, and an activation, in place or not, separates them). Where a layer runs
    several times, squares are averaged over the norms found. Weights without a norm beside them, gates of recurrent layers and packed
    projections of different inputs have ``d = c = 1``. Norms are torch's own, and any class called ``...RMSNorm`` or ``...LayerNorm``
    with a one-dimensional ``weight``; one whose gain is ``1 + weight`` is taken for one with ``weight``.

    Args:
        inputs: one batch: a tensor, a tuple of arguments or a dict of keyword arguments.

    Examples:
        >>> from spectrim.factorize import factorize
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, eps=0.0)).eval()
        >>> _ = model[0].weight.data.copy_(torch.diag(torch.tensor([2.0, 1.0])))
        >>> _ = model[1].running_var.copy_(torch.tensor([4.0, 1.0]))
        >>> [round(harm, 6) for harm in NormalizedEnergy(torch.ones(1, 2))(factorize(model))["0"].tolist()]
        [1.0, 0.5, 0.0]

    Source: ours; the factor is that of folding a BatchNorm into the layer before it (Jacob et al., arXiv 1712.05877, section 3.2).
    """

    inputs: Any = field(repr=False)

    def __call__(self, model: nn.Module, /) -> dict[str, Tensor]:
        """Return the harms, in [0, 1].

        Args:
            model: factorized; it runs once in eval mode.
        """
        rows, columns = _normalisations(model, self.inputs)
        harms = {}
        for name, factors in named_factors(model):
            U, S, Vh = (part.detach().double() for part in (factors.U, factors.S, factors.Vh))
            d, c = _averaged(rows[id(factors)], U[..., 0]), _averaged(columns[id(factors)], Vh[..., 0, :])
            values = svd_of_product(d.unsqueeze(-1) * U, S, Vh * c.unsqueeze(-2))[1]
            harms[name] = _relative(pooled_spectrum(values)).cpu()
        return harms


@dataclass(frozen=True, eq=False)
class WhitenedEnergy:
    """Energy of what a cut changes in a weight's output, relative to all of it: that of ``W A^(1/2)``, ``A`` the inputs' second moment.

    Where a bias takes up the mean (`Calibration.means`) it is the variance of the output that counts.

    ``harm(r) = min_{rank(W_r) = r} tr((W - W_r) A (W - W_r)^T) / tr(W A W^T)``: the share of the output's energy that is lost when the
    weight is cut as ``prune`` cuts it with a calibration made without a loss. Directions into which no input points cost nothing.

    A weight that the calibration skipped has its plain `SpectralEnergy`: the same share for inputs that are alike in all directions.

    Args:
        calibration: what `calibrate` measured on this model, before or after a cut.

    Raises:
        LayerError: when called, if the calibration is of another model.

    Source: Yuan et al. (ASVD), arXiv 2312.05821; Wang et al. (SVD-LLM), arXiv 2403.07378, section 3.1, and BALF, as a budget over layers.
    Deviation: the symmetric root by eigenvalues and not Cholesky's factor: inputs may span less than the whole space; centered inputs.
    """

    calibration: Calibration = field(repr=False)

    def __call__(self, model: nn.Module, /) -> dict[str, Tensor]:
        """Return the harms, in [0, 1].

        Args:
            model: factorized.
        """
        harms = SpectralEnergy()(model)
        for name, factors in named_factors(model):
            _, A = self.calibration.metrics(name, factors.shape)
            if A is not None:
                harms[name] = _relative(pooled_spectrum(weighted_spectrum(factors.U, factors.S, factors.Vh, right=A))).cpu()
        return harms


@dataclass(frozen=True, eq=False)
class LossSensitivity:
    """The rise of the loss that a cut would cause, in units of the loss, from gradients and second moments.

    ``order=2``: ``harm(r) = 1/2 min_{rank(W_r) = r} tr(G D A D^T)`` with ``D = W - W_r``, ``A`` the second moment of the inputs and ``G``
    that of the loss's gradient at the outputs: the quadratic model of the loss about a trained network with Kronecker-factored curvature
    (the Fisher matrix), for a weight cut as ``prune(..., calibration=...)`` cuts it. ``order=1``: ``harm(r) = sum_{k>r} |S_k dL/dS_k|``,
    the linear model, each value by itself; small where training has converged, and the better guide where it has not.

    Far from zero neither model is the loss: a harm says which weight loses more, not what will be lost. A weight that the calibration
    skipped, or that no gradient reached, has its `SpectralEnergy` times the median, over the others, of the harm of losing all; so all
    harms have one unit.

    Args:
        calibration: what `calibrate` measured on this model with a loss.
        order: 1 or 2.

    Raises:
        SettingError: for another order, or when the calibration was made without a loss.
        LayerError: when called, if the calibration is of another model, or for order 1 of another rank.

    Source: order 2: LeCun, Denker and Solla, "Optimal brain damage", NIPS 1989, equation 3, with the curvature of Martens and Grosse, arXiv
    1503.05671, section 3, and Grosse and Martens, arXiv 1602.01407, section 3, for convolutions. Order 1: Molchanov et al., arXiv
    1906.10771, equation 8.
    Deviation: order 1 adds absolute values where the source adds squares, so that sums over values of one weight have the loss's unit.
    """

    calibration: Calibration = field(repr=False)
    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (1, 2) or isinstance(self.order, bool):
            raise SettingError("LossSensitivity", "order", got=self.order, rule="1 or 2")
        if not (self.calibration.outputs if self.order == 2 else self.calibration.slopes):
            hint = "calibrate(model, data, loss) has the gradients"
            raise SettingError("LossSensitivity", "calibration", got="one without gradients", rule="made with a loss", hint=hint)

    def __call__(self, model: nn.Module, /) -> dict[str, Tensor]:
        """Return the harms, in units of the loss.

        Args:
            model: factorized.
        """
        relative = SpectralEnergy()(model)
        known = {}
        for name, factors in named_factors(model):
            harm = self._second(name, factors) if self.order == 2 else self._first(name, factors)
            if harm is not None:
                known[name] = harm.cpu()
        typical = float(np.median([float(harm[0]) for harm in known.values()])) if known else 1.0
        return {name: known.get(name, typical * relative[name]) for name in relative}

    def _second(self, name: str, factors: Factors) -> Tensor | None:
        G, A = self.calibration.metrics(name, factors.shape)
        if G is None or A is None:
            return None
        return tail_energy(pooled_spectrum(weighted_spectrum(factors.U, factors.S, factors.Vh, G, A))) / 2

    def _first(self, name: str, factors: Factors) -> Tensor | None:
        self.calibration.metrics(name, factors.shape)  # that it is of this model
        if name not in self.calibration.slopes:
            return None
        slopes, S = self.calibration.slopes[name].to(factors.S), factors.S.detach()
        if slopes.shape != S.shape:
            raise LayerError(
                name, f"holds {factors.rank} singular values, its slopes are of {slopes.shape[-1]}", hint="calibrate this very model"
            )
        size = S.abs() * factors.U.detach().norm(dim=-2) * factors.Vh.detach().norm(dim=-1)  # what a cut sorts by, up to the angles
        rises = (slopes * S).abs().double().gather(-1, size.argsort(dim=-1)).cumsum(-1)  # of the least ones, the least first
        rises = rises.flatten(0, -2).sum(0) if S.dim() > 1 else rises
        return torch.cat([rises.new_zeros(1), rises]).flip(0)


@dataclass(frozen=True, eq=False)
class MeasuredLoss:
    """The rise of the loss, measured: one weight at a time is cut to each of a few ranks, and the model is evaluated.

    The ranks lie evenly on a logarithmic scale from 1 to the weight's break-even rank; with them, none at all and the present rank. From
    many to few, the harm at a rank is the largest rise so far, never below zero; between ranks it is interpolated monotonically (piecewise
    cubic, Fritsch and Carlson). A ten-thousandth of the largest harm is spread by `SpectralEnergy`: it decides between ranks that the loss
    does not tell apart. What weights do together is not seen. BatchNorm keeps its statistics; nothing is trained.

    Costs ``1 + weights * (points + 1)`` evaluations. With a `folder` every one is written down at once, so a run that was stopped goes on
    where it was, with the same result.

    Args:
        data: batches ``(inputs, target)``, which can be read again and again: a list or a DataLoader that does not shuffle.
        loss: called as ``loss(output, target)``, gives the mean over targets.
        points: ranks measured for each weight between 1 and its break-even rank, at least 1.
        folder: for ``measured-loss-*.json``, made when missing; a file for each set of weights and value of their loss, so that another
            model, or other data, does not meet what was measured before.
        progress: show a progress bar, on stderr and on a terminal only.

    Raises:
        SettingError: for `points` below 1; when called, if the loss of the model itself is not finite.

    Examples:
        >>> from spectrim.factorize import factorize
        >>> low, x = factorize(nn.Linear(3, 3, bias=False)), torch.eye(3)
        >>> harm = MeasuredLoss([(x, low(x).detach())], nn.MSELoss(reduction="mean"))(low)[""]
        >>> harm.shape, bool((harm.diff() < 0).all()), float(harm[-1])
        (torch.Size([4]), True, 0.0)

    Source: the measurement is everyone's; ranks by it: Idelbayev and Carreira-Perpinan, CVPR 2020. Interpolation: Fritsch and Carlson, SIAM
    Journal on Numerical Analysis 17 (1980), as `scipy.interpolate.PchipInterpolator`.
    """

    data: Iterable[Any] = field(repr=False)
    loss: Callable[[Any, Any], Tensor] = field(repr=False)
    points: int = 5
    folder: str | Path | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.points, bool) or self.points < 1:
            raise SettingError("MeasuredLoss", "points", got=self.points, rule="at least 1")

    def __call__(self, model: nn.Module, /) -> dict[str, Tensor]:
        """Return the harms, in units of the loss.

        Args:
            model: factorized; it is left untouched.
        """
        work, grid = duplicate(model), self._grid(model)
        base = evaluate(work, self.data, self.loss)["loss"]
        if not math.isfinite(base):
            raise SettingError("MeasuredLoss", "loss", got=base, rule="finite for the model as it is")
        path = None if self.folder is None else Path(self.folder) / f"measured-loss-{_fingerprint(model, base)}.json"
        measured = _read(path)
        todo = [(name, rank) for name, ranks in grid.items() for rank in ranks if str(rank) not in measured.get(name, {})]
        factors = dict(named_factors(work))
        console = Console(stderr=True)
        shown = self.progress and console.is_terminal
        for name, rank in track(todo, "measuring cuts", disable=not shown, console=console, transient=True):
            with _cut_to(factors[name], rank):
                loss = evaluate(work, self.data, self.loss)["loss"]
            measured.setdefault(name, {})[str(rank)] = loss if math.isfinite(loss) else base + LARGEST_LOSS
            _write(path, {"base": base, "losses": measured})
        rises = {name: {rank: measured[name][str(rank)] - base for rank in ranks} for name, ranks in grid.items()}
        return _interpolated(rises, SpectralEnergy()(model))

    def _grid(self, model: nn.Module) -> dict[str, list[int]]:
        """Return the ranks to measure of each weight, ascending, without the present one."""
        limits, grid = break_evens(model), {}
        users = {id(factors): limits[id(layer), weight] for _, layer in named_layers(model) for weight, factors in layer.named_factors()}
        for name, factors in named_factors(model):
            most = min(users[id(factors)], factors.rank - 1)
            between = {round(rank) for rank in np.geomspace(1, most, self.points)} if most >= 1 else set()
            grid[name] = sorted({0} | between)
        return grid


METHODS: dict[str, type[Importance]] = {
    "spectral": SpectralEnergy,
    "normalized": NormalizedEnergy,
    "whitened": WhitenedEnergy,
    "sensitivity": LossSensitivity,
    "measured": MeasuredLoss,
}
"""Every importance by a short name, for the contract tests."""


@dataclass(frozen=True)
class ImportanceTable:
    """Importances side by side: what each finds that a cut harms where, see `compare_importances`; prints as a table.

    Attributes:
        ranks: the cut: the rank of each weight.
        shares: by importance and weight: the weight's part, in [0, 1], of all harm that the importance sees in the cut.
        totals: by importance: all harm, in its own unit.
        correlations: by importance and importance: Spearman's rank correlation of the shares, in [-1, 1]; NaN where one of them does not
            tell weights apart.
    """

    ranks: Mapping[str, int]
    shares: Mapping[str, Mapping[str, float]]
    totals: Mapping[str, float]
    correlations: Mapping[str, Mapping[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as a dict that `json.dumps` takes; NaN as None."""
        correlations = {a: {b: None if math.isnan(rho) else rho for b, rho in row.items()} for a, row in self.correlations.items()}
        shares = {name: dict(row) for name, row in self.shares.items()}
        return {"ranks": dict(self.ranks), "shares": shares, "totals": dict(self.totals), "correlations": correlations}

    def __str__(self) -> str:
        names = list(self.shares)
        rows = [
            [weight or "(model)", str(rank), *(f"{100 * self.shares[name][weight]:.1f} %" for name in names)]
            for weight, rank in self.ranks.items()
        ]
        rows.append(["all, in its own unit", "", *(f"{self.totals[name]:.4g}" for name in names)])
        rows += [[f"rank correlation with {a}", "", *(_text(self.correlations[a][b]) for b in names)] for a in names]
        return markdown_table(rows, ["share of the harm", "rank", *names])


def compare_importances(model: nn.Module, importances: Mapping[str, Importance], ranks: Mapping[str, int]) -> ImportanceTable:
    """Say how importances, each in its own unit, share out the harm of one and the same cut over the weights.

    ``share_l = harm_l(r_l) / sum_m harm_m(r_m)``, and Spearman's rank correlation between importances over the weights.

    Args:
        model: factorized.
        importances: by the name to show.
        ranks: a cut, as for `prune`: ``{name: rank}``, each in [1, present rank]; weights that it does not name keep their rank, and
            hence do no harm.

    Returns:
        The table.

    Raises:
        LayerError: for a name that is not a factorized weight, and as `harms_of`.
        RankError: for a rank outside its range.

    Examples:
        >>> from spectrim.factorize import factorize
        >>> low = factorize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), where=lambda name, module: True)
        >>> table = compare_importances(low, {"energy": SpectralEnergy()}, {"0": 4})
        >>> table.shares["energy"], table.ranks
        ({'0': 1.0, '1': 0.0}, {'0': 4, '1': 8})
    """
    check_names(model, ranks)
    held = dict(named_factors(model))
    cut = {name: int(ranks.get(name, factors.rank)) for name, factors in held.items()}
    for name, rank in cut.items():
        if not 1 <= rank <= held[name].rank:
            out, in_ = held[name].shape
            raise RankError(name, got=rank, out=out, in_=in_, held=held[name].rank)
    shares, totals = {}, {}
    for label, importance in importances.items():
        harms = {name: float(harm[cut[name]]) for name, harm in harms_of(model, importance).items()}
        totals[label] = sum(harms.values())
        shares[label] = {name: harm / totals[label] if totals[label] else 0.0 for name, harm in harms.items()}
    columns = {label: np.array(list(row.values())) for label, row in shares.items()}
    correlations = {a: {b: _correlation(columns[a], columns[b]) for b in columns} for a in columns}
    return ImportanceTable(cut, shares, totals, correlations)


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    from scipy.stats import spearmanr  # here, because it takes long to import and few commands need it

    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(spearmanr(a, b).statistic)


def _text(correlation: float) -> str:
    return "-" if math.isnan(correlation) else f"{correlation:.2f}"


# What a normalisation reads and writes

BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
CHANNEL_NORMS = (*BATCH, *INSTANCE, nn.GroupNorm)
LAYER_NORMS = ("LayerNorm", "RMSNorm")

Memory = tuple[int, ...]
Scales = dict[int, list[Tensor]]


def _normalisations(model: nn.Module, inputs: Any) -> tuple[Scales, Scales]:
    """Run the model once; return the scales found for the rows and the columns of each weight, by the ``id`` of its factors."""
    rows: Scales = defaultdict(list)
    columns: Scales = defaultdict(list)
    written: dict[Memory, tuple[Scales, Factors]] = {}
    gains: dict[Memory, Tensor] = {}
    alive: list[Tensor] = []  # so that no two of them are ever in the same memory

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(module, FactorizedLayer):
            for factors, x, axis in _reads(module, args, kwargs):
                gain = gains.get(_memory(x, axis))
                if gain is not None:
                    columns[id(factors)].append(gain)
            return
        given: Any = args[0] if args else next(iter(kwargs.values()), None)
        axis = _channel_axis(module)
        found = written.get(_memory(given, axis)) if isinstance(given, Tensor) and given.dim() > 1 else None
        if found is not None:
            side, factors = found
            side[id(factors)].append(_scale(module, given, axis))

    def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
        if _is_norm(module):
            if isinstance(output, Tensor) and output.dim() > 1:
                axis = _channel_axis(module)
                alive.append(output)
                gains[_memory(output, axis)] = _gain(module, output.shape[axis], output.device)
            return
        for factors, side, y, axis in _writes(module, output, rows, columns):
            alive.append(y)
            written[_memory(y, axis)] = (side, factors)

    hooked = [m for m in model.modules() if isinstance(m, FactorizedLayer | nn.MultiheadAttention) or _is_norm(m)]
    handles = [module.register_forward_hook(after) for module in hooked]
    handles += [m.register_forward_pre_hook(before, with_kwargs=True) for m in hooked if isinstance(m, FactorizedLayer) or _is_norm(m)]
    try:
        with unfused(), evaluating(model):
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return rows, columns


def _memory(x: Tensor, axis: int) -> Memory:
    """Return what two tensors share that hold the same numbers, with the features along the same memory, and not written to in between."""
    return (x.untyped_storage()._cdata, int(x.storage_offset()), x.numel(), x._version, x.shape[axis], x.stride(axis))


def _reads(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Factors, Tensor, int]]:
    """Yield the weights that read the input's features as they are, with the input and the axis of its features."""
    given = [*args, *kwargs.values()]
    if isinstance(layer, nn.MultiheadAttention):
        query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
        held = dict(layer.named_factors())  # type: ignore[operator]
        if "in_proj_weight" in held and query is key and key is value:
            yield held["in_proj_weight"], query, -1
        for x, name in zip((query, key, value), ("q_proj_weight", "k_proj_weight", "v_proj_weight"), strict=True):
            if name in held:
                yield held[name], x, -1
    elif isinstance(layer, FactorizedRecurrent):
        held = dict(layer.named_factors())
        if given and isinstance(given[0], Tensor):
            yield from ((held[name], given[0], -1) for name in ("weight_ih_l0", "weight_ih_l0_reverse") if name in held)
    elif isinstance(layer, FactorizedConv | FactorizedLinear | FactorizedConv1D) and given and isinstance(given[0], Tensor):
        yield layer.factors_of("weight"), given[0], _feature_axis(layer)


def _writes(layer: Any, output: Any, rows: Scales, columns: Scales) -> Iterator[tuple[Factors, Scales, Tensor, int]]:
    """Yield the weights whose product is the output, the side that the output's features are on, the output and their axis."""
    if isinstance(layer, nn.MultiheadAttention):
        if isinstance(layer.out_proj, FactorizedLayer):  # attention reads its weight and does not call it
            yield layer.out_proj.factors_of("weight"), rows, output[0], -1
    elif isinstance(layer, FactorizedEmbedding):
        yield layer.factors_of("weight"), columns, output, -1
    elif isinstance(layer, FactorizedConv | FactorizedLinear | FactorizedConv1D) and isinstance(output, Tensor):
        yield layer.factors_of("weight"), rows, output, _feature_axis(layer)


def _feature_axis(layer: Any) -> int:
    return -1 - len(layer.kernel_size) if hasattr(layer, "kernel_size") else -1


def _is_norm(module: nn.Module) -> bool:
    """Whether a module normalises features and multiplies each by one weight, or by none."""
    if isinstance(module, CHANNEL_NORMS):
        return True
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith(LAYER_NORMS) and (weight is None or (isinstance(weight, Tensor) and weight.dim() == 1))


def _channel_axis(norm: nn.Module) -> int:
    """Return the axis of a norm's features."""
    return 1 if isinstance(norm, CHANNEL_NORMS) else -1


def _gain(norm: Any, features: int, device: torch.device) -> Tensor:
    weight = getattr(norm, "weight", None)
    return torch.ones(features, dtype=torch.float64, device=device) if weight is None else weight.detach().double().abs()


def _scale(norm: Any, x: Tensor, axis: int) -> Tensor:
    """Return what a norm multiplies each feature by, up to a factor that is the same for all."""
    gain = _gain(norm, x.shape[axis], x.device)
    if not isinstance(norm, CHANNEL_NORMS):
        return gain
    if isinstance(norm, BATCH) and norm.running_var is not None:
        variance = norm.running_var.double()
    elif isinstance(norm, BATCH):
        variance = x.double().transpose(0, 1).flatten(1).var(-1, correction=0)
    else:
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else x.shape[1]
        variance = x.double().reshape(len(x), groups, -1).var(-1, correction=0).mean(0).repeat_interleave(x.shape[1] // groups)
    return gain / (variance + norm.eps).clamp(min=1e-300).sqrt()


def _averaged(scales: list[Tensor], like: Tensor) -> Tensor:
    """Return the root of the mean square of the scales found, folded as one side ``(*blocks, size)`` of a weight; ones for none.

    Args:
        scales: each of one entry for every feature.
        like: has the shape of that side; each feature has several neighbouring entries there (those of the kernel's axes).
    """
    if not scales:
        return torch.ones_like(like)
    mean = torch.stack(scales).square().mean(0).sqrt().to(like)
    return mean.repeat_interleave(like.numel() // mean.numel()).reshape(like.shape)


# Measuring


@contextmanager
def _cut_to(factors: Factors, rank: int) -> Iterator[None]:
    """Keep the `rank` largest singular values inside, the rest being zero; the factors as they were afterwards."""
    parts = (factors.U, factors.S, factors.Vh)
    kept = [part.detach().clone() for part in parts]
    U, S, Vh = svd_of_product(*kept)
    S[..., rank:] = 0
    with torch.no_grad():
        for part, new in zip(parts, (U, S, Vh), strict=True):
            part.copy_(new)
    try:
        yield
    finally:
        with torch.no_grad():
            for part, old in zip(parts, kept, strict=True):
                part.copy_(old)


def _interpolated(rises: Mapping[str, Mapping[int, float]], energies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return harms at every rank from the rise of the loss at a few of them, energy deciding between those that measure alike."""
    from scipy.interpolate import PchipInterpolator  # here, because it takes long to import and few commands need it

    harms = {}
    for name, rise in rises.items():
        full = len(energies[name]) - 1
        ranks = [*rise, full]
        highest = np.maximum.accumulate([0.0, *(max(0.0, rise[rank]) for rank in reversed(list(rise)))])[::-1]
        curve = PchipInterpolator(ranks, highest)(np.arange(full + 1))
        curve[-1] = 0.0  # up to the interpolation's rounding it is
        harms[name] = torch.from_numpy(np.minimum.accumulate(np.maximum(curve, 0.0)))
    most = max(float(harm[0]) for harm in harms.values())
    return {name: harm + TIE_BREAK * most * energies[name] for name, harm in harms.items()}


def _fingerprint(model: nn.Module, base: float) -> str:
    """Return a short text that another model, or the same one with another loss, does not have."""
    digest = hashlib.sha256(f"{FORMAT} {base:.9e}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


FORMAT = 1


def _read(path: Path | None) -> dict[str, dict[str, float]]:
    """Return the losses measured before; a file that cannot be read gives a warning and none."""
    if path is None or not path.exists():
        return {}
    try:
        losses = json.loads(path.read_text(encoding="utf-8"))["losses"]
        return {str(name): {str(int(rank)): float(loss) for rank, loss in row.items()} for name, row in losses.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path}: damaged, its losses are measured anew ({error!r})", stacklevel=4)
        return {}


def _write(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write what was measured; in one piece or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1))
