"""Simulated analog crossbars: devices, mapping to tiles, prices, and accuracy over draws of a device."""

from spectrim.runtimes.crossbar.crossbars import Crossbars
from spectrim.runtimes.crossbar.device import PRESETS, Device
from spectrim.runtimes.crossbar.draws import Draws, monte_carlo
from spectrim.runtimes.crossbar.layers import on_crossbars
from spectrim.runtimes.crossbar.mapping import Mapping
from spectrim.runtimes.crossbar.prices import CrossbarPrice, Peripherals, price_on_crossbars

__all__ = [
    "PRESETS",
    "CrossbarPrice",
    "Crossbars",
    "Device",
    "Draws",
    "Mapping",
    "Peripherals",
    "monte_carlo",
    "on_crossbars",
    "price_on_crossbars",
]
