"""What every measurement shares: turns, barriers, medians with spread, peak memory, and the file that is written."""

import gc
import io
import json
import os
import platform
import random
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "micro" / "results"
Step = Callable[[], Any]


def session_of(model: torch.nn.Module, arguments: tuple[Any, ...]) -> Any:
    """Export with torch's exporter and open in ONNX Runtime on one thread."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, arguments, dynamo=True, verbose=False)
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])


def barrier() -> None:
    """Wait for the device: on a GPU a kernel that was only started has not run yet."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(steps: Mapping[str, Step], *, rounds: int = 5, min_time: float = 0.2, warmup: int = 2) -> dict[str, list[float]]:
    """Time all steps in turns, each round in another order, so that whatever slows the machine down meets them all.

    Returns:
        For each step, one median of seconds a round.
    """
    counts = {}
    for name, step in steps.items():
        for _ in range(warmup):
            step()
        start = time.perf_counter()
        step()
        barrier()
        counts[name] = max(1, round(min_time / (time.perf_counter() - start)))
    order, generator = list(steps), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            times = []
            for _ in range(counts[name]):
                barrier()
                start = time.perf_counter()
                steps[name]()
                barrier()
                times.append(time.perf_counter() - start)
            seconds[name].append(float(np.median(times)))
    return seconds


def ratios(seconds: Mapping[str, list[float]], to: str, *, speedup: bool = False) -> dict[str, dict[str, float]]:
    """Return for each step the median and quartiles, over rounds, of its seconds over those of `to` (or the inverse, a speed-up)."""
    table = {}
    for name, values in seconds.items():
        per_round = np.asarray(values) / np.asarray(seconds[to])
        low, median, high = np.quantile(1 / per_round if speedup else per_round, (0.25, 0.5, 0.75))
        table[name] = {"median": float(median), "low": float(low), "high": float(high), "seconds": float(np.median(values))}
    return table


def peak_bytes(step: Step) -> int:
    """Return how far memory rises within one step: by the allocator on a GPU, by the profiler's record of allocations on a CPU."""
    step()
    gc.collect()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max())


def environment() -> dict[str, Any]:
    """Return what the numbers depend on."""
    names = ("spectrim", "torch", "numpy", "onnxruntime")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
        "device": gpu or "cpu",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "commit": commit,
    }


def write(name: str, content: dict[str, Any]) -> None:
    """Write one result file, atomically."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"environment": environment()} | content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    print(f"written: {path.relative_to(ROOT)}", flush=True)
