"""The second moments of what a weight meets: `Calibration`, and the sums behind it."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import LayerError
from spectrim.forms import Factors, Form
from spectrim.layers import named_layers
from spectrim.layers.taps import tap
from spectrim.layers.uses import first_argument
from spectrim.layers.weights import OneWeight
from spectrim.linalg.gram import Metric, MomentSum, ProjectedMetric, gram, ordinary_tensor, precise

WIDEST = 8192
"""Weights with more outputs than this (vocabularies) have no moments of the outputs: the matrix would take more than 0.5 GB."""


WIDEST_INPUTS = 16384
"""Weights with more inputs than this, and as many outputs, are skipped: the matrix would take more than 2 GB."""


PROJECTED = 512
"""Weights with so many inputs, at least twice their rank, see them through their right singular vectors: a cut uses no more."""


NOT_CALLED = "the model did not call this layer on these data"


WIDE = "its moments would not fit into memory"


EMBEDDING = "an embedding: entries that the data do not contain would be lost, so it is cut by its spectrum"


CONSTANT = 1e-12
"""Inputs that vary by less than this share of their second moment are taken for constant, and their mean is not taken out."""


@dataclass(frozen=True)
class Calibration:
    """Second moments of the inputs of each factorized weight, and of the loss gradient at its outputs.

    Changing a weight by ``D`` changes its output for one example by ``tr(D A D^T)``, squared and summed over positions, with ``A`` its
    `inputs`; it raises the loss by about ``1/2 tr(G D A D^T)`` with ``G`` its `outputs`. Both sides are those of the folded matrix, see
    `linalg.to_matrix`: in the spatial scheme an input is a vertical patch, at every column that the second operation reads, and each
    horizontal offset is a separate output; in the input scheme an input is one position, and each tap a separate
    output. Tied weights and layers that run more than once add up; a packed projection of attention on a query, a key and a value that
    differ sees each of them.

    Where a bias can absorb the change of the output's mean, ``b <- b + D m``, only the inputs' deviations from their mean
    count (see `absorbing`).

    Attributes:
        inputs: ``(in, in)`` or ``(blocks, in, in)``, float64: the mean over examples of the sum over positions of ``x x^T``, or of
            ``(x - m) (x - m)^T`` for the weights in `means`. For weights in `bases`: of ``B x``, ``(rank, rank)``.
        outputs: ``(out, out)`` or ``(blocks, out, out)``, float64: the mean over examples and positions of ``g g^T``, ``g`` the gradient of
            one example's loss. Empty without a loss; of more than `WIDEST` outputs it is left out.
        slopes: ``(rank,)`` or ``(blocks, rank)``: the mean gradient of the loss with respect to ``S``. Empty without a loss.
        skipped: weights without moments (embeddings, more than `WIDEST_INPUTS` inputs, what the model does not call), and why.
        examples: how many were used.
        means: ``m``, ``(in,)`` or ``(blocks, in)``, float64: the mean over examples and positions, for weights whose bias absorbs it.
        bases: ``B``, ``(rank, in)`` or ``(blocks, rank, in)``: the right singular vectors of weights with many more inputs than outputs.
            A cut of such a weight needs ``B A B^T`` only; its factors must be those that were calibrated, or a cut of them.

    Source: Martens and Grosse, arXiv 1503.05671, section 3; Grosse and Martens, arXiv 1602.01407, section 3 (convolutions).
    Deviation: gradients are those of the targets given (the empirical Fisher), not of targets drawn from the model; means are taken out
    where they cost nothing.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    slopes: Mapping[str, Tensor]
    skipped: Mapping[str, str]
    examples: int
    means: Mapping[str, Tensor] = field(default_factory=dict)
    bases: Mapping[str, Tensor] = field(default_factory=dict)

    def metrics(self, name: str, shape: tuple[int, int]) -> tuple[Tensor | None, Metric | None]:
        """Return the metrics ``(left, right)`` of one weight for `linalg.weighted_svd`; None for one that there is not.

        Args:
            name: as in `named_factors`.
            shape: ``(out, in)`` of the weight.

        Raises:
            LayerError: when the calibration is of another model.
        """
        left, right, basis = self.outputs.get(name), self.inputs.get(name), self.bases.get(name)
        known = name in self.inputs or name in self.skipped
        width = None if right is None else (right if basis is None else basis).shape[-1]
        if not known or width not in (None, shape[1]) or (left is not None and left.shape[-1] != shape[0]):
            raise LayerError(name, f"({shape[0]} x {shape[1]}) is not in the calibration", hint="calibrate this model")
        return left, right if right is None or basis is None else ProjectedMetric(right, basis)


