"""`calibrate` runs a factorized model on some data and keeps the second moments of what each weight meets."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import index
from typing import Any, SupportsIndex

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from spectrim.checks import check, outside_inference_mode, unwrapped
from spectrim.errors import LayerError, SettingError
from spectrim.forms.svd import Factors
from spectrim.layers import FactorizedLayer, factor_name, named_factors, named_layers
from spectrim.layers.attention import become_attention, observed_attention
from spectrim.layers.base import OneWeight, become
from spectrim.layers.embedding import FactorizedEmbedding
from spectrim.layers.recurrent import FactorizedRecurrent
from spectrim.metrics.batch import BatchDims, stated
from spectrim.metrics.inputs import _send, batch_size_of, call_model, loss_of, unfused
from spectrim.surgery.exchange import duplicate

WIDEST = 8192
"""Weights with more outputs than this (vocabularies) have no moments of the outputs: the matrix would take more than 0.5 GB."""


WIDEST_INPUTS = 16384
"""Weights with more inputs than this are skipped: the matrix would take more than 2 GB."""


NOT_CALLED = "the model did not call its layer on these data"


WIDE = "it has so many inputs that their moments would fill the memory"


EMBEDDING = "an embedding: whatever its data leave out would be lost, so it is cut by its own spectrum"


CONSTANT = 1e-12
"""Inputs that vary by less than this share of their second moment are taken for constant, and their mean is not taken out."""


Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Calibration:
    """Second moments of what goes into each factorized weight, and of the loss's gradient of what comes out.

    Changing a weight by ``D`` changes its output for one example by ``tr(D A D^T)``, squared and summed over positions, with ``A`` its
    `inputs`; it raises the loss by about ``1/2 tr(G D A D^T)`` with ``G`` its `outputs`. Both sides are those of the folded matrix, see
    `linalg.to_matrix`: in the spatial scheme an input is a vertical patch, at every column that the second operation reads, and each
    horizontal offset is an output of its own; in the input scheme an input is one position, and each tap an output of
    its own. Tied weights and layers that run more than once add up; a packed projection of attention on a query, a key and a value that
    differ sees each of them.

    Where a bias can take up what a cut does to the mean of the output, ``b <- b + D m``, only the inputs' deviations from their mean
    count (see `absorbing`).

    Attributes:
        inputs: ``(in, in)`` or ``(blocks, in, in)``, float64: the mean over examples of the sum over positions of ``x x^T``, or of
            ``(x - m) (x - m)^T`` for the weights in `means`.
        outputs: ``(out, out)`` or ``(blocks, out, out)``, float64: the mean over examples and positions of ``g g^T``, ``g`` the gradient of
            one example's loss. Empty without a loss; of more than `WIDEST` outputs it is left out.
        slopes: ``(rank,)`` or ``(blocks, rank)``: the mean gradient of the loss with respect to ``S``. Empty without a loss.
        skipped: weights without moments (embeddings, more than `WIDEST_INPUTS` inputs, what the model does not call), and why.
        examples: how many were seen.
        means: ``m``, ``(in,)`` or ``(blocks, in)``, float64: the mean over examples and positions, for weights whose bias takes it up.

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

    def metrics(self, name: str, shape: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Return the metrics ``(left, right)`` of one weight for `linalg.weighted_svd`; None for one that there is not.

        Args:
            name: as in `named_factors`.
            shape: ``(out, in)`` of the weight.

        Raises:
            LayerError: when the calibration is of another model.
        """
        left, right = self.outputs.get(name), self.inputs.get(name)
        known = name in self.inputs or name in self.skipped
        if not known or (right is not None and right.shape[-1] != shape[1]) or (left is not None and left.shape[-1] != shape[0]):
            raise LayerError(name, f"({shape[0]} x {shape[1]}) is not in the calibration", hint="calibrate this very model")
        return left, right


@outside_inference_mode
def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss | None = None,
    *,
    examples: int | None = 1024,
    centered: bool = True,
    batch_dims: BatchDims | None = None,
    progress: bool = False,
) -> Calibration:
    """Run a factorized model in eval mode and measure the second moments at each of its weights.

    ``A = 1/n sum_examples sum_positions x x^T`` of each weight's inputs, less their mean where a bias takes it up; with a loss also ``G``,
    the same mean, over positions too, of the gradients at its outputs, for one backward pass a batch.

    Runs on a copy of the model, in which recurrent layers loop over time and attention calls its projections one by one: the same function
    in layers that can be observed. Nothing about the model changes, nor do torch's random generators.

    Args:
        model: factorized, at any rank.
        data: batches ``(inputs, target)``; without a loss bare inputs too (a tuple or list of two is taken for inputs and target).
        loss: called as ``loss(output, target)``, gives the mean over a batch; None for `inputs` alone.
        examples: stop after the batch that completes this number, counted along the leading dimension, >= 1; None for all data.
        centered: whether to take the mean out of the inputs where a bias takes it up (see `absorbing`); the sources do not.
        batch_dims: states the batch axes of the inputs, see `spectrim.metrics.batch.BatchDims`; found by agreement of sizes when omitted.
        progress: whether to show a progress bar, on stderr and on a terminal only.

    Returns:
        The moments, on the model's device.

    Raises:
        LayerError: when nothing is factorized, or when what a weight meets is not finite.
        SettingError: for `examples` below 1, or when `data` holds nothing, or no targets for a loss.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> inputs = [torch.tensor([[1.0, 0.0], [3.0, 0.0]])]
        >>> calibrate(factorize(nn.Linear(2, 2, bias=False)), inputs).inputs[""].tolist()
        [[5.0, 0.0], [0.0, 0.0]]
        >>> calibrate(factorize(nn.Linear(2, 2)), inputs).inputs[""].tolist()
        [[1.0, 0.0], [0.0, 0.0]]

    Source: Martens and Grosse, arXiv 1503.05671; Grosse and Martens, arXiv 1602.01407.
    """
    check("calibrate", optional=("loss",), model=model, batches=data, loss=loss)
    model = unwrapped(model)
    if next(named_factors(model), None) is None:
        raise LayerError(type(model).__name__, "has no factorized layer", hint="call factorize(model) first")
    check_examples("calibrate", examples)
    observed, held = _observable(model)
    sums = _Sums({id(factors): name for name, factors in held.items()}, absorbing(model) if centered else ())
    for factors in held.values():
        factors.S.requires_grad_(loss is not None)
    seen = 0
    with isolated(observed), torch.set_grad_enabled(loss is not None), sums.watching(observed):
        for inputs, target in batches_of(
            data, observed, examples, targets=loss is not None, progress=progress, title="calibrate", dims=batch_dims
        ):
            output = call_model(observed, inputs)
            stated_size = None if batch_dims is None else stated(inputs, batch_dims, "calibrate").size
            count = batch_size_of(inputs, stated_size, target=target, output=output)
            if loss is not None:
                sums.add_slopes(held, loss_of(loss, output, target, "calibrate") * count)
            seen += count
    if not seen:
        hint = "a generator can be read only once: give a list or a DataLoader"
        raise SettingError("calibrate", "data", got=f"nothing from {type(data).__name__}", rule="at least one batch", hint=hint)
    return sums.result(held, seen)


class _Sums:
    """What `calibrate` adds up, by the names of weights.

    Args:
        names: by the ``id`` of factors.
        absorbing: those whose mean is taken out.
    """

    def __init__(self, names: Mapping[int, str], absorbing: Collection[str]) -> None:
        self.names, self.absorbing = names, absorbing
        self.totals: dict[str, Tensor] = {}
        self.rows: dict[str, int] = defaultdict(int)
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.slopes: dict[str, Tensor] = {}
        self.positions: dict[str, int] = defaultdict(int)
        self.skipped: dict[str, str] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Add up whatever the layers of `model` meet inside."""
        layers = [layer for layer in model.modules() if isinstance(layer, OneWeight)]
        for layer in layers:
            if isinstance(layer, FactorizedEmbedding):
                self.skipped[self.names[id(layer.factors_of("weight"))]] = EMBEDDING
        layers = [layer for layer in layers if not isinstance(layer, FactorizedEmbedding)]
        handles = [layer.register_forward_hook(self._called, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _called(self, layer: OneWeight, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        factors = layer.factors_of("weight")
        name, x = self.names[id(factors)], first_argument(args, kwargs)
        if factors.shape[1] > WIDEST_INPUTS:
            self.skipped[name] = WIDE
            return
        for rows in layer.input_rows(x.detach(), output.shape):
            add_gram(self.inputs, name, rows)
            if name in self.absorbing:
                total = rows.sum(-2, dtype=torch.float64)
                self.totals[name], self.rows[name] = self.totals.get(name, 0) + total, self.rows[name] + rows.shape[-2]
        if output.requires_grad and factors.shape[0] <= WIDEST:
            observe: Any = output.register_hook
            observe(lambda grad: self._differentiated(layer, name, x.shape, grad))

    def _differentiated(self, layer: OneWeight, name: str, shape: torch.Size, grad: Tensor) -> None:
        for rows in layer.output_rows(grad.detach(), shape):
            add_gram(self.outputs, name, rows)
            self.positions[name] += rows.shape[-2]

    def add_slopes(self, held: Mapping[str, Factors], total: Tensor) -> None:
        """Differentiate the sum of the examples' losses."""
        if not total.requires_grad:
            return
        grads = torch.autograd.grad(total, [factors.S for factors in held.values()], allow_unused=True)
        for name, grad in zip(held, grads, strict=True):
            if grad is not None:
                self.slopes[name] = self.slopes.get(name, torch.zeros_like(grad, dtype=torch.float64)) + grad

    def result(self, held: Mapping[str, Factors], examples: int) -> Calibration:
        """Return the means."""
        inputs, outputs = ({name: sums[name] for name in held if name in sums} for sums in (self.inputs, self.outputs))
        for name in held:
            for side, sums in (("inputs", inputs), ("gradients", outputs)):
                if name in sums and not torch.isfinite(sums[name]).all():
                    raise LayerError(name, f"its {side} are not finite", hint="look for NaN or overflow in the data or the model")
        skipped = {name: self.skipped.get(name, NOT_CALLED) for name in held if name not in inputs}
        means = {}
        for name, total in self.totals.items():
            mean = total / self.rows[name]
            centered = inputs[name] - total.unsqueeze(-1) * mean.unsqueeze(-2)
            trace, rest = (float(moment.diagonal(dim1=-2, dim2=-1).sum()) for moment in (inputs[name], centered))
            if rest > CONSTANT * trace:
                inputs[name], means[name] = centered, mean if held[name].S.dim() > 1 else mean[0]
        return Calibration(
            {name: _blocked(moment, held[name]) / examples for name, moment in inputs.items()},
            {name: _blocked(moment, held[name]) / self.positions[name] for name, moment in outputs.items()},
            {name: self.slopes[name] / examples for name in held if name in self.slopes},
            skipped,
            examples,
            means,
        )


def absorbing(model: nn.Module) -> dict[str, OneWeight]:
    """Return the layers whose bias takes up whatever a cut of their weight does to the mean of their output, by the weight's name.

    Linear layers and convolutions with a bias and a weight of their own. Not in the spatial and the input scheme, where each tap of the
    second operation is an output of its own and the padding keeps some of them from reaching the bias; not packed or recurrent weights.

    Args:
        model: factorized.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
        >>> list(absorbing(factorize(model, where=lambda name, module: True)))
        ['0']
    """
    users = Counter(id(factors) for _, layer in named_layers(model) for _, factors in layer.named_factors())
    users += Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())

    def absorbs(layer: OneWeight) -> bool:
        factors, bias = layer.factors_of("weight"), getattr(layer, "bias", None)
        if not isinstance(bias, Tensor) or layer.scheme != "channel" or isinstance(layer, FactorizedEmbedding):
            return False
        return bias.shape == (factors.U[..., 0].numel(),) and users[id(factors)] == users[id(bias)] == 1

    layers = ((factor_name(name, "weight"), layer) for name, layer in named_layers(model) if isinstance(layer, OneWeight))
    return {name: layer for name, layer in layers if absorbs(layer)}


def _blocked(moment: Tensor, factors: Factors) -> Tensor:
    return moment if factors.S.dim() > 1 else moment[0]


def add_gram(sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
    """Add the second moment of rows ``(blocks, n, width)`` to ``sums[name]``, in float64."""
    rows = rows.double()
    gram = rows.mT @ rows
    sums[name] = sums[name].add_(gram) if name in sums else gram


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return a layer's input, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


def _observable(model: nn.Module) -> tuple[nn.Module, dict[str, Factors]]:
    """Return a copy in eval mode, in which every factorized weight but embeddings' is a layer that is called, and its factors by name.

    Its parameters want no gradients.
    """
    clone = duplicate(model).eval().requires_grad_(False)
    held = dict(named_factors(clone))
    for module in list(clone.modules()):
        if isinstance(module, FactorizedRecurrent):
            become(module, module.observed().requires_grad_(False))
        elif isinstance(module, nn.MultiheadAttention) and (
            isinstance(module, FactorizedLayer) or isinstance(module.out_proj, FactorizedLayer)
        ):
            become_attention(module, observed_attention(module).requires_grad_(False))
    return clone, held


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Leave torch's random generators as they are, and let transformers call their layers instead of one fused kernel."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with unfused(), torch.random.fork_rng(sorted(devices, key=str)):
        yield


def check_examples(owner: str, examples: int | None) -> None:
    """Raise a SettingError unless a number of examples is None or at least 1."""
    if examples is not None and (isinstance(examples, bool) or not isinstance(examples, SupportsIndex) or index(examples) < 1):
        raise SettingError(owner, "examples", got=examples, rule="an integer of at least 1, or None for all")


def batches_of(
    data: Iterable[Any],
    model: nn.Module,
    examples: int | None,
    *,
    targets: bool,
    progress: bool,
    title: str,
    dims: BatchDims | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Yield ``(inputs, target)`` on the model's device until so many examples were seen; the target of bare inputs is None.

    Args:
        data: batches.
        model: gives the device.
        examples: None for all.
        targets: whether a target is needed.
        progress: whether to show a progress bar on a terminal.
        title: what it says.
        dims: states the batch axes, see `BatchDims`.

    Raises:
        SettingError: for a batch without the target that is needed.
    """
    console, seen = Console(stderr=True), 0
    for batch in track(data, title, console=console, transient=True, disable=not (progress and console.is_terminal)):
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        if targets and not pair:
            raise SettingError(title, "data", got=type(batch), rule="batches (inputs, target) with a loss")
        inputs, target = _send(tuple(batch) if pair else (batch, None), model)
        yield inputs, target
        if examples is not None:
            seen += batch_size_of(inputs, target=target) if dims is None else stated(inputs, dims, title).size
            if seen >= examples:
                return
