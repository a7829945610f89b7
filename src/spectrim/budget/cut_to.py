"""`cut_to`: allocate, cut, renew BatchNorm statistics, refit, score; the one pipeline behind every cut to a budget."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from spectrim.budget.allocate import allocated
from spectrim.budget.budget import Budget
from spectrim.budget.distortion.base import distortions_of
from spectrim.budget.ladder import Ladder, ladder
from spectrim.budget.ways import Way
from spectrim.forms.form import Size
from spectrim.layers import named_factors
from spectrim.protocols import Importance, Latencies, RankRule
from spectrim.runtimes.crossbar import Crossbars
from spectrim.surgery.correct import correct_
from spectrim.surgery.decompositions import Decompositions
from spectrim.surgery.exchange import duplicate
from spectrim.surgery.moments import Calibration
from spectrim.surgery.ranks import chooser
from spectrim.surgery.recalibrate import recalibrate
from spectrim.surgery.states import Places, State, copied, cut_, orthonormalize_

Scores = Mapping[str, float]

NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class CutNetwork:
    """What `cut_to` made.

    Attributes:
        way: name of the way.
        state: of the network, for `Places.put`.
        ranks: of each weight.
        scores: by stage, of what was kept: ``cut``, ``recalibrated``, ``corrected``; the last one is the network's.
        dropped: by stage, of what was tried and not kept, because its loss was not lower.
    """

    way: str
    state: State
    ranks: Mapping[str, Size]
    scores: Mapping[str, Scores]
    dropped: Mapping[str, Scores] = field(default_factory=dict)

    @property
    def last(self) -> Scores:
        """The scores of the network as it is."""
        return list(self.scores.values())[-1]


class Workbench:
    """One factorized network that is cut to several budgets in several ways; prices and decompositions are computed once.

    Args:
        network: factorized; it is changed by each cut, and `restore` puts it back.
        inputs: one batch of inputs, for the layers' sizes.
        calibration: of this network, for the ways that need one.
        latency: as for `allocate`.
        crossbars: as for `allocate`.
        prices: its `ladder`; made when omitted.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Any,
        calibration: Calibration | None = None,
        *,
        latency: Latencies | None = None,
        crossbars: Crossbars | None = None,
        prices: Ladder | None = None,
    ) -> None:
        self.network, self.inputs, self.latency = network, inputs, latency
        self.prices = ladder(network, inputs, latency, crossbars=crossbars) if prices is None else prices
        self.places = Places(network)
        self.full = self.places.state()
        self.decomposed = Decompositions(network, calibration, keep=True)
        self._distortions: dict[str, Mapping[str, Any]] = {}
        self._losses: dict[str, dict[str, Any]] = {}
        self._made: dict[Any, CutNetwork] = {}
        self._cut = False

    def restore(self) -> None:
        """Put the network back to what it was."""
        if self._cut:
            self.places.put(self.full)
            self._cut = False

    def show(self, made: CutNetwork) -> None:
        """Give the network the state of an earlier cut."""
        self._cut = True
        self.places.put(made.state)

    def distortions(self, way: Way) -> Mapping[str, Any]:
        """Return the distortions of the uncut network by one way."""
        if way.name not in self._distortions:
            self.restore()
            self._distortions[way.name] = way.distortion(self.network, self.decomposed, self.inputs)
        return self._distortions[way.name]

    def _checked(self, way: Way) -> dict[str, Any]:
        """Return the distortions of one way as `allocated` takes them."""
        if way.name not in self._losses:
            self._losses[way.name] = distortions_of(self.network, lambda model: self.distortions(way))
        return self._losses[way.name]

    def ranks(self, target: Budget | RankRule | Mapping[str, Size], way: Way, importance: Importance | None = None) -> dict[str, Size]:
        """Return the rank of each weight: allocated to a budget, or by a rule on the spectrum in the way's metric, or as given."""
        self.restore()
        if isinstance(target, Budget):
            losses = self._checked(way) if importance is None else distortions_of(self.network, importance)
            return allocated(self.decomposed.factors, target, self.prices, losses, None)
        chosen: dict[str, Size] = {}
        for name, factors in named_factors(self.network):
            if isinstance(target, Mapping):
                chosen[name] = factors.checked(name, target.get(name, factors.size))
            elif factors.is_matrix:
                chosen[name] = chooser(target, name, factors.shape)(self.decomposed.spectrum(name, way.metric))
            else:
                chosen[name] = factors.cut(chooser(target, name, factors.shape)).size
        return chosen

    def cut(self, ranks: Mapping[str, Size], way: Way) -> None:
        """Cut the whole network, in place."""
        self.restore()
        self._cut = True
        cut_(self.network, ranks, self.decomposed, way.metric, self.places)

    def cut_to(
        self,
        target: Budget | RankRule | Mapping[str, Size],
        way: Way,
        score: Callable[[nn.Module], Scores],
        *,
        dense: nn.Module | None = None,
        examples: Sequence[Any] = (),
        importance: Importance | None = None,
        held: tuple[Sequence[Any], Callable[[nn.Module], Scores]] | None = None,
    ) -> CutNetwork:
        """Cut the network, in place, and improve it where the score says so; see `cut_to`. All calls have one dense network and score.

        Where `score` is on `examples` themselves, `held` are some of them and the score on the others: the refit is tried on these first.
        """
        ranks = self.ranks(target, way, importance)
        known = (way.metric, way.refit and way.refit_metric, tuple(ranks.values()))
        if known in self._made:  # another way came to the same cut
            self.show(self._made[known])
            return replace(self._made[known], way=way.name)
        self.cut(ranks, way)
        scores: dict[str, Scores] = {"cut": score(self.network)}
        dropped: dict[str, Scores] = {}
        start = kept = self.places.state()
        renews = bool(examples) and has_norms(self.network)
        if renews:
            recalibrate(self.network, examples)
            found = score(self.network)
            renews = _lower(found, scores["cut"])
            (scores if renews else dropped)["recalibrated"] = found
            kept = self.places.state() if renews else kept
        refits = way.refit and dense is not None and bool(examples)
        by = self.decomposed.for_refit(way.refit_metric) if refits else None
        if held is not None and refits and dense is not None:
            self.places.put(copied(kept))
            before = held[1](self.network)
            self.places.put(copied(start))
            correct_(self.network, dense, held[0], calibration=by, examples=None)
            if renews:
                recalibrate(self.network, held[0])
            if not _lower(tried := held[1](self.network), before):
                dropped["refit held out"], dense = tried, None
        if way.refit and dense is not None and examples:
            self.places.put(copied(start))
            correct_(self.network, dense, examples, calibration=by, examples=None)
            if renews:
                recalibrate(self.network, examples)
            found = score(self.network)
            better = _lower(found, list(scores.values())[-1])
            (scores if better else dropped)["corrected"] = found
            kept = self.places.state() if better else kept
        self._made[known] = CutNetwork(way.name, kept, ranks, scores, dropped)
        self.show(self._made[known])
        return self._made[known]


