"""`Device`: the memristors of a crossbar, how exactly they hold a level, and its converters."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.errors import SettingError


@dataclass(frozen=True)
class Device:
    """One kind of cell, with what makes it differ from its nominal conductance; all deviations are off by default.

    Args:
        bits: of one cell, in [1, 8]: it has ``2^bits`` levels, evenly spaced in conductance.
        g_min: conductance of the lowest level, in microsiemens, >= 0.
        g_max: of the highest level, in microsiemens, > `g_min`.
        programming: standard deviation of ``log(G / nominal)``, >= 0: what writing a cell leaves.
        level_noise: standard deviation of an added error, in steps between two levels, >= 0.
        stuck_low: share of cells that always have `g_min`, in [0, 1].
        stuck_high: share of cells that always have `g_max`, in [0, 1]; at most 1 together.
        drift: exponent ``nu`` of ``G(t) = G (t / t0)^-nu``, >= 0.
        time: ``t / t0``, >= 1.
        read_noise: standard deviation of each read, relative to the conductance, >= 0; drawn anew in each forward pass.
        input_bits: of the converters at the rows; 32 for exact inputs.
        output_bits: of the converters at the columns, for each tile; 32 for exact sums.

    Raises:
        SettingError: for a value outside its range.

    Examples:
        >>> Device(bits=2, g_min=0.1, g_max=1.0).nominal(torch.tensor([0, 1, 3]))
        tensor([0.1000, 0.4000, 1.0000])

    Source: the kinds of deviation: He et al. (PytorX), DAC 2019, and Joshi et al., arXiv 1906.03138 (drift).
    """

    bits: int = 4
    g_min: float = 0.1
    g_max: float = 1.0
    programming: float = 0.0
    level_noise: float = 0.0
    stuck_low: float = 0.0
    stuck_high: float = 0.0
    drift: float = 0.0
    time: float = 1.0
    read_noise: float = 0.0
    input_bits: int = 32
    output_bits: int = 32

    def __post_init__(self) -> None:
        for name, least, most in (("bits", 1, 8), ("input_bits", 1, 32), ("output_bits", 1, 32)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise SettingError("Device", name, got=value, rule=f"an integer in [{least}, {most}]")
        for name in ("g_min", "programming", "level_noise", "stuck_low", "stuck_high", "drift", "read_noise"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise SettingError("Device", name, got=value, rule="a number >= 0")
        if not self.g_max > self.g_min:
            raise SettingError("Device", "g_max", got=self.g_max, rule=f"more than g_min={self.g_min:g} microsiemens")
        if self.stuck_low + self.stuck_high > 1:
            raise SettingError("Device", "stuck_low + stuck_high", got=self.stuck_low + self.stuck_high, rule="at most 1")
        if self.time < 1:
            raise SettingError("Device", "time", got=self.time, rule="t / t0 >= 1")

    @property
    def step(self) -> float:
        """Conductance between two levels, in microsiemens."""
        return (self.g_max - self.g_min) / float(2**self.bits - 1)

    def nominal(self, levels: Tensor) -> Tensor:
        """Return the conductances of levels 0 to ``2^bits - 1``, in microsiemens."""
        return self.g_min + levels * self.step

    def programmed(self, levels: Tensor, generator: torch.Generator) -> Tensor:
        """Return the conductances of cells after writing and waiting, in microsiemens: one draw.

        Args:
            levels: whole numbers from 0 to ``2^bits - 1``.
            generator: of the draw.
        """
        held = self.nominal(levels.double())
        if self.programming:
            held = held * torch.exp(self.programming * _normal(held, generator))
        if self.level_noise:
            held = held + self.level_noise * self.step * _normal(held, generator)
        held = held.clamp(min=0.0) * self.time**-self.drift
        if self.stuck_low or self.stuck_high:
            place = torch.rand(held.shape, generator=generator, dtype=torch.float64)
            held = torch.where(place < self.stuck_low, self.g_min, held)
            held = torch.where(place >= 1 - self.stuck_high, self.g_max, held)
        return held


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)


PRESETS: dict[str, Device] = {
    "ideal": Device(),
    "ReRam": Device(bits=4, g_min=0.1, g_max=1.0, programming=0.1),
    "ReRam, worn": Device(bits=4, g_min=0.1, g_max=1.0, programming=0.1, stuck_low=0.01, stuck_high=0.001),
    "PCM": Device(bits=4, g_min=0.1, g_max=25.0, level_noise=1 / 3, drift=0.05, time=86_400.0),
}
"""Devices by the field's names.

ReRam: 1 to 10 megohms and 4 bits as in Yuan et al., ISLPED 2019 (read in a second-hand account); the deviation of 0.1 and the shares of
stuck cells are assumptions. PCM: 25 microsiemens and an exponent of about 0.05 as in Joshi et al., arXiv 1906.03138; a day after t0 = 1 s;
the deviation of a third of a level is PytorX's.
"""
