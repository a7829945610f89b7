"""What weights meet: moments of inputs and of output gradients; inputs in the rounded network beside those in the dense one."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spectrim.budget.rounding.weights import Weight
from spectrim.errors import LayerError, SettingError
from spectrim.layers.taps import operate, tap
from spectrim.layers.uses import first_argument
from spectrim.metrics.calls import call_model
from spectrim.metrics.distance import floats_of

ROWS = 400
"""Rows looked at for each input of a weight, at most, drawn among all."""

FEWEST = 20_000

PROBES = 2
"""Random directions of the output whose gradients are taken, for each batch."""

CONSTANT = 1e-12

FLAT = 1e-10
"""Share of the outputs' squares below which their variance is that of rounding errors."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What one weight meets: means over examples of sums over positions, float64, by block.

    Attributes:
        own: of the inputs, ``(blocks, in, in)``, less their mean where the layer has a bias.
        mean: of the inputs over examples and positions, ``(blocks, in)``.
        left: of the gradients of the network's outputs, ``(blocks, out, out)``: mean over positions, sum over outputs.
        cross: what the weight should change to, times `own`: ``E[r x^T]`` with ``r`` the output that is missing, ``(blocks, out, in)``.
        missing: mean of ``r``, ``(blocks, out)``.
        once: whether the model calls the layer once for each batch.
    """

    own: Tensor
    mean: Tensor
    left: Tensor
    cross: Tensor
    missing: Tensor
    once: bool = True


class _Sum:
    """Adds up rows of inputs, and of what is missing at the outputs."""

    def __init__(self, weight: Weight, share: float) -> None:
        self.weight, self.share, self.generator = weight, share, torch.Generator().manual_seed(0)
        self.own = self.total = self.cross = self.missing = torch.zeros((), dtype=torch.float64)
        self.rows = self.seen = self.calls = 0

    def add(self, x: Tensor, output: Sequence[int], missing: Tensor | None = None) -> None:
        """Add what one call of the layer meets; `missing` has the shape of its output."""
        self.calls += 1
        parts = self.weight.inputs(x, output)
        lacks = None if missing is None else torch.cat(list(self.weight.outputs(missing, x.shape)), 1)
        place = 0
        for rows in parts:
            size = rows.shape[1]
            lack = None if lacks is None else lacks[:, place : place + size]
            place += size
            self.rows += size
            if self.share < 1:
                drawn = torch.randperm(size, generator=self.generator)[: math.ceil(self.share * size)].to(rows.device)
                rows, lack = rows[:, drawn], None if lack is None else lack[:, drawn]
            self.seen += rows.shape[1]
            self.own = self.own + (rows.mT @ rows).double()
            self.total = self.total + rows.sum(1, dtype=torch.float64)
            if lack is not None:
                self.cross = self.cross + (lack.mT @ rows).double()
                self.missing = self.missing + lack.sum(1, dtype=torch.float64)

    def result(self, left: Tensor, examples: int, batches: int) -> Moments:
        """Return the means, on the CPU."""
        if not torch.isfinite(self.own).all():
            raise LayerError(self.weight.name, "its inputs are not finite", hint="look for NaN or overflow in the data or the model")
        scale = self.rows / examples / self.seen  # rows that were drawn stand for all
        mean, left = (self.total / self.seen).cpu(), left.cpu()
        own, cross, missing = self.own.cpu() * scale, self.cross.cpu() * scale, self.missing.cpu() / self.seen
        if self.weight.layer.bias is not None:
            positions = self.rows / examples
            trace = own.diagonal(dim1=-2, dim2=-1).sum(-1)
            own = own - positions * mean.unsqueeze(-1) * mean.unsqueeze(-2)
            if cross.dim():
                cross = cross - positions * missing.unsqueeze(-1) * mean.unsqueeze(-2)
            own = own + torch.diag_embed((CONSTANT * trace).unsqueeze(-1).expand_as(mean))
        blank = torch.zeros(left.shape[0], left.shape[1], own.shape[-1], dtype=torch.float64)
        return Moments(own, mean, left, cross if cross.dim() else blank, missing if missing.dim() else blank[..., 0], self.calls <= batches)


def _share(weight: Weight, x: Tensor, output: Sequence[int], examples: int, batch: int) -> float:
    """Return the share of rows to look at."""
    matrix = weight.matrices()
    rows = math.prod(output) / matrix.shape[0] / matrix.shape[1] * examples / batch
    return max(FEWEST, ROWS * matrix.shape[2]) / max(1.0, rows)


def units_of(model: nn.Module, batch: Any) -> tuple[float, ...]:
    """Return what each tensor of several in the output is multiplied by, so that all count alike: by their variance on a batch."""
    found = [part.detach().double() for part in floats_of(call_model(model, batch))]
    total = sum(part.numel() for part in found)
    spreads = [float((part - part.mean()).square().mean()) if part.numel() else 0.0 for part in found]
    squares = [float(part.square().mean()) if part.numel() else 0.0 for part in found]
    spreads = [spread if spread > FLAT * square else square for spread, square in zip(spreads, squares, strict=True)]
    return tuple((total / max(1, part.numel()) / (spread or 1.0)) ** 0.5 for part, spread in zip(found, spreads, strict=True))


def output_of(model: nn.Module, batch: Any, units: Sequence[float]) -> Tensor:
    """Return the output of a model as one tensor: the only one that it has, its logits, or all of several in one column.

    Args:
        model: in eval mode.
        batch: inputs.
        units: see `units_of`.

    Raises:
        SettingError: for an output without floating-point numbers, or one of other tensors than the dense network's.
    """
    output = call_model(model, batch)
    found = floats_of(output)
    if not found:
        raise SettingError("round_to", "model", got=type(output), rule="one whose output holds floating-point tensors, or logits")
    if len(found) != len(units):
        raise SettingError("round_to", "model", got=f"{len(found)} tensors in an output, {len(units)} in another", rule="of outputs alike")
    if len(found) == 1:
        return found[0] if found[0].dim() > 1 else found[0].reshape(-1, 1)
    return torch.cat([(part * unit).reshape(-1, 1) for part, unit in zip(found, units, strict=True)])


def moments(
    model: nn.Module, weights: Mapping[str, Weight], batches: Sequence[Any], sizes: Sequence[int], units: Sequence[float] = (1.0,)
) -> dict[str, Moments]:
    """Return the moments of the weights that the model calls, in the order of first calls.

    The gradients are those of random sums of the outputs, ``v^T z`` with ``v`` of signs: on average their second moment is that of the
    Jacobian, so that a change of a weight is priced by how much it moves the outputs, without labels and without a loss.

    Args:
        model: dense, in eval mode.
        weights: of its layers.
        batches: inputs.
        sizes: examples in each.
        units: of the tensors in the output, see `units_of`.
    """
    sums: dict[str, _Sum] = {}
    lefts: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    examples = sum(sizes)
    generator = torch.Generator().manual_seed(0)
    called: list[tuple[Weight, torch.Size, Tensor]] = []

    def note(weight: Weight, size: int, args: Any, kwargs: Any, output: Tensor) -> None:
        x = first_argument(args, kwargs).detach()
        if weight.name not in sums:
            sums[weight.name] = _Sum(weight, _share(weight, x, output.shape, examples, size))
        sums[weight.name].add(x, output.shape)
        if output.requires_grad:
            called.append((weight, x.shape, output))

    for batch, size in zip(batches, sizes, strict=True):
        called.clear()
        handles = [
            tap(weight.layer, after=lambda _, args, kwargs, out, w=weight, n=size: note(w, n, args, kwargs, out))  # type: ignore[misc]
            for weight in weights.values()
        ]
        try:
            with torch.enable_grad():
                output = output_of(model, batch, units)
        finally:
            for handle in handles:
                handle.remove()
        if not output.requires_grad:
            raise SettingError("round_to", "model", got="an output without gradients", rule="one whose output depends on its weights")
        for probe in range(PROBES if called else 0):
            signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
            keep = probe + 1 < PROBES
            grads = torch.autograd.grad(output, [y for _, _, y in called], signs, retain_graph=keep, allow_unused=True)
            for (weight, shape, _), grad in zip(called, grads, strict=True):
                if grad is None:
                    continue
                for rows in weight.outputs(grad, shape):
                    lefts[weight.name] = lefts.get(weight.name, torch.zeros((), dtype=torch.float64)) + (rows.mT @ rows).double()
                    counts[weight.name] = counts.get(weight.name, 0) + rows.shape[1]
    return {name: found.result(lefts[name] / counts[name], examples, len(batches)) for name, found in sums.items() if name in lefts}


class _Met(Exception):  # noqa: N818 it is no error
    """Ends a pass through a network early."""


class _Added(TorchFunctionMode):
    """Watches for the first operation on a layer's output: where it is an addition, keeps what is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Tensor | None = None
        self.other: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at a call, or make it."""
        if self.output is not None and any(argument is self.output for argument in args):
            if getattr(func, "__name__", "") in ("add", "add_", "__add__", "__iadd__", "__radd__") and len(args) == 2:
                other = args[1] if args[0] is self.output else args[0]
                if isinstance(other, Tensor) and other.shape == self.output.shape:
                    self.other = other.detach()
            if getattr(func, "__name__", "") not in ("__get__", "size", "dim"):
                raise _Met
        return func(*args, **(kwargs or {}))


def _meeting(model: nn.Module, layer: nn.Module, batch: Any) -> tuple[Tensor, torch.Size, Tensor | None]:
    """Run a model to a layer and to the first use of its output; return its input, the output's shape, and what is added to the output."""
    found: list[Any] = []
    watching = _Added()

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        found.append((first_argument(args, kwargs).detach(), output.shape))
        watching.output = output

    handle = tap(layer, after=keep)
    try:
        with watching:
            call_model(model, batch)
    except _Met:
        pass
    finally:
        handle.remove()
    return *found[0], watching.other