class Sums:
    """What `calibrate` adds up, by the names of weights.

    Args:
        names: by factors.
        absorbing: those whose mean is taken out.
    """

    def __init__(self, names: Mapping[Form, str], absorbing: Collection[str]) -> None:
        self.names, self.absorbing = names, absorbing
        self.totals: dict[str, Tensor] = {}
        self.inputs: dict[str, MomentSum] = {}
        self.bases = {name: basis for factors, name in names.items() if (basis := _basis(factors)) is not None}
        self.outputs: dict[str, Tensor] = {}
        self.slopes: dict[str, Tensor] = {}
        self.positions: dict[str, int] = defaultdict(int)
        self.skipped: dict[str, str] = {}
        self.differentiating = False

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Add up whatever the layers of `model` meet inside."""
        for _, layer in named_layers(model):
            self.skipped |= {self.names[factors]: layer.unobserved for _, factors in layer.named_factors() if layer.unobserved}
        layers = [layer for layer in model.modules() if isinstance(layer, OneWeight)]
        for layer in layers:
            if layer.looks_up:
                self.skipped[self.names[layer.factors_of("weight")]] = EMBEDDING
        layers = [layer for layer in layers if not layer.looks_up]
        handles = [tap(layer, after=self._called) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _called(self, layer: OneWeight, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        factors = layer.factors_of("weight")
        name, x = self.names[factors], ordinary_tensor(first_argument(args, kwargs))
        basis = self.bases.get(name)
        if not x.numel():  # of an expert to which nothing was routed
            return
        if factors.shape[1] > WIDEST_INPUTS and basis is None:
            self.skipped[name] = WIDE
            return
        absorbing = name in self.absorbing
        if self.differentiating:  # activation checkpointing runs the layer once more
            self._observe_slope(layer, name, x, output)
            return
        if name not in self.inputs:
            self.inputs[name] = MomentSum(shifted=absorbing, seen=None if basis is None else lambda rows: rows @ basis.mT.to(rows))
        for rows in layer.input_rows(x.detach(), output.shape):
            self.inputs[name].add(rows)
            if absorbing:
                self.totals[name] = self.totals.get(name, 0) + rows.sum(-2, dtype=torch.promote_types(rows.dtype, torch.float32)).double()
        self._observe_slope(layer, name, x, output)

    def _observe_slope(self, layer: OneWeight, name: str, x: Tensor, output: Tensor) -> None:
        if output.requires_grad and layer.factors_of("weight").shape[0] <= WIDEST:
            observe: Any = output.register_hook
            observe(lambda grad: self._differentiated(layer, name, x.shape, grad))

    def _differentiated(self, layer: OneWeight, name: str, shape: torch.Size, grad: Tensor) -> None:
        for rows in layer.output_rows(grad.detach(), shape):
            add_gram(self.outputs, name, rows)
            self.positions[name] += rows.shape[-2]

    def add_slopes(self, held: Mapping[str, Form], total: Tensor) -> None:
        """Differentiate the sum of the examples' losses."""
        if not total.requires_grad:
            return
        slopes = [parameter for factors in held.values() for parameter in factors.slope_parameters()]
        self.differentiating = True
        try:
            grads = _gradients(total, slopes)
        finally:
            self.differentiating = False
        for name, grad in zip(held, grads, strict=True):
            if grad is not None:
                self.slopes[name] = self.slopes.get(name, torch.zeros_like(grad, dtype=torch.float64)) + grad

    def together(self, accelerator: Any) -> None:
        """Make these the sums of all processes, each of which calls it; layers that only some of them met are known to all afterwards.

        Args:
            accelerator: accelerate's.
        """
        from accelerate.utils import gather_object

        def add(tensor: Tensor) -> Tensor:
            return accelerator.reduce(tensor.contiguous(), "sum")  # type: ignore[no-any-return]

        def shapes(sums: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
            return {name: tuple(found.shape) for name, found in sums.items()}

        def everyones(own: Mapping[str, Any]) -> dict[str, Any]:
            return dict(sorted((pair for part in gather_object([dict(own)]) for pair in part.items()), key=lambda pair: pair[0]))

        device = accelerator.device
        for name, shape in everyones(shapes(self.inputs)).items():
            if name not in self.inputs:
                self.inputs[name] = MomentSum.empty(torch.zeros(shape, dtype=torch.float64, device=device), shifted=name in self.absorbing)
            self.inputs[name].together(add)
        for sums in (self.totals, self.outputs, self.slopes):
            for name, shape in everyones(shapes(sums)).items():
                sums[name] = add(sums.get(name, torch.zeros(shape, dtype=torch.float64, device=device)))
        for name in everyones(self.positions):
            self.positions[name] = int(add(torch.tensor(self.positions[name], device=device)))
        self.skipped = everyones(self.skipped)

    def result(self, held: Mapping[str, Form], examples: int) -> Calibration:
        """Return the means."""
        inputs = {name: self.inputs[name].second() for name in held if name in self.inputs}
        outputs = {name: self.outputs[name] for name in held if name in self.outputs}
        for name in held:
            for side, sums in (("inputs", inputs), ("gradients", outputs)):
                if name in sums and not torch.isfinite(sums[name]).all():
                    raise LayerError(name, f"its {side} are not finite", hint="look for NaN or overflow in the data or the model")
        skipped = {name: self.skipped.get(name, NOT_CALLED) for name in held if name not in inputs}
        means = {}
        for name, total in self.totals.items():
            mean, centered = total / self.inputs[name].count, self.inputs[name].second(centered=True)
            trace, rest = (float(moment.diagonal(dim1=-2, dim2=-1).sum()) for moment in (inputs[name], centered))
            if rest > CONSTANT * trace:
                inputs[name], means[name] = centered, mean if held[name].lead else mean[0]
        return Calibration(
            {name: _blocked(moment, held[name]) / examples for name, moment in inputs.items()},
            {name: _blocked(moment, held[name]) / self.positions[name] for name, moment in outputs.items()},
            {name: self.slopes[name] / examples for name in held if name in self.slopes},
            skipped,
            examples,
            means,
            {name: _blocked(self.bases[name], held[name]) for name in inputs if name in self.bases},
        )


def _blocked(moment: Tensor, factors: Form) -> Tensor:
    return moment if factors.lead else moment[0]


def add_gram(sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
    """Add the second moment of rows ``(blocks, n, width)`` to ``sums[name]``, in float64."""
    found = gram(precise(rows))
    sums[name] = sums[name].add_(found) if name in sums else found.double()


def _basis(factors: Form) -> Tensor | None:
    """Return the right singular vectors ``(blocks, rank, in)`` of a weight with many more inputs than that; None for any other."""
    if not isinstance(factors, Factors) or not factors.is_matrix or factors.shape[1] < PROJECTED or 2 * factors.rank > factors.shape[1]:
        return None
    Vh = factors.svd()[2]
    return Vh if factors.lead else Vh[None]


def _gradients(total: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Differentiate a loss; reentrant checkpointing refuses `torch.autograd.grad`, and so writes into ``grad``."""
    if not _has_reentrant_checkpoint(total):
        return list(torch.autograd.grad(total, parameters, allow_unused=True))
    torch.autograd.backward(total)
    grads = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return grads


def _has_reentrant_checkpoint(total: Tensor) -> bool:
    waiting, seen = [total.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
    return False
