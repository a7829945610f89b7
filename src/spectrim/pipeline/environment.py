"""What a result depends on beside its settings."""

import os
import platform
from importlib.metadata import version
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Return what a result depends on beside its settings."""
    names = ("spectrim", "torch", "numpy", "accelerate")
    return {
        "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