def cut_to(
    model: nn.Module,
    target: Budget | RankRule | Mapping[str, Size],
    way: Way,
    inputs: Any,
    score: Callable[[nn.Module], Scores],
    *,
    dense: nn.Module | None = None,
    examples: Sequence[Any] = (),
    calibration: Calibration | None = None,
    importance: Importance | None = None,
    latency: Latencies | None = None,
    crossbars: Crossbars | None = None,
    prices: Ladder | None = None,
) -> tuple[nn.Module, CutNetwork]:
    """Return a copy of a factorized network that is cut to a budget in one way, and how that went.

    Ranks are allocated, weights cut in the way's metric, BatchNorm statistics renewed on the examples, and factors refitted to the dense
    network's outputs. New statistics and the refit are kept only where the loss by `score` is lower.

    Args:
        model: factorized; it is left untouched.
        target: a budget; or a rank rule, or ranks by name.
        way: from `WAYS`, or your own.
        inputs: one batch of inputs, for the layers' sizes.
        score: returns at least ``loss`` of a network.
        dense: the network before the cut, for the refit; none without it.
        examples: batches ``(inputs, target)``, for BatchNorm statistics and the refit; neither happens without them.
        calibration: of this model, for the ways that need one.
        importance: ranks by this instead of the way's distortion.
        latency: as for `allocate`.
        crossbars: as for `allocate`.
        prices: as for `allocate`.

    Raises:
        SettingError: for a budget that no ranks reach.

    Examples:
        >>> import torch
        >>> from spectrim.budget.ways import WAYS
        >>> from spectrim.surgery.factorize import factorize
        >>> low, x = factorize(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))), torch.randn(8, 16)
        >>> cut, told = cut_to(low, Budget(macs=0.6), WAYS["plain"], x, lambda network: {"loss": network(x).norm().item()})
        >>> told.ranks, cut[0].rank, low[0].rank
        ({'0': 4}, 4, 16)
    """
    network = duplicate(model)
    bench = Workbench(network, inputs, calibration, latency=latency, crossbars=crossbars, prices=prices)
    told = bench.cut_to(target, way, score, dense=dense, examples=examples, importance=importance)
    orthonormalize_(network)
    return network, told


def renew_statistics(network: nn.Module, data: Iterable[Any], score: Callable[[nn.Module], Scores], before: Scores) -> tuple[Scores, bool]:
    """Renew BatchNorm statistics in place, and put the old ones back where the loss is not lower.

    Args:
        network: any module.
        data: batches ``(inputs, target)``.
        score: returns at least ``loss``.
        before: the scores with the present statistics.

    Returns:
        The scores with new statistics, and whether these were kept.
    """
    if not has_norms(network):
        return before, False
    old = {name: buffer.detach().clone() for name, buffer in network.named_buffers()}
    recalibrate(network, data)
    found = score(network)
    if not _lower(found, before):
        for name, buffer in network.named_buffers():
            buffer.copy_(old[name])
        return found, False
    return found, True


def has_norms(model: nn.Module) -> bool:
    """Return whether a network has BatchNorm layers with running statistics."""
    return any(isinstance(module, NORMS) and module.running_mean is not None for module in model.modules())


def _lower(found: Scores, before: Scores) -> bool:
    return found["loss"] < before["loss"]
