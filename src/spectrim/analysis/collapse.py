"""Neural collapse: how far features and classifier are from class means at the corners of a simplex, batch by batch."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import LayerError, SettingError
from spectrim.metrics.calls import call_model, evaluating
from spectrim.metrics.tensors import send
from spectrim.surgery.head import call_order, head_of


@dataclass(frozen=True)
class Collapse:
    """The four metrics of neural collapse; all are 0 where it is complete.

    Attributes:
        nc1: ``tr(S_W S_B^+) / C``: variability within classes, relative to that between their means.
        nc2_norms: deviation of the means' norms from equal ones, relative to their mean.
        nc2_angles: largest deviation of a cosine between two means from ``-1 / (C - 1)``.
        nc2: ``||M M^T / ||M M^T|| - E||`` with ``E = (I - 1 1^T / C) / sqrt(C - 1)``: distance of the means from a simplex.
        nc3: the same of ``A M^T``: distance of the classifier's rows from the means.
        nc4: share of examples for which the network's class is not that of the nearest mean.
        accuracy: share of examples whose class is right.
        effective_rank: of the features, ``exp(entropy of the singular values / their sum)``; ``C - 1`` for collapsed ones.
    """

    nc1: float
    nc2_norms: float
    nc2_angles: float
    nc2: float
    nc3: float
    nc4: float
    accuracy: float
    effective_rank: float


class ClassMoments:
    """Counts, sums and the second moment of features by class, in float64, one batch after the other.

    Examples:
        >>> moments = ClassMoments()
        >>> moments.add(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 4.0]]), torch.tensor([0, 0, 1]))
        >>> moments.means().tolist(), moments.within().tolist()
        ([[2.0, 0.0], [0.0, 4.0]], [[0.666..., 0.0], [0.0, 0.0]])
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(0, dtype=torch.float64)
        self.sums = torch.zeros(0, 0, dtype=torch.float64)
        self.squares = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, features: Tensor, target: Tensor) -> None:
        """Add features ``(batch, d)`` of examples with classes ``(batch,)``."""
        features, target = features.detach().double().cpu(), target.cpu()
        classes = max(len(self.counts), int(target.max()) + 1)
        sums = torch.zeros(classes, features.shape[1], dtype=torch.float64)
        sums[: len(self.sums)] += self.sums if self.sums.numel() else 0
        counts = torch.bincount(target, minlength=classes).double()
        counts[: len(self.counts)] += self.counts
        self.sums, self.counts = sums.index_add_(0, target, features), counts
        self.squares = (self.squares if self.squares.numel() else 0) + features.mT @ features

    def means(self) -> Tensor:
        """Return the mean of each class, ``(C, d)``."""
        return self.sums / self.counts[:, None]

    def within(self) -> Tensor:
        """Return the covariance within classes, ``(d, d)``."""
        return (self.squares - self.means().mT @ self.sums) / self.counts.sum()


def neural_collapse(model: nn.Module, data: Iterable[Any], head: str | None = None) -> Collapse:
    """Measure neural collapse at the input of the classifier head; the data are read twice, batch by batch.

    Means are centered by the mean of the class means, so that classes of unequal size count alike. The classifier is any linear layer,
    dense, factorized or merged. With fewer features than classes minus one the simplex cannot be reached, and ``nc2`` and ``nc3`` stay up.

    Args:
        model: run in eval mode; its output are logits ``(batch, C)``.
        data: batches ``(inputs, classes)`` that can be read again.
        head: name of the classifier; the linear layer called last when omitted.

    Raises:
        LayerError: where no linear head is found, or its input is not ``(batch, features)``.
        SettingError: for targets that are not classes ``0 ... C - 1``, each of them present, C >= 2.

    Examples:
        >>> net = nn.Linear(2, 2, bias=False)
        >>> net.weight.data = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> x = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> collapse = neural_collapse(net, [(x, torch.tensor([0, 1]))], head="")
        >>> round(collapse.nc1, 6), round(collapse.nc2, 6), round(collapse.nc3, 6), collapse.nc4
        (0.0, 0.0, 0.0, 0.0)

    Source: Papyan, Han and Donoho, arXiv 2008.08186 (the four); Zhu et al., arXiv 2105.02375 (norms of NC2 and NC3).
    Deviation: means are centered by their own mean; the effective rank (Roy and Vetterli, 2007) is added.
    """
    if not isinstance(data, Iterable) or isinstance(data, Iterator):
        raise SettingError("neural_collapse", "data", got=type(data).__name__, rule="batches that can be read twice, such as a list")
    name = _head(model, data) if head is None else head
    moments = ClassMoments()
    for features, target, _ in _features(model, data, name):
        moments.add(features, target)
    if len(moments.counts) < 2 or not bool((moments.counts > 0).all()):
        raise SettingError(
            "neural_collapse", "targets", got=moments.counts.long().tolist(), rule="at least two classes, none without examples"
        )
    means = moments.means()
    differs = right = count = 0
    for features, target, output in _features(model, data, name):
        nearest = torch.cdist(features.double().cpu(), means).argmin(1)
        chosen = output.argmax(1).cpu()
        differs, right = differs + int((chosen != nearest).sum()), right + int((chosen == target.cpu()).sum())
        count += len(target)
    layer: Any = model.get_submodule(name)
    weight = (layer.weight.detach() + 0).double().cpu()
    return Collapse(**geometry(moments, weight), nc4=differs / count, accuracy=right / count)


