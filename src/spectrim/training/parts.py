"""One part of a network that is reconstructed: what it is called with, what it shall compute, and its steps."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from spectrim.errors import LayerError, SettingError
from spectrim.forms.derived import balance_
from spectrim.forms.svd import Factors
from spectrim.layers import named_factors
from spectrim.metrics.calls import call_model, seen_calls
from spectrim.metrics.distance import Divergence, floats_of, relative_distance

WARMUP = 0.1
"""Share of the steps in which the learning rate rises; it falls along a cosine to zero in the rest."""


@dataclass(frozen=True)
class Reconstruction:
    """Train each block of a cut network, in turn, toward the output of the dense network's block, on unlabeled inputs.

    ``min ||f(x~) - f_dense(x)||^2 / var(f_dense(x))``: ``x~`` is the input of the block in the compressed network, whose earlier blocks are
    reconstructed already, ``x`` that in the dense one. Then, with `whole` steps, the network as a whole, toward the dense network's outputs
    (``KL(dense || compressed)`` where these are logits). Adam, a short rise of the rate and a cosine; all of a block's parameters are
    trained, layers stay in eval mode. Each block, and the whole, is kept only where the error on examples held out from its steps is lower.

    Takes the memory of one block's inputs and outputs on all examples.

    Args:
        steps: of each block, >= 0; 50 for mild budgets, 150 to 300 for strong ones.
        whole: steps of the network as a whole, >= 0.
        rate: largest learning rate of blocks; 2e-3 where a block has convolutions, else 1e-3, when omitted.
        whole_rate: largest learning rate of the whole; a quarter of that of blocks with convolutions, that of others, when omitted.
        batch: examples of a step, >= 1, out of one batch of the data.
        held_out: share of the batches, in (0, 1), that judges; with a single batch that judges, too.
        blocks: names or globs; see `blocks_of` for what is found when omitted.
        examples: inputs to train on, for `compress`; the calibration set when omitted.
        logits: whether outputs are logits of classes along the last axis.
        augment: changes the inputs of each step of the whole network, such as random crops.
        seconds: stop training after so many; what is done by then stays. Results then depend on the machine.
        seed: of the examples that are drawn.

    Source: block-wise reconstruction: Li et al. (BRECQ), arXiv 2102.05426, for quantization; Wang et al. (AA-SVD) for low rank.
    Deviation: plain squared error, no Fisher weights.
    """

    steps: int = 150
    whole: int = 0
    rate: float | None = None
    whole_rate: float | None = None
    batch: int = 64
    held_out: float = 0.25
    blocks: Sequence[str] | None = None
    examples: int | None = None
    logits: bool = False
    augment: Callable[[Any], Any] | None = None
    seconds: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("whole", 0), ("batch", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SettingError("Reconstruction", name, got=value, rule=f"an integer of at least {least}")
        if not 0 < self.held_out < 1:
            raise SettingError("Reconstruction", "held_out", got=self.held_out, rule="a fraction in (0, 1)")
        for name in ("rate", "whole_rate", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SettingError("Reconstruction", name, got=value, rule="a number above 0, or None")


@dataclass(frozen=True)
class Reconstructed:
    """How one part was reconstructed.

    Attributes:
        name: of the block; ``output`` for the network as a whole.
        before: error on the held-out examples: share of the variance, or nats.
        after: the same, after the steps.
        kept: whether the steps were kept.
        steps: that were made.
    """

    name: str
    before: float
    after: float
    kept: bool
    steps: int


@dataclass
class Part:
    """A block, or the whole network: what it is called with, and what it shall compute; one entry for each batch."""

    name: str
    module: nn.Module
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    targets: list[Any]
    settings: Reconstruction
    error: Callable[[Any, Any], Tensor]
    rate: float
    augmented: Callable[[Any], tuple[Any, Any]] | None = None

    @classmethod
    def block(cls, name: str, low: nn.Module, dense: nn.Module, batches: list[Any], settings: Reconstruction) -> "Part":
        """Return one block, by its name."""
        modules = dict(dense.named_modules())
        if name not in modules:
            raise LayerError(name, "is not in the network before the cut", hint="pass the network that was factorized and cut")
        module = low.get_submodule(name)
        targets, calls = [], []
        with torch.no_grad():
            for inputs in batches:
                targets.append(_tensor(_met(dense, modules[name], inputs)[2], name))
                args, kwargs, _ = _met(low, module, inputs)
                calls.append((args, kwargs))
        variance = _variance(targets)
        rate = settings.rate or (2e-3 if _convolves(module) else 1e-3)
        return cls(name, module, calls, targets, settings, lambda out, wanted: (out - wanted).square().mean() / variance, rate)

    @classmethod
    def output(cls, low: nn.Module, dense: nn.Module, batches: list[Any], settings: Reconstruction) -> "Part":
        """Return the network as a whole: all tensors that it returns, each by its own variance."""

        def wanted(inputs: Any) -> list[Tensor]:
            with torch.no_grad():
                return _numbers(call_model(dense, inputs))

        def augmented(inputs: Any) -> tuple[Any, list[Tensor]]:
            assert settings.augment is not None
            inputs = settings.augment(inputs)
            return inputs, wanted(inputs)

        targets = [wanted(inputs) for inputs in batches]
        error = Divergence() if settings.logits else relative_distance(list(zip(batches, targets, strict=True)))
        rate = settings.whole_rate or (5e-4 if _convolves(low) else 1e-3)
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((inputs,), {}) for inputs in batches]
        return cls("output", low, calls, targets, settings, error, rate, augmented if settings.augment is not None else None)

    def train(self, steps: int, deadline: float | None, tick: Callable[[], None]) -> Reconstructed:
        """Make the steps; put the part back where they did not lower the error on what is held out."""
        held, taught = self._split()
        ends = torch.tensor([self._size(index) for index in taught]).cumsum(0)  # each example is as likely, however batches are cut
        for _, form in named_factors(self.module):
            if isinstance(form, Factors) and form.is_matrix:
                balance_(form)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in parameters]
        start, done = self._judge(held), 0
        optimizer = torch.optim.Adam(parameters, self.rate)
        generator = torch.Generator().manual_seed(self.settings.seed)
        for step in range(steps):
            if deadline is not None and time.monotonic() > deadline:
                break
            for group in optimizer.param_groups:
                group["lr"] = self.rate * _schedule((step + 0.5) / steps)
            chosen = taught[int(torch.searchsorted(ends, torch.randint(int(ends[-1]), (), generator=generator), right=True))]
            optimizer.zero_grad()
            self.error(*self._run(*self._some(chosen, generator))).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += 1
            tick()
        end = self._judge(held)
        kept = math.isfinite(end) and end < start
        if not kept:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
        optimizer.zero_grad()
        return Reconstructed(self.name, start, end, kept, done)

    def _split(self) -> tuple[list[int], list[int]]:
        """Return which batches judge, and which teach."""
        count = len(self.calls)
        if count == 1:
            return [0], [0]
        every = max(2, round(1 / self.settings.held_out))
        held = [index for index in range(count) if index % every == every - 1] or [count - 1]
        return held, [index for index in range(count) if index not in held]

    def _size(self, index: int) -> int:
        """Return how many examples one batch has, by the first axis of what is wanted of it."""
        first: Tensor = tree_leaves(self.targets[index])[0]
        return max(1, len(first)) if first.dim() else 1

    def _some(self, index: int, generator: torch.Generator) -> tuple[Any, Any]:
        """Return some examples of one batch: of the tensors whose first axis is as long as the target's, when the first input is one."""
        call, target = self.calls[index], self.targets[index]
        leaves = [leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor)]
        wanted: list[Tensor] = tree_leaves(target)
        size = self._size(index)
        if not leaves or any(not leaf.dim() or len(leaf) != size for leaf in (leaves[0], *wanted)) or size <= self.settings.batch:
            return call, target
        drawn = torch.randperm(size, generator=generator)[: self.settings.batch].to(wanted[0].device)

        def take(leaf: Tensor) -> Tensor:
            return leaf.index_select(0, drawn) if leaf.dim() and len(leaf) == size else leaf

        return tree_map_only(Tensor, take, call), tree_map_only(Tensor, take, target)

    def _run(self, call: Any, target: Any, *, changed: bool = True) -> tuple[Any, Any]:
        args, kwargs = call
        if self.name != "output":
            return _tensor(self.module(*args, **kwargs), self.name), target
        inputs = args[0]
        if self.augmented is not None and changed:
            inputs, target = self.augmented(inputs)
        return _numbers(call_model(self.module, inputs)), target

    @torch.no_grad()
    def _judge(self, held: Sequence[int]) -> float:
        """Return the error on what is held out, the mean over its examples."""
        sizes = [self._size(index) for index in held]
        errors = [float(self.error(*self._run(self.calls[index], self.targets[index], changed=False))) for index in held]
        return sum(size * error for size, error in zip(sizes, errors, strict=True)) / sum(sizes)


