"""The cache of timings: one JSON file for each machine, backend and number of threads."""

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from spectrim.budget.timing import Backend, Timing, _onnxruntime
from spectrim.files import read_json, write_json


def default_cache() -> Path:
    """Return the folder for cached timings: ``$XDG_CACHE_HOME/spectrim``, or ``~/.cache/spectrim``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectrim"


def describe_machine(backend: Backend) -> dict[str, str]:
    """Return what decides how fast a layer runs: processor, cores, accelerator, versions."""
    found = {"system": f"{platform.system()} {platform.machine()}", "cpu": _processor(), "cores": str(os.cpu_count())}
    found |= {"torch": torch.__version__}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name()}
    if backend == "onnx":
        found |= {"onnxruntime": str(_onnxruntime().__version__)}
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cache_path(folder: Path, machine: Mapping[str, str], backend: Backend, threads: int) -> Path:
    """Return the file for one kind of machine, backend and number of threads."""
    text = json.dumps([FORMAT, dict(machine), backend, threads], sort_keys=True)
    return folder / f"latency-{backend}-{threads}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


FORMAT = 1


def read_timings(path: Path) -> dict[str, Timing]:
    """Return the cached timings; a file that cannot be read gives a warning and none."""
    if not path.exists():
        return {}
    try:
        return {key: timing_of(entry) for key, entry in read_json(path)["timings"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path}: damaged, its layers are timed again ({error!r})", stacklevel=3)
        return {}


def write_timings(path: Path, machine: Mapping[str, str], timings: Mapping[str, Timing]) -> None:
    """Write the timings of a machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {key: asdict(timing) for key, timing in timings.items()}
    write_json(path, {"machine": dict(machine), "timings": entries})  # another process may write it, too: the last one wins


def timing_of(entry: Mapping[str, Any]) -> Timing:
    """Return a timing from JSON; raises a TypeError or ValueError for what is none."""
    timing = Timing(float(entry["dense_s"]), tuple(map(int, entry["ranks"])), tuple(map(float, entry["pair_s"])))
    if len(timing.ranks) != len(timing.pair_s) or not all(s > 0 for s in (timing.dense_s, *timing.pair_s)):
        raise ValueError("not a timing: as many ranks as seconds, all above 0")
    return timing