def geometry(moments: ClassMoments, classifier: Tensor) -> dict[str, float]:
    """Return NC1 to NC3 and the effective rank, from the moments of the features and a classifier ``(C, d)``."""
    means = moments.means()
    means = means - means.mean(0)
    classes = len(means)
    _, S, Vh = torch.linalg.svd(means, full_matrices=False)
    kept = S.gt(1e-10 * S[0])
    within = moments.within()
    along = torch.einsum("kd,de,ke->k", Vh[kept], within, Vh[kept])
    norms = means.norm(dim=1)
    cosines = (means @ means.mT) / (norms[:, None] * norms).clamp(min=1e-300)
    off = ~torch.eye(classes, dtype=torch.bool)
    spectrum = torch.linalg.eigvalsh(within + means.mT @ means / classes).clamp(min=0).sqrt()
    shares = spectrum[spectrum > 1e-12 * spectrum.max()] / spectrum.sum()
    return {
        "nc1": float((along / S[kept].square()).sum()),  # S_B = M^T M / C, and C cancels
        "nc2_norms": float(norms.std(correction=0) / norms.mean()),
        "nc2_angles": float((cosines[off] + 1 / (classes - 1)).abs().max()),
        "nc2": from_simplex(means @ means.mT),
        "nc3": from_simplex(classifier @ means.mT),
        "effective_rank": float(torch.exp(-(shares * shares.log()).sum())),
    }


def from_simplex(gram: Tensor) -> float:
    """Return the distance of a matrix ``(C, C)``, scaled to norm one, from that of a simplex."""
    classes = len(gram)
    simplex = (torch.eye(classes, dtype=gram.dtype) - 1 / classes) / math.sqrt(classes - 1)
    return float((gram / gram.norm().clamp(min=1e-300) - simplex).norm())


def _head(model: nn.Module, data: Iterable[Any]) -> str:
    inputs = send(next(iter(data))[0], model)
    name = head_of(model, call_order(model, inputs))
    if name is None:
        raise LayerError(type(model).__name__, "has no linear layer at its end", hint="name the classifier with head=")
    return name


@torch.no_grad()
def _features(model: nn.Module, data: Iterable[Any], head: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the inputs of the head, the classes and the logits of each batch."""
    held: list[Tensor] = []
    handle = model.get_submodule(head).register_forward_pre_hook(lambda _, args: held.append(args[0]))
    try:
        for batch in data:
            inputs, target = send(tuple(batch), model)
            held.clear()
            with evaluating(model):
                output = call_model(model, inputs)
            if not held or held[-1].dim() != 2:
                raise LayerError(head, "does not read features (batch, d)", hint="name the classifier with head=")
            if not isinstance(target, Tensor) or target.is_floating_point() or target.dim() != 1 or int(target.min()) < 0:
                raise SettingError("neural_collapse", "targets", got=target, rule="classes, integers >= 0 of shape (batch,)")
            if not bool(torch.isfinite(held[-1]).all()):
                raise LayerError(head, "reads features that are not finite", hint="look for NaN or overflow in the data or the model")
            yield held[-1], target, output
    finally:
        handle.remove()


@dataclass(frozen=True)
class LogCollapse:
    """A callback of `fit` that adds the metrics of `neural_collapse` to the log: ``nc1`` to ``nc4`` and the others.

    Args:
        data: batches ``(inputs, classes)`` that can be read again; the training split shows the collapse.
        every: epochs from one measurement to the next, >= 1.
        head: as for `neural_collapse`.

    Raises:
        SettingError: for an interval below 1.

    Examples:
        >>> from spectrim import fit
        >>> data, net = [(torch.randn(8, 4), torch.arange(8) % 2)], nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> history = fit(net, data, nn.CrossEntropyLoss(), optimizer, epochs=1, callbacks=[LogCollapse(data)], progress=False)
        >>> "nc1" in history.last
        True
    """

    data: Iterable[Any]
    every: int = 1
    head: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise SettingError("LogCollapse", "every", got=self.every, rule="an integer >= 1")

    def __call__(self, epoch: int, metrics: dict[str, float], model: nn.Module) -> None:
        """Add the metrics to the line of the epoch."""
        if epoch % self.every == 0:
            measured = neural_collapse(model, self.data, self.head)
            metrics.update({entry.name: getattr(measured, entry.name) for entry in fields(measured) if entry.name != "accuracy"})
