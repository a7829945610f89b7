"""Attempts to meet a number of coded bytes: a network, what is known of its weights, and its rounding at a price of a bit."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from spectrim.budget.budget import Budget
from spectrim.budget.rounding.curves import Curve, Rounding, bits_at, curve_of, lowest_price, price_for, towards, with_feedback
from spectrim.budget.rounding.joint import chosen, costs_of, sparse_options
from spectrim.budget.rounding.meeting import FLAT, Moments, beside, moments, outputs, squared_change, units_of
from spectrim.budget.rounding.pairs import Option, best_at, options_of
from spectrim.budget.rounding.scaling import NEAR, next_scale
from spectrim.budget.rounding.vectors import BIASES, VECTORS, put_, to_levels_
from spectrim.budget.rounding.weights import Weight, weights_of
from spectrim.errors import SettingError
from spectrim.linalg import feedback
from spectrim.metrics.calls import evaluating
from spectrim.metrics.inputs import batch_size_of
from spectrim.metrics.table import Summarized
from spectrim.projections import LevelTable
from spectrim.storage.pack import Packed, coded
from spectrim.surgery.exchange import duplicate

TRIES = 6
"""Attempts to meet the budget."""

ENOUGH = 0.9
"""Share of the budget with which the third attempt, or without `sequential` the first, is content."""

LOSSLESS = 1e-7
"""Fraction of the variance unexplained below which a file need not be any larger."""

TINY = 1e-30
"""Smallest step, of a weight of zeros."""

TRIAL = 0.3
"""Step, in units of the root mean square, by which the curvature of weights without feedback is measured."""


@dataclass(frozen=True)
class Rounded(Summarized):
    """A network on levels.

    Attributes:
        model: ordinary layers; BatchNorms are folded where that can be done.
        packed: sizes of its coded file.
        steps: between levels, by the name of the weight.
        bits: bits of one entry of each weight, on average, by how often each level occurs.
        unexplained: fraction of variance unexplained: mean squared change of the outputs on the calibration data over their variance.
        ranks: of the weights that became two small ones, with ``low_rank=True`` or further limits.
        keeps: shares of the entries that pruning left of the weights that it was chosen for.
        tried: the fraction unexplained without and with small weights, where both were tried.
    """

    model: nn.Module = field(repr=False)
    packed: Packed
    steps: Mapping[str, float]
    bits: Mapping[str, float]
    unexplained: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    keeps: Mapping[str, float] = field(default_factory=dict)
    tried: tuple[float, float] | None = None

    def projections(self) -> dict[str, LevelTable]:
        """Return the levels of each weight, by the name of the parameter, for `StraightThrough`; none for a weight of zeros."""
        parameters, made = dict(self.model.named_parameters()), {}
        for name, step in self.steps.items():
            place = name if name in parameters else f"{name}.weight"
            if most := round(float(parameters[place].detach().abs().max()) / step):
                levels = np.arange(-most, most + 1).astype(np.float32) * np.float32(step)
                made[place] = LevelTable(tuple(levels.tolist()))
        return made

    def summary(self) -> str:
        """Return sizes, bits and the change of the outputs as text."""
        bits = f"{min(self.bits.values()):.2f} to {max(self.bits.values()):.2f} bits for each weight"
        cut = "".join(f"; {name} in rank {rank}" for name, rank in self.ranks.items())
        return f"{self.packed.summary()}\n{bits}; outputs changed by {self.unexplained:.2%} of their variance{cut}"


class Search:
    """The network, what is known of its weights, and attempts to meet a budget.

    Args:
        dense: the network to round.
        batches: inputs.
        sequential: whether weights are rounded on the inputs of the network rounded so far.
        progress: whether to show it.
        before: the same of the network before some of its layers became two, and the names of these by those of the second of the two: what
            outputs should be.
    """

    def __init__(
        self,
        dense: nn.Module,
        batches: Sequence[Any],
        sequential: bool,
        progress: bool,
        before: "tuple[Search, Mapping[str, str]] | None" = None,
    ) -> None:
        self.dense, self.batches, self.sequential, self.before = dense, batches, sequential, before
        self.sizes = [batch_size_of(batch) for batch in batches]
        self.weights = weights_of(dense)
        frozen = [parameter for parameter in dense.parameters() if not parameter.requires_grad]
        dense.requires_grad_(True)
        with evaluating(dense):
            self.units: Sequence[float] = units_of(dense, batches[0]) if before is None else before[0].units
        self.met = moments(dense, self.weights, batches, self.sizes, self.units)
        for parameter in frozen:
            parameter.requires_grad_(False)
        with evaluating(dense):
            self.outputs = list(outputs(dense, batches, self.units))
        self.wanted = self.outputs if before is None else before[0].outputs
        self.roundings = {name: with_feedback(self.weights[name].matrices(), met).holding() for name, met in self.met.items()}
        own = {id(self.weights[name].layer.weight) for name in self.met}
        self.others = {name: tensor for name, tensor in dense.named_parameters() if tensor.is_floating_point() and id(tensor) not in own}
        self.roundings |= {name: self._measured(tensor) for name, tensor in self.others.items() if tensor.dim() > 1}
        self.curves: dict[str, Curve] = {}
        console = Console(stderr=True)
        shown = progress and console.is_terminal
        self.track: Any = lambda names, title: track(names, title, console=console, transient=True, disable=not shown)
        for name in self.track(list(self.roundings), "steps"):
            rounding = self.roundings[name]
            self.curves[name] = curve_of(rounding.rough, rounding.size)

    def _measured(self, tensor: Tensor) -> Rounding:
        """Return the rounding of a weight without feedback: its curvature is measured on a batch, at a trial step."""
        kept, rounding = tensor.detach().clone(), Rounding(tensor.detach().double().cpu().numpy()[None]).holding()
        step = TRIAL * rounding.size or 1.0
        with evaluating(self.dense):
            tensor.copy_((kept / step).round() * step)
            changed = next(outputs(self.dense, self.batches, self.units))
            change = float((tensor - kept).double().square().sum())
            tensor.copy_(kept)
        moved = float((changed - self.outputs[0]).double().square().sum()) / self.sizes[0]
        return replace(rounding, curvature=moved / max(change, 1e-30))

    def joint(self, limit: int) -> dict[str, Option]:
        """Return the weights that one price of a bit makes two small ones of, at the bits of a file of that size."""
        bits = bits_at(self.curves, self._price(limit))
        options = {name: options_of(self.weights[name], met, self.curves[name]) for name, met in self._shown(self.met, "ranks")}
        rest = {name: curve for name, curve in self.curves.items() if name not in options}

        def taken(price: float) -> float:
            return bits_at(rest, price) + sum(option.bits(price) for option in best_at(options, price).values())

        return {name: option for name, option in best_at(options, lowest_price(taken, bits)).items() if option.rank is not None}

    def together(self, limit: int, budget: Budget, *, sparse: bool = True, low_rank: bool = True) -> dict[str, Option]:
        """Return the way to hold each weight that one knapsack chooses, with all steps, under the limits of a budget.

        Args:
            limit: bytes of the file.
            budget: with further limits, or none.
            sparse: whether weights may be pruned.
            low_rank: whether weights may become two small ones.
        """
        bits = bits_at(self.curves, self._price(limit))
        options = {}
        for name, met in self._shown(self.met, "ranks"):
            options[name] = options_of(self.weights[name], met, self.curves[name])[: None if low_rank else 1]
            if sparse:
                numbers = options[name][0].numbers
                options[name] += [replace(option, numbers=numbers) for option in sparse_options(self.roundings[name])]
        rest = {name: curve for name, curve in self.curves.items() if name not in options}
        costs = costs_of(self.dense, self.weights, options, self.batches[0], self.sizes[0]) if budget.limits else None
        return chosen(options, rest, bits, budget, costs)

    def keep_(self, keeps: Mapping[str, float]) -> None:
        """Let weights be pruned as they are rounded, in place.

        Args:
            keeps: shares of their entries, by name.
        """
        for name, share in keeps.items():
            if share < 1 and name in self.roundings:
                self.roundings[name] = replace(self.roundings[name], kept=share)
                self.curves[name] = curve_of(self.roundings[name].rough, self.roundings[name].size)

    def _shown(self, held: Mapping[str, Any], title: str) -> Iterator[tuple[str, Any]]:
        return ((name, held[name]) for name in self.track(list(held), title))

    def _price(self, limit: int) -> float:
        """Return the price of a bit for a file of that size, by fast attempts on the dense network's inputs."""
        goal = limit * 8.0
        for attempt in range(TRIES):
            price = price_for(self.curves, goal)
            size = coded(self._rounded(price, sequential=False)[0])[1].coded_bytes
            goal *= NEAR * 1.005 * limit / size
            if NEAR**2 * limit <= size <= limit or attempt == TRIES - 1:
                break
        return price

    def within(self, limit: int) -> Rounded:
        """Return the network rounded to at most that many bytes: steps by the price, then all changed alike; the least change counts."""
        price, best, scale = self._price(limit), None, 1.0
        sizes: dict[float, int] = {}
        for attempt in range(TRIES):
            made, steps, bits = self._rounded(price, self.sequential, scale)
            packed = coded(made)[1]
            sizes[scale] = packed.coded_bytes
            if packed.coded_bytes <= limit:
                found = Rounded(made, packed, steps, bits, self._unexplained(made))
                best = found if best is None or found.unexplained < best.unexplained else best
            full = max((size for size in sizes.values() if size <= limit), default=0) / limit
            content = best is not None and (best.unexplained < LOSSLESS or (full >= ENOUGH and (not self.sequential or attempt >= 2)))
            if full >= NEAR or content:
                break
            scale = next_scale(sizes, scale, limit)
        if best is None:
            raise SettingError(
                "round_to", "coded_bytes", got=limit, rule=f"at least {min(sizes.values()):,}, the fewest bytes that were reached"
            )
        return best

    def _rounded(self, price: float, sequential: bool, scale: float = 1.0) -> tuple[nn.Module, dict[str, float], dict[str, float]]:
        """Return the network rounded at the steps for a price of a bit, times a factor; the steps, and bits for each entry."""
        made = duplicate(self.dense).eval()
        weights, parameters = weights_of(made), dict(made.named_parameters())
        steps = {name: self._step(name, scale * curve.steps[curve.best(price)]) for name, curve in self.curves.items()}
        bits, price = {}, price * scale**2
        for name in self.others:
            if name in self.roundings:
                levels, _ = self.roundings[name](steps[name], price)
                bits[name] = _bits(levels)
                put_(parameters[name], levels[0], steps[name])
        with evaluating(made) if sequential else nullcontext(), torch.no_grad():
            for name in self.track(list(self.met), "rounding") if sequential else self.met:
                weight, met = weights[name], self.met[name]
                rounding = self.roundings[name] if sequential or not self.sequential else self.roundings[name].rough
                before = weight.matrices()
                if sequential and met.once:
                    met = beside(*self._counterpart(name), made, weight, self.batches, self.sizes, met.left)
                    rounding = replace(with_feedback(towards(before.cpu(), met), met), kept=rounding.kept, support=rounding.support)
                levels, _ = rounding(steps[name], price)
                bits[name] = _bits(levels)
                weight.set_(torch.from_numpy(levels.astype(np.float32) * np.float32(steps[name])).to(before))
                _absorb(weight, before, met)
        taken = {id(weights[name].layer.bias) for name in self.met}
        for name in self.others:
            vector = parameters[name]
            if name not in self.roundings and id(vector) not in taken:
                to_levels_(vector, BIASES if name.rpartition(".")[2].startswith("bias") else VECTORS)
        return made, steps, bits

    def _step(self, name: str, wanted: float) -> float:
        """Return a step in float32, at which the largest value of the weight still has a level."""
        fewest = 2 * float(np.abs(self.roundings[name].matrices).max(initial=0.0)) / feedback.LARGEST
        return float(np.float32(max(wanted, fewest, TINY)))

    def _counterpart(self, name: str) -> tuple[nn.Module, Weight]:
        """Return the network and the weight in it that tell what the output of a weight should be."""
        if self.before is not None:
            search, counterparts = self.before
            place = counterparts.get(name, name)
            if place in search.weights:
                return search.dense, search.weights[place]
        return self.dense, self.weights[name]

    def _unexplained(self, model: nn.Module) -> float:
        """Return the mean squared change of the outputs over their variance; over their squares where they hardly vary."""
        with evaluating(model):
            change = squared_change(model, self.batches, self.units, self.wanted)
        count = sum(output.shape[:-1].numel() for output in self.wanted)
        mean = sum(output.double().flatten(0, -2).sum(0) for output in self.wanted) / count
        variance = sum(float((output.double() - mean).square().sum()) for output in self.wanted)
        squares = sum(float(output.double().square().sum()) for output in self.wanted)
        return change / max(1e-30, variance if variance > FLAT * squares else squares)


def _bits(levels: np.ndarray) -> float:
    counts = np.unique(levels, return_counts=True)[1] / levels.size
    return float(-(counts * np.log2(counts)).sum())


def _absorb(weight: Weight, before: Tensor, met: Moments) -> None:
    """Let the bias take up what rounding does to the mean of the output, and put it on levels."""
    bias = weight.layer.bias
    if bias is None:
        return
    shift = (before - weight.matrices()) @ met.mean.to(before).unsqueeze(-1)
    with torch.no_grad():
        bias.copy_(bias.double() + shift.flatten() + met.missing.to(before).flatten())
    to_levels_(bias, BIASES)
