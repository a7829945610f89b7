"""Distortion as measured loss."""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from spectrim.budget.distortion.energy import SpectralEnergy
from spectrim.checks.words import check_words
from spectrim.errors import SettingError
from spectrim.files import read_json, write_json
from spectrim.forms.derived import zeroed_beyond
from spectrim.layers import named_factors, sites
from spectrim.metrics.evaluate import evaluate
from spectrim.surgery.coverage import break_evens
from spectrim.surgery.exchange import duplicate

LARGEST_LOSS = 1e6
"""Rise of the loss that stands for one that is not finite."""


TIE_BREAK = 1e-4
"""Share of the largest distortion that `MeasuredLoss` spreads by spectral energy, so that ranks which measure alike are not alike."""


@dataclass(frozen=True, eq=False)
class MeasuredLoss:
    """The rise of the loss, measured: one weight at a time is cut to each of a few ranks, and the model is evaluated.

    The ranks lie evenly on a logarithmic scale from 1 to the weight's break-even rank; with them, none at all and the present rank. From
    many to few, the distortion at a rank is the largest rise so far, never below zero; between ranks it is interpolated monotonically
    (piecewise cubic, Fritsch and Carlson). A ten-thousandth of the largest distortion is spread by `SpectralEnergy`: it decides between
    ranks with equal loss. Interactions between weights are ignored. BatchNorm keeps its statistics; nothing is trained.

    Costs ``1 + weights * (points + 1)`` evaluations. With a `folder` each result is written at once, so that an interrupted run resumes
    with the same result.

    Args:
        data: batches ``(inputs, target)``, that can be iterated repeatedly: a list or a DataLoader that does not shuffle.
        loss: called as ``loss(output, target)``, gives the mean over targets.
        points: ranks measured for each weight between 1 and its break-even rank, at least 1.
        folder: for ``measured-loss-*.json``, made when missing; a file for each set of weights and value of their loss, so that another
            model, or other data, does not reuse earlier results.
        progress: show a progress bar, on stderr and on a terminal only.

    Raises:
        SettingError: for `points` below 1; when called, if the loss of the model itself is not finite.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> low, x = factorize(nn.Linear(3, 3, bias=False)), torch.eye(3)
        >>> distortion = MeasuredLoss([(x, low(x).detach())], nn.MSELoss(reduction="mean"))(low)[""]
        >>> distortion.shape, bool((distortion.diff() < 0).all()), float(distortion[-1])
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
        check_words(self)
        if isinstance(self.points, bool) or self.points < 1:
            raise SettingError("MeasuredLoss", "points", got=self.points, rule="at least 1")

    def __call__(self, model: nn.Module, /) -> dict[str, Tensor]:
        """Return the distortions, in units of the loss.

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
            with zeroed_beyond(factors[name], rank):
                loss = evaluate(work, self.data, self.loss)["loss"]
            measured.setdefault(name, {})[str(rank)] = loss if math.isfinite(loss) else base + LARGEST_LOSS
            _write(path, {"base": base, "losses": measured})
        rises = {name: {rank: measured[name][str(rank)] - base for rank in ranks} for name, ranks in grid.items()}
        return _interpolated(rises, SpectralEnergy()(model))

    def _grid(self, model: nn.Module) -> dict[str, list[int]]:
        """Return the ranks to measure of each weight, ascending, without the present one."""
        limits, grid = break_evens(model), {}
        users = {site.factors: limits[site.name] for site in sites(model)}
        for name, factors in named_factors(model):
            most = min(users[factors], factors.rank - 1)
            between = {round(rank) for rank in np.geomspace(1, most, self.points)} if most >= 1 else set()
            grid[name] = sorted({0} | between)
        return grid


# Measuring


def _interpolated(rises: Mapping[str, Mapping[int, float]], energies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return distortions at every rank from the rise of the loss at a few of them, energy decides between equal losses."""
    from scipy.interpolate import PchipInterpolator  # here, because it takes long to import and few commands need it

    distortions = {}
    for name, rise in rises.items():
        full = len(energies[name]) - 1
        ranks = [*rise, full]
        highest = np.maximum.accumulate([0.0, *(max(0.0, rise[rank]) for rank in reversed(list(rise)))])[::-1]
        curve = PchipInterpolator(ranks, highest)(np.arange(full + 1))
        curve[-1] = 0.0  # up to the interpolation's rounding it is
        distortions[name] = torch.from_numpy(np.minimum.accumulate(np.maximum(curve, 0.0)))
    most = max(float(distortion[0]) for distortion in distortions.values())
    return {name: distortion + TIE_BREAK * most * energies[name] for name, distortion in distortions.items()}


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
        losses = read_json(path)["losses"]
        return {str(name): {str(int(rank)): float(loss) for rank, loss in row.items()} for name, row in losses.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path}: damaged, its losses are measured again ({error!r})", stacklevel=4)
        return {}


def _write(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write the measured losses atomically."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