def beside(
    dense: nn.Module, original: Weight, model: nn.Module, weight: Weight, batches: Sequence[Any], sizes: Sequence[int], left: Tensor
) -> Moments:
    """Return what a weight meets in a network that is rounded up to it, and what its output lacks to be the dense one's.

    What is added to the output at once, as behind a residual branch, counts: the layer makes up for the drift of the skip path, too.

    Args:
        dense: in eval mode.
        original: the weight there.
        model: rounded up to the weight, which is still the dense one's.
        weight: there.
        batches: inputs.
        sizes: examples in each.
        left: metric of the outputs.
    """
    total: _Sum | None = None
    for batch, size in zip(batches, sizes, strict=True):
        before, shape, skip = _meeting(dense, original.layer, batch)
        now, _, drifted = _meeting(model, weight.layer, batch)
        total = total or _Sum(weight, _share(weight, now, shape, sum(sizes), size))
        missing = operate(original.layer, before) - operate(weight.layer, now)
        if skip is not None and drifted is not None:
            missing = missing + (skip - drifted)
        total.add(now, shape, missing)
    assert total is not None
    return total.result(left, sum(sizes), len(batches))


def outputs(model: nn.Module, batches: Sequence[Any], units: Sequence[float] = (1.0,)) -> Iterator[Tensor]:
    """Yield the outputs of a model, see `output_of`."""
    for batch in batches:
        yield output_of(model, batch, units).detach()


def squared_change(model: nn.Module, batches: Sequence[Any], units: Sequence[float], wanted: Sequence[Tensor]) -> float:
    """Return the sum of the squared changes of all outputs.

    Raises:
        SettingError: for outputs whose shapes depend on their values.
    """
    total = 0.0
    for now, before in zip(outputs(model, batches, units), wanted, strict=True):
        if now.shape != before.shape:
            got = f"outputs whose shapes depend on their values ({tuple(before.shape)}, then {tuple(now.shape)})"
            raise SettingError("round_to", "model", got=got, rule="of outputs of one shape", hint="round a module that returns scores")
        total += float((now - before).double().square().sum())
    return total