def _schedule(done: float) -> float:
    return done / WARMUP if done < WARMUP else 0.5 + 0.5 * math.cos(math.pi * (done - WARMUP) / (1 - WARMUP))


def _variance(targets: Sequence[Tensor]) -> float:
    """Return the variance of what is wanted, over examples and positions, of each feature: the mean; 1 where nothing varies."""
    count = sum(target.numel() for target in targets)
    mean = sum(float(target.sum(dtype=torch.float64)) for target in targets) / count
    found = sum(float((target.double() - mean).square().sum()) for target in targets) / count
    return found if found > 0 else 1.0


def _convolves(module: nn.Module) -> bool:
    return any(hasattr(part, "kernel_size") for part in module.modules())


def _tensor(output: Any, name: str) -> Tensor:
    """Return the first floating tensor in what a block returns."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise LayerError(name, "returns no tensor of numbers", hint="name other blocks: Reconstruction(blocks=[...])")


def _numbers(output: Any) -> list[Tensor]:
    """Return the floating tensors in what a network returns, its scores alone where it names them."""
    found = floats_of(output)
    if not found:
        raise LayerError("output", "has no tensor of numbers", hint="let the network return one: its outputs are what is matched")
    return found


def _met(model: nn.Module, module: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Run a model to the end of one of its modules; return what that was called with, and what it returned."""
    found = seen_calls(model, module, inputs)
    if not found:
        raise LayerError(type(module).__name__, "is not called by the network", hint="name other blocks: Reconstruction(blocks=[...])")
    return found[0]
