"""`StaticPrecision`, `CyclicPrecision` and `LearnedPrecision`: training whose layers compute in few bits, simulated."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from spectrim.errors import SettingError
from spectrim.training.bits import STATIC, Vector, bit_operations, shifted_to
from spectrim.training.low_bits import MOST, Rounding, check_bits, check_limits

MEMORY = 0.99
"""Share of the running mean of a gradient that stays at each step."""

HORIZON = 0.05
"""Share of training within which bits that were not spent, or spent too early, are made up for."""

MARGIN = 0.99
"""Share of the allowed cost that is planned: learned bits are not whole numbers, and the rest takes up what rounding them costs."""

CUT = 0.999
"""Share of the multiply-accumulates at the begin below which ranks have been cut."""

FAINT = 1e-6
"""Gains for a bit operation below this share of the largest one are noise."""


@dataclass(frozen=True)
class StaticPrecision(Rounding):
    """Simulate training in cheaper arithmetic: inputs, weights and gradients of every layer in the same bits all the time.

    Nothing gets faster, see `LearnedPrecision`. The baseline. A `Course`: give it to ``fit(..., courses=[...])``.

    Args:
        bits: of inputs and weights, in [2, 16], or 32 to round nothing.
        gradient_bits: of the gradients of outputs, likewise.

    Raises:
        SettingError: for a value outside its range, or, when training starts, a network without a layer that can compute in fewer bits.

    Examples:
        >>> StaticPrecision(6).gradient_bits
        8
    """

    bits: int = 8
    gradient_bits: int = 8

    def __post_init__(self) -> None:
        check_bits("StaticPrecision", "bits", self.bits)
        check_bits("StaticPrecision", "gradient_bits", self.gradient_bits)

    def _bits(self, step: int, steps: int, memory: Mapping[str, Any]) -> dict[str, int]:
        return dict.fromkeys(memory["macs"], self.bits)


@dataclass(frozen=True)
class CyclicPrecision(Rounding):
    """Simulate training in cheaper arithmetic, in bits that rise along half a cosine, again and again, the same for all layers.

    ``b = rint(least + (most - least) (1 - cos(pi t)) / 2)``; ``t`` goes from 0 to 1 in each cycle. Nothing gets faster, see
    `LearnedPrecision`. A `Course`: give it to ``fit(..., courses=[...])``.

    Args:
        least: bits at the begin of a cycle, in [2, most].
        most: bits at its end, at most 16.
        cycles: in the whole training, >= 1.
        gradient_bits: of the gradients of outputs, in [2, 16], or 32 to round nothing.

    Raises:
        SettingError: for a value outside its range, or, when training starts, a network without a layer that can compute in fewer bits.

    Examples:
        >>> CyclicPrecision().at(0, 640), CyclicPrecision().at(19, 640)
        (3, 8)

    Source: Fu et al., CPT, arXiv 2101.09868; cycles and bits of GATECH-EIC/CPT.
    """

    least: int = 3
    most: int = 8
    cycles: int = 32
    gradient_bits: int = 8

    def __post_init__(self) -> None:
        check_limits("CyclicPrecision", self.least, self.most)
        check_bits("CyclicPrecision", "gradient_bits", self.gradient_bits)
        if isinstance(self.cycles, bool) or not isinstance(self.cycles, int) or self.cycles < 1:
            raise SettingError("CyclicPrecision", "cycles", got=self.cycles, rule="an integer >= 1")

    def at(self, step: int, steps: int) -> int:
        """Return the bits of a step."""
        length = max(1.0, steps / self.cycles)
        done = (step % length) / length
        return round(self.least + 0.5 * (self.most - self.least) * (1 - math.cos(math.pi * done)))

    def _bits(self, step: int, steps: int, memory: Mapping[str, Any]) -> dict[str, int]:
        return dict.fromkeys(memory["macs"], self.at(step, steps))


@dataclass(frozen=True)
class LearnedPrecision(Rounding):
    """Simulate training in cheaper arithmetic: every layer, and every factor, learns its bits by gradient, at a given cost of the whole.

    Inputs, weights and gradients are rounded, but products are float, and nothing gets faster. In each step, inputs and weights of an
    operation are rounded to ``round(b)`` bits and the gradients of its outputs to `gradient_bits`. ``dL/db`` comes from the same backward
    pass, see `linalg.rounding.Rounded`, and ``p = -dL/db / (d cost / db)`` is what a bit operation more gains there. As ``p`` falls by a
    factor of four with each bit, ``b + log2(p) / 2`` is where all gains are equal, up to a shift of all bits by a common number; bits move
    a share `rate` of the way, and the shift is the one that costs what the plan wants.

    The planned cost of a step is constant; with `rise` it grows linearly from that of `least` bits for a share of the training first. Its
    mean is 99 % of `cost`, which is never exceeded. Multiply-accumulates are counted by running the network, again after each cut: a
    smaller rank leaves more for bits. Where not even `most` bits everywhere spend what a cut has left, the limit is raised by as many bits
    as it takes, up to `most_after_cuts`.

    A `Course`: give it to ``fit(..., courses=[...])``. Costs and bits are in the log, see `noted`; between steps and after training the
    network is in float, and ``with rounding(model, bits_of(history.last)):`` runs it in bits.

    Args:
        cost: bit operations of the whole training, as a share of those of static 8 bits at the ranks that training begins with; between
            what `least` and `most` bits cost.
        least: bits, in [2, most].
        most: bits, at most 16.
        most_after_cuts: bits at most once ranks have been cut, in [most, 16]; `most` keeps to that, and leaves a part of `cost`.
        gradient_bits: of the gradients of outputs, in [2, 16], or 32 to round nothing.
        rate: share of the way to equal gains in one step, in (0, 1].
        rise: share of the training in which the plan rises, in [0, 1]; shorter where the end would cost more than `most` bits.
        settle: share of the training at the end, in [0, 1), in which bits stay as they are: the network ends adapted to them.

    Raises:
        SettingError: for a value outside its range, or, when training starts, a network without a layer that can compute in fewer bits.

    Examples:
        >>> import torch
        >>> model, data = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), [(torch.randn(4, 8), torch.randn(4, 2))] * 50
        >>> from spectrim.training.fit import fit
        >>> from spectrim.training.low_bits import bits_of
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> history = fit(model, data, nn.MSELoss(), optimizer, epochs=2, courses=[LearnedPrecision(0.6)], progress=False)
        >>> sorted(bits_of(history.last)), 0.57 < history.last["LearnedPrecision cost"] <= 0.6
        (['0', '2'], True)

    Source: Yu et al., LDP, arXiv 2203.07713: bits learned by the gradient through the step of the levels, within [3, 8].
    Deviation: the source adds ``alpha * cost`` to the loss; here the cost is a constraint, see the method card.
    """

    cost: float = 0.6
    least: int = 3
    most: int = 8
    most_after_cuts: int = 16
    gradient_bits: int = 8
    rate: float = 0.02
    rise: float = 0.0
    settle: float = 0.0
    learns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_limits("LearnedPrecision", self.least, self.most)
        if self.most_after_cuts not in range(self.most, MOST + 1):
            rule = f"an integer in [{self.most}, {MOST}], from `most` on"
            raise SettingError("LearnedPrecision", "most_after_cuts", got=self.most_after_cuts, rule=rule)
        check_bits("LearnedPrecision", "gradient_bits", self.gradient_bits)
        if not 0 < self.rate <= 1 or not 0 <= self.rise <= 1:
            raise SettingError("LearnedPrecision", "rate and rise", got=(self.rate, self.rise), rule="in (0, 1] and in [0, 1]")
        if not 0 <= self.settle < 1:
            raise SettingError("LearnedPrecision", "settle", got=self.settle, rule="in [0, 1)")
        lowest, highest = self._share(self.least), self._share(self.most)
        if isinstance(self.cost, bool) or not lowest <= self.cost <= highest:
            rule = f"a share of static {STATIC} bits in [{lowest:.3f}, {highest:.3f}], what {self.least} and {self.most} bits cost"
            raise SettingError("LearnedPrecision", "cost", got=self.cost, rule=rule)

    def planned(self, step: int, steps: int) -> float:
        """Return the share of static 8 bits that a step is planned to cost, at the ranks that training begins with."""
        low, high = self._share(self.least), self._share(self.most)
        mean = max(low, MARGIN * self.cost)
        rise = min(self.rise, 2 * (high - mean) / (high - low)) if high > low else 0.0
        level = (mean - 0.5 * rise * low) / (1 - 0.5 * rise)
        done = (step + 0.5) / steps
        return low + (level - low) * min(1.0, done / rise) if rise else level

    def start(self, model: nn.Module, inputs: Any, steps: int) -> dict[str, Any]:
        """Return the memory before the first step: the bits that cost what is planned, the same everywhere, see `Course`."""
        memory = super().start(model, inputs, steps) | {"planned": 0.0, "slopes": {}, "learned": 0, "values": {}}
        macs = np.array(list(memory["macs"].values()))
        values = self._shifted(np.full(len(macs), float(self.least)), macs, self._goal(0, steps, memory), self.most)
        return memory | {"values": dict(zip(memory["macs"], values.tolist(), strict=True))}

    def noted(self, memory: Mapping[str, Any]) -> dict[str, float]:
        """Return what the log of an epoch gets: costs so far, and the bits that were learned, rounded."""
        return super().noted({**memory, "bits": _rounded(memory["values"])})

    def _share(self, bits: int) -> float:
        return float(bit_operations(1.0, bits, self.gradient_bits) / bit_operations(1.0, STATIC, STATIC))

    def _goal(self, step: int, steps: int, memory: Mapping[str, Any]) -> float:
        """Return the bit operations that a step shall cost: those planned, and what earlier steps left or took too early."""
        late = memory["planned"] - memory["bit_operations"]
        return float(memory["reference"] * self.planned(step, steps) + late / max(1.0, HORIZON * steps))

    def _shifted(self, values: Vector, macs: Vector, goal: float, most: int) -> Vector:
        return shifted_to(values, goal, macs, (self.least, most), self.gradient_bits)

    def _whole(self, values: Vector, macs: Vector, goal: float) -> Vector:
        """Return whole bits, each rounded up that the goal has room for, those nearest to it first."""
        found = np.maximum(np.floor(values), self.least)
        for index in np.argsort(found - values, kind="stable"):
            raised = found + (np.arange(len(found)) == index)
            if values[index] > found[index] and bit_operations(macs, raised, self.gradient_bits).sum() <= goal:
                found = raised
        return found

    def _most(self, macs: float, goal: float, reference: float) -> int:
        """Return the most bits of a step: those that spend the goal, from `most` on, where ranks have been cut."""
        if bit_operations(macs, STATIC, STATIC) >= CUT * reference:
            return self.most
        enough = (bits for bits in range(self.most, self.most_after_cuts) if bit_operations(macs, bits, self.gradient_bits) >= goal)
        return next(enough, self.most_after_cuts)

    def _bits(self, step: int, steps: int, memory: Mapping[str, Any]) -> dict[str, int]:
        """Round the learned bits; the least ones where what is left would not do for the steps behind this one."""
        bits, macs = _rounded(memory["values"]), memory["macs"]
        wanted = sum(bit_operations(macs[name], b, self.gradient_bits) for name, b in bits.items())
        rest = (steps - step - 1) * bit_operations(sum(macs.values()), self.least, self.gradient_bits)
        left = self.cost * steps * memory["reference"] - memory["bit_operations"]
        return bits if wanted + rest <= left else dict.fromkeys(bits, self.least)

    def _learn(self, slopes: Mapping[str, float], step: int, steps: int, memory: dict[str, Any]) -> None:
        """Move the bits toward equal gains, then to the cost of the next step."""
        memory["planned"] += memory["reference"] * self.planned(step, steps)
        names = list(memory["values"])
        values, macs = (np.array([memory[key][name] for name in names]) for key in ("values", "macs"))
        goal = self._goal(step + 1, steps, memory)
        if step + 1 >= (1 - self.settle) * steps:
            if not all(value.is_integer() for value in memory["values"].values()):
                left = (self.cost * steps * memory["reference"] - memory["bit_operations"]) / max(1, steps - step - 1)
                memory["values"] = dict(zip(names, self._whole(values, macs, min(left, goal)).tolist(), strict=True))
            return
        most = self._most(float(macs.sum()), goal, memory["reference"])
        if slopes and all(math.isfinite(slope) for slope in slopes.values()):
            held = memory["slopes"]
            memory["slopes"] = {name: MEMORY * held.get(name, 0.0) + (1 - MEMORY) * slopes[name] for name in names}
            memory["learned"] += 1
        if memory["learned"]:
            gains = -np.array([memory["slopes"][name] for name in names]) / (macs * 2 * (values + self.gradient_bits))
            equal = values + 0.5 * np.log2(np.maximum(gains, max(FAINT * float(gains.max()), np.finfo(np.float64).tiny)))
            values = values + self.rate * (self._shifted(equal, macs, goal, most) - values)
        memory["values"] = dict(zip(names, self._shifted(values, macs, goal, most).tolist(), strict=True))


def _rounded(values: Mapping[str, float]) -> dict[str, int]:
    return {name: math.floor(value + 0.5) for name, value in values.items()}
