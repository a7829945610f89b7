"""`Decompositions`: every weight of a network decomposed once for each metric, for distortions and for cuts alike."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectrim.forms.derived import measured_tail
from spectrim.forms.form import Form, Size
from spectrim.layers import named_factors
from spectrim.linalg.gram import ProjectedMetric
from spectrim.linalg.spectral import pooled_spectrum, seen_spectrum, tail_energy, weighted_svd
from spectrim.surgery.moments import Calibration
from spectrim.surgery.side_by_side import room

Metric = Literal["none", "inputs", "both", "loss"]
"""What counts in a cut: the weight itself, the layer's output on the calibration set, or the loss to second order.

``both`` lies between the last two: directions of the output count by the root of their curvature.
"""

Parts = tuple[Tensor, Tensor, Tensor]


class Decompositions:
    """Decompositions of the weights of one network in one state, computed on demand and kept where memory allows.

    ``weight = X Y`` with the squared error of its first ``r`` columns and rows, in the metric, the sum of the squared `values` behind the
    ``r``-th. Without a metric, ``X = U`` and ``Y = diag(S) Vh``.

    Args:
        model: factorized; it must not change while this is in use.
        calibration: of this model; needed for the metrics ``inputs`` and ``loss``.
        keep: whether to keep the vectors, too, and not the values alone.
    """

    def __init__(self, model: nn.Module, calibration: Calibration | None = None, *, keep: bool = False) -> None:
        self.factors = dict(named_factors(model))
        self.calibration, self.keep = calibration, keep and self._fits()
        self._factors: dict[str, Parts] = {}
        self._parts: dict[tuple[str, Metric], Parts] = {}
        self._roots: dict[str, Tensor] = {}
        self._cuts: dict[tuple[str, Size, Metric], Form] = {}
        self._tails: dict[tuple[str, Metric], Tensor] = {}
        self._values: dict[tuple[str, Metric], Tensor] = {}

    def spectrum(self, name: str, metric: Metric = "none") -> Tensor:
        """Return the singular values of one weight in a metric, descending, blocks pooled, in float64.

        Of a form with several ranks: by rung, the root of the energy that it adds.

        Args:
            name: as in `named_factors`.
            metric: the plain values where the calibration has no such metric for this weight.
        """
        if (name, metric) not in self._values:
            (left, right), form = self._metrics(name, metric), self.factors[name]
            if left is None and right is None:
                self._values[name, metric] = form.spectrum()
            elif (
                form.is_matrix and left is None and right is not None and (name, metric) not in self._parts
            ):  # where ranks are chosen, and it is not cut
                _, S, Vh = self._exact(name)
                self._values[name, metric] = pooled_spectrum(seen_spectrum(S, Vh, right))
            elif form.is_matrix:
                self._values[name, metric] = pooled_spectrum(self.parts(name, metric)[1])
            else:
                self._values[name, metric] = (-self.tail(name, metric).diff()).clamp(min=0).sqrt()
        return self._values[name, metric]

    def tail(self, name: str, metric: Metric = "none") -> Tensor:
        """Return the squared error of one weight at every rung, from none at all on, in a metric: ``(rank + 1,)``, float64."""
        if self.factors[name].is_matrix:
            return tail_energy(self.spectrum(name, metric))
        if (name, metric) not in self._tails:
            form = self.factors[name]
            self._tails[name, metric] = measured_tail(form, form.tail(*self._metrics(name, metric)))
        return self._tails[name, metric]

    def has(self, name: str, metric: Metric) -> bool:
        """Return whether the calibration has this metric for one weight."""
        left, right = self._metrics(name, metric)
        return right is not None and (metric not in ("both", "loss") or left is not None)

    def parts(self, name: str, metric: Metric = "none") -> Parts:
        """Return ``X, values, Y`` of one weight in float64."""
        left, right = self._metrics(name, metric)
        metric = "none" if left is None and right is None else metric
        key = (name, metric)
        if key in self._parts:
            return self._parts[key]
        U, S, Vh = self._exact(name)
        if metric == "none":
            return U, S, S.unsqueeze(-1) * Vh
        found = weighted_svd(U, S, Vh, left, right)
        if self.keep:
            self._parts[key] = found
        return found

    def cut(self, name: str, size: Size, metric: Metric = "none") -> Form:
        """Return the factors of one weight that are nearest in the metric; ``U`` is orthonormal, rows of ``Vh`` have length one.

        Rows of ``Vh`` are orthogonal without a metric only: `orthonormal` makes them so, and ``S`` the singular values.

        Args:
            name: as in `named_factors`.
            size: at most the present one.
            metric: what counts.
        """
        held, (left, right) = self.factors[name], self._metrics(name, metric)
        if not held.is_matrix:
            key = (name, size, "none" if left is None and right is None else metric)
            made = self._cuts[key] if key in self._cuts else held.cut_to(size, left, right)
            if self.keep:
                self._cuts[key] = made
                return made.like(*made.parameters(), exact=True)
            return made
        rank = held.rung_of(size)
        if rank == held.rank or (left is None and right is None):
            U, S, Vh = self._exact(name)
            return held.like(U[..., :rank], S[..., :rank], Vh[..., :rank, :], exact=True)
        X, _, Y = self.parts(name, metric)
        return held.like(*unit_rows(X[..., :rank], Y[..., :rank, :]))

    def for_refit(self, metric: Metric) -> Calibration | None:
        """Return the calibration for a refit in a metric; None where outputs count alike, or without gradients.

        Args:
            metric: what counts.
        """
        held = self.calibration
        if held is None or metric not in ("both", "loss") or not held.outputs:
            return None
        return held if metric == "loss" else replace(held, outputs={name: self._root(name, G) for name, G in held.outputs.items()})

    def _root(self, name: str, metric: Tensor) -> Tensor:
        """Return the root of one weight's metric of the outputs, computed once."""
        if name not in self._roots:
            self._roots[name] = root(metric)
        return self._roots[name]

    def _exact(self, name: str) -> Parts:
        """Return ``U, S, Vh`` of one weight, exact, in float64."""
        if name in self._factors:
            return self._factors[name]
        f: Any = self.factors[name]
        found: Parts = f.svd()
        if self.keep:
            self._factors[name] = found
        return found

    def _metrics(self, name: str, metric: Metric) -> tuple[Tensor | None, Tensor | ProjectedMetric | None]:
        if metric == "none" or self.calibration is None:
            return None, None
        left, right = self.calibration.metrics(name, self.factors[name].shape)
        if metric == "both" and left is not None:
            left = self._root(name, left)
        return (left if metric in ("both", "loss") else None), right

    def _fits(self) -> bool:
        """Whether all vectors in three metrics take no more than half of the memory that is free."""
        bytes_ = sum(3 * 8 * f.blocks * f.rank * sum(f.shape) for f in self.factors.values())
        return not self.factors or bytes_ <= room(next(iter(self.factors.values())).device)


def unit_rows(X: Tensor, Y: Tensor) -> Parts:
    """Return ``U, S, Vh`` of the product ``X Y``: orthonormal columns, and rows of length one; no decomposition but a QR.

    Args:
        X: ``(..., out, rank)``.
        Y: ``(..., rank, in)``.
    """
    Q, R = torch.linalg.qr(X.double())
    rows = R @ Y.double()
    S = rows.norm(dim=-1)
    return Q, S, rows / S.unsqueeze(-1).clamp_min(torch.finfo(S.dtype).tiny)


def root(metric: Tensor) -> Tensor:
    """Return the positive semidefinite square root of a symmetric matrix, ``(..., n, n)``."""
    values, vectors = torch.linalg.eigh(metric.double())
    made: Tensor = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
    return made
