"""`round_to`: the weights of a network on levels, so that its coded file takes no more than a number of bytes."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from spectrim.budget.rounding.curves import Curve, Rounding, curve_of, price_for, towards, with_feedback
from spectrim.budget.rounding.meeting import Moments, beside, moments, outputs
from spectrim.budget.rounding.weights import Weight, weights_of
from spectrim.checks import check, outside_inference_mode, unwrapped
from spectrim.errors import LayerError, SettingError
from spectrim.layers import named_layers
from spectrim.metrics.calls import evaluating
from spectrim.metrics.inputs import batch_size_of
from spectrim.storage.pack import Packed, coded
from spectrim.surgery.batchnorm import fold_batchnorms
from spectrim.surgery.exchange import duplicate
from spectrim.surgery.observing import batches_of, isolated

BIASES, VECTORS = 127, 2047
"""Levels on each side of zero: of biases, and of other vectors."""

TRIES = 6
"""Attempts to meet the budget."""

NEAR = 0.985
"""Share of the budget that a file may leave unused."""

TRIAL = 0.3
"""Step, in units of the root mean square, by which the curvature of weights without feedback is measured."""


@dataclass(frozen=True)
class Rounded:
    """A network on levels.

    Attributes:
        model: ordinary layers; BatchNorms are folded where that can be done.
        packed: sizes of its coded file.
        steps: between levels, by the name of the weight.
        bits: bits of one entry of each weight, on average, by how often each level occurs.
        unexplained: fraction of variance unexplained: mean squared change of the outputs on the calibration data over their variance.
    """

    model: nn.Module = field(repr=False)
    packed: Packed
    steps: Mapping[str, float]
    bits: Mapping[str, float]
    unexplained: float

    def summary(self) -> str:
        """Return sizes, bits and the change of the outputs as text."""
        bits = f"{min(self.bits.values()):.2f} to {max(self.bits.values()):.2f} bits for each weight"
        return f"{self.packed.summary()}\n{bits}; outputs changed by {self.unexplained:.2%} of their variance"


@outside_inference_mode
def round_to(
    model: nn.Module,
    data: Iterable[Any],
    coded_bytes: int | float,
    *,
    examples: int = 1024,
    sequential: bool = True,
    fold: bool = True,
    progress: bool = True,
) -> Rounded:
    """Put the weights of a network on levels, so that `pack` writes it in no more than `coded_bytes`; without training and labels.

    One price of a bit chooses the step of each weight: where a bit lowers the predicted change of the outputs most. Each weight is then
    rounded entry by entry, and later entries make up for the errors of earlier ones, in the second moments of its inputs and of the
    gradients of the outputs. Weights follow in the order in which they are called, on the inputs of the network rounded so far; each is
    first fitted to what its output lacks, the drift of a skip path beside it included. Biases take up the mean.

    Linear layers and convolutions are rounded so. Other weights (embeddings, recurrent, packed attention, tied ones) are rounded to the
    nearest level, with a curvature that is measured. Buffers are left as they are.

    Args:
        model: dense or merged. It is left untouched.
        data: batches of inputs or of ``(inputs, target)``; targets are not used.
        coded_bytes: a fraction in (0, 1) of the bytes of the tensors, or a number of bytes of at least 1000.
        examples: of `data` to use, from its beginning.
        sequential: False to round all weights on the dense network's inputs: fewer passes, larger change.
        fold: whether BatchNorms are folded into the layers before them first.
        progress: show a progress bar, on stderr and on a terminal only.

    Returns:
        The network, and the sizes of its file.

    Raises:
        SettingError: for an argument outside its range, a factorized network, BatchNorms that cannot be folded as the network cannot be
            traced, or a budget that no steps meet.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> made = round_to(model, [torch.randn(256, 64)], coded_bytes=3500, progress=False)
        >>> made.packed.coded_bytes <= 3500, made.unexplained < 0.1
        (True, True)

    Source: steps by one Lagrangian: Shoham and Gersho, IEEE Trans. ASSP 36 (1988); feedback: Frantar et al., arXiv 2210.17323; curvature of
    outputs: Martens and Grosse, arXiv 1503.05671.
    Deviation: feedback over inputs and outputs at once; the Jacobian of the outputs instead of the loss; skip paths.
    """
    check("round_to", model=model, batches=data, examples=examples)
    model = unwrapped(model)
    if isinstance(coded_bytes, bool) or not (0 < coded_bytes < 1 or coded_bytes >= 1000):
        raise SettingError("round_to", "coded_bytes", got=coded_bytes, rule="a fraction in (0, 1), or a number of bytes of at least 1000")
    if next(named_layers(model), None) is not None:
        raise SettingError("round_to", "model", got="a factorized network", rule="of ordinary layers", hint="call merge(model) first")
    dense = duplicate(model).eval()
    if fold:
        try:
            fold_batchnorms(dense)
        except LayerError as error:
            raise SettingError("round_to", "fold", got=True, rule="False for this network", hint=str(error)) from error
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    limit = int(coded_bytes * held if coded_bytes < 1 else coded_bytes)
    batches = [inputs for inputs, _ in batches_of(data, dense, examples, targets=False, progress=progress, title="round_to")]
    if not batches:
        raise SettingError("round_to", "data", got="no batches", rule="at least one batch")
    with isolated(dense):
        return _Search(dense, batches, sequential, progress).within(limit)


class _Search:
    """The dense network, what is known of its weights, and attempts to meet a budget."""

    def __init__(self, dense: nn.Module, batches: Sequence[Any], sequential: bool, progress: bool) -> None:
        self.dense, self.batches, self.sequential = dense, batches, sequential
        self.sizes = [batch_size_of(batch) for batch in batches]
        self.weights = weights_of(dense)
        frozen = [parameter for parameter in dense.parameters() if not parameter.requires_grad]
        dense.requires_grad_(True)
        self.met = moments(dense, self.weights, batches, self.sizes)
        for parameter in frozen:
            parameter.requires_grad_(False)
        with evaluating(dense):
            self.outputs = list(outputs(dense, batches))
        self.roundings = {name: with_feedback(self.weights[name].matrices(), met) for name, met in self.met.items()}
        own = {id(self.weights[name].layer.weight) for name in self.met}
        self.others = {name: tensor for name, tensor in dense.named_parameters() if tensor.is_floating_point() and id(tensor) not in own}
        self.roundings |= {name: self._measured(tensor) for name, tensor in self.others.items() if tensor.dim() > 1}
        self.curves: dict[str, Curve] = {}
        console = Console(stderr=True)
        shown = progress and console.is_terminal
        self.track: Any = lambda names, title: track(names, title, console=console, transient=True, disable=not shown)
        for name in self.track(list(self.roundings), "steps"):
            rounding = self.roundings[name]
            self.curves[name] = curve_of(rounding, float(np.sqrt((rounding.matrices**2).mean())))

    def _measured(self, tensor: Tensor) -> Rounding:
        """Return the rounding of a weight without feedback: its curvature is measured on a batch, at a trial step."""
        kept, matrix = tensor.detach().clone(), tensor.detach().double().cpu().numpy()[None]
        step = TRIAL * float(np.sqrt((matrix**2).mean())) or 1.0
        with evaluating(self.dense):
            tensor.copy_((kept / step).round() * step)
            changed = next(outputs(self.dense, self.batches))
            change = float((tensor - kept).double().square().sum())
            tensor.copy_(kept)
        moved = float((changed - self.outputs[0]).double().square().sum()) / self.sizes[0]
        return Rounding(matrix, curvature=moved / max(change, 1e-30))

    def within(self, limit: int) -> Rounded:
        """Return the network rounded to at most that many bytes: fast attempts on the dense network's inputs lead to the price."""
        goal, best = limit * 8.0, None
        for attempt in range(TRIES):
            price = price_for(self.curves, goal)
            size = coded(self._rounded(price, sequential=False)[0])[1].coded_bytes
            goal *= NEAR * 1.005 * limit / size
            if NEAR**2 * limit <= size <= limit or attempt == TRIES - 1:
                break
        for _ in range(TRIES):
            made, steps, bits = self._rounded(price, self.sequential)
            packed = coded(made)[1]
            if packed.coded_bytes <= limit and (best is None or packed.coded_bytes > best[1].coded_bytes):
                best = made, packed, steps, bits
            if best is not None and (packed.coded_bytes >= NEAR * limit or not self.sequential or _ >= 1):
                break
            goal *= NEAR * 1.005 * limit / packed.coded_bytes
            price = price_for(self.curves, goal)
        if best is None:
            raise SettingError(
                "round_to", "coded_bytes", got=limit, rule=f"at least {packed.coded_bytes:,}, the fewest bytes that were reached"
            )
        model, packed, steps, bits = best
        return Rounded(model, packed, steps, bits, self._unexplained(model))

    def _rounded(self, price: float, sequential: bool) -> tuple[nn.Module, dict[str, float], dict[str, float]]:
        """Return the network with each weight rounded at its step for a price of a bit, the steps, and bits for each entry."""
        made = duplicate(self.dense).eval()
        weights, parameters = weights_of(made), dict(made.named_parameters())
        steps = {name: float(np.float32(curve.steps[curve.best(price)])) for name, curve in self.curves.items()}
        bits = {}
        for name in self.others:
            if name in self.roundings:
                levels, _ = self.roundings[name](steps[name], price)
                bits[name] = _bits(levels)
                _put(parameters[name], levels[0], steps[name])
        with evaluating(made) if sequential else nullcontext(), torch.no_grad():
            for name in self.track(list(self.met), "rounding") if sequential else self.met:
                weight, met, rounding = weights[name], self.met[name], self.roundings[name]
                before = weight.matrices()
                if sequential and met.once:
                    met = beside(self.dense, self.weights[name], made, weight, self.batches, self.sizes, met.left)
                    rounding = with_feedback(towards(before.cpu(), met), met)
                levels, _ = rounding(steps[name], price)
                bits[name] = _bits(levels)
                weight.set_(torch.from_numpy(levels.astype(np.float32) * np.float32(steps[name])).to(before))
                _absorb(weight, before, met)
        taken = {id(weights[name].layer.bias) for name in self.met}
        for name in self.others:
            vector = parameters[name]
            if name not in self.roundings and id(vector) not in taken:
                _to_levels(vector, BIASES if name.rpartition(".")[2].startswith("bias") else VECTORS)
        return made, steps, bits

    def _unexplained(self, model: nn.Module) -> float:
        """Return the mean squared change of the outputs over their variance."""
        with evaluating(model):
            change = sum(float((a - b).double().square().sum()) for a, b in zip(outputs(model, self.batches), self.outputs, strict=True))
        count = sum(output.shape[:-1].numel() for output in self.outputs)
        mean = sum(output.double().flatten(0, -2).sum(0) for output in self.outputs) / count
        return change / max(1e-30, sum(float((output.double() - mean).square().sum()) for output in self.outputs))


def _bits(levels: np.ndarray) -> float:
    counts = np.unique(levels, return_counts=True)[1] / levels.size
    return float(-(counts * np.log2(counts)).sum())


def _put(tensor: Tensor, levels: np.ndarray, step: float) -> None:
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(levels.astype(np.float32) * np.float32(step)))


def _absorb(weight: Weight, before: Tensor, met: Moments) -> None:
    """Let the bias take up what rounding does to the mean of the output, and put it on levels."""
    bias = weight.layer.bias
    if bias is None:
        return
    shift = (before - weight.matrices()) @ met.mean.to(before).unsqueeze(-1)
    with torch.no_grad():
        bias.copy_(bias.double() + shift.flatten() + met.missing.to(before).flatten())
    _to_levels(bias, BIASES)


def _to_levels(vector: Tensor, most: int) -> None:
    """Round a vector to that many levels on each side of zero."""
    if vector.numel() and (largest := float(vector.detach().abs().max())) > 0:
        step = float(np.float32(largest / most))
        _put(vector, np.rint(vector.detach().double().cpu().numpy() / step), step)
