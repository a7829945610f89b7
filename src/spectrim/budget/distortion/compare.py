"""Measures of distortion side by side."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from spectrim.budget.distortion.base import distortions_of
from spectrim.checks import check
from spectrim.forms.form import Size
from spectrim.layers import named_factors
from spectrim.metrics.table import markdown_table
from spectrim.protocols import Importance
from spectrim.surgery.ranks import check_names


@dataclass(frozen=True)
class ImportanceTable:
    """Importances side by side: the distribution of a cut's distortion over the weights, see `compare_importances`; prints as a table.

    Attributes:
        ranks: the cut: the rank of each weight.
        shares: by importance and weight: the weight's part, in [0, 1], of the cut's whole distortion.
        totals: by importance: the cut's whole distortion, in its own unit.
        correlations: by importance and importance: Spearman's rank correlation of the shares, in [-1, 1]; NaN where one of them does not
            tell weights apart.
    """

    ranks: Mapping[str, Size]
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
        return markdown_table(rows, ["share of the distortion", "rank", *names])


def compare_importances(model: nn.Module, importances: Mapping[str, Importance], ranks: Mapping[str, Size]) -> ImportanceTable:
    """Compare how importances distribute the distortion of one cut over the weights.

    ``share_l = distortion_l(r_l) / sum_m distortion_m(r_m)``, and Spearman's rank correlation between importances over the weights.

    Args:
        model: factorized.
        importances: by the name to show.
        ranks: a cut, as for `prune`: ``{name: rank}``, each in [1, present rank]; weights that it does not name keep their rank, and
            hence have no distortion.

    Returns:
        The table.

    Raises:
        LayerError: for a name that is not a factorized weight, and as `distortions_of`.
        RankError: for a rank outside its range.

    Examples:
        >>> from spectrim.budget.distortion.energy import SpectralEnergy
        >>> from spectrim.surgery.factorize import factorize
        >>> low = factorize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), where=lambda name, module: True)
        >>> table = compare_importances(low, {"energy": SpectralEnergy()}, {"0": 4})
        >>> table.shares["energy"], table.ranks
        ({'0': 1.0, '1': 0.0}, {'0': 4, '1': 8})
    """
    check("compare_importances", model=model, importances=importances, cut_ranks=ranks)
    check_names(model, ranks)
    held = dict(named_factors(model))
    cut = {name: factors.checked(name, ranks.get(name, factors.size)) for name, factors in held.items()}
    rungs = {name: held[name].rung_of(size) for name, size in cut.items()}
    shares, totals = {}, {}
    for label, importance in importances.items():
        distortions = {name: float(distortion[rungs[name]]) for name, distortion in distortions_of(model, importance).items()}
        totals[label] = sum(distortions.values())
        shares[label] = {name: distortion / totals[label] if totals[label] else 0.0 for name, distortion in distortions.items()}
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
