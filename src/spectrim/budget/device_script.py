"""Times a network's layers in ONNX Runtime on this device: ``python KIT.pyz TABLE.json``; needs Python, numpy and onnxruntime alone.

`spectrim.budget.device.latency_kit` puts this file and what it times into one archive, which Python runs; spectrim is not imported.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import time
import zipfile
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROUNDS, BLOCK_S = 200, 1e-3  # over all forms of a layer, at most; of calls that are timed together


def session(graph: bytes, threads: int) -> Callable[[Any], Any]:
    """Return a function that runs a graph on some inputs once."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    return partial(onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]).run, None)


def quartiles(calls: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Return the lower quartile of the time of each call, taken in turns, forwards and backwards, in about so many seconds."""
    numbers = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        numbers.append(max(1, int(BLOCK_S / max(time.perf_counter() - start, 1e-9))))
    rounds: list[list[float]] = []
    begun = time.perf_counter()
    while len(rounds) < 3 or (len(rounds) < ROUNDS and time.perf_counter() - begun < seconds):
        taken = [0.0] * len(calls)
        for place in list(range(len(calls)))[:: -1 if len(rounds) % 2 else 1]:
            start = time.perf_counter()
            for _ in range(numbers[place]):
                calls[place]()
            taken[place] = (time.perf_counter() - start) / numbers[place]
        rounds.append(taken)
    return [float(value) for value in np.quantile(np.asarray(rounds), 0.25, axis=0)]


def processor() -> str:
    """Return the name of the processor."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        for key in ("model name", "Model", "Hardware"):
            if named.get(key):
                return named[key]
    return platform.processor() or platform.machine()


def time_operation(kit: zipfile.ZipFile, operation: dict[str, Any], threads: int, seconds: float) -> dict[str, Any]:
    """Return the seconds of one layer, dense and as a pair of each rank."""
    x = np.random.default_rng(0).standard_normal(operation["shape"]).astype(operation["dtype"])
    runs = [partial(session(kit.read(graph), threads), {"x": x}) for graph in operation["graphs"]]
    dense, *pairs = quartiles(runs, seconds)
    return {"dense_s": dense, "ranks": operation["ranks"], "pair_s": pairs}


def write(path: str, content: dict[str, Any]) -> None:
    """Write JSON with a digest of what it holds, as a whole."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(dict(content, sha256=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()), file, indent=1)
    os.replace(path + ".tmp", path)


def measured(kit: zipfile.ZipFile, questions: dict[str, Any], path: str, threads: int, seconds: float) -> None:
    """Time all layers and the network; write the table. What is in the table at `path`, of a run that was stopped, is not timed again."""
    machine = {"system": platform.system() + " " + platform.machine(), "cpu": processor(), "cores": str(os.cpu_count())}
    machine["onnxruntime"] = onnxruntime.__version__
    table: dict[str, Any] = {"backend": "onnx", "threads": threads, "machine": machine, "timings": {}, "dense_s": None}
    table.update({key: questions[key] for key in ("weights", "margin", "dense_untimed")})
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            before = json.load(file)
        if all(before.get(key) == table[key] for key in ("threads", "machine", "weights")):
            table["timings"] = before["timings"]
    for number, operation in enumerate(questions["operations"]):
        key = operation["key"]
        if key not in table["timings"]:
            table["timings"][key] = time_operation(kit, operation, threads, seconds)
            write(path, table)
        print(f"{number + 1} of {len(questions['operations'])}  {1e3 * table['timings'][key]['dense_s']:.3f} ms  {key}", flush=True)
    if questions["network"]:
        feed = dict(np.load(io.BytesIO(kit.read("inputs.npz"))))
        table["dense_s"] = quartiles([partial(session(kit.read(questions["network"]), threads), feed)], seconds)[0]
        print(f"the dense network: {1e3 * table['dense_s']:.3f} ms")
    write(path, table)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, measure, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", help="the JSON file to write; carry it back")
    for name, kind, what in (("threads", int, "CPU threads"), ("seconds", float, "time for each layer")):
        parser.add_argument(f"--{name}", type=kind, help=f"{what} (default: as the kit says)")
    given = parser.parse_args(argv)
    with zipfile.ZipFile(os.path.dirname(os.path.abspath(__file__))) as kit:  # the archive that runs
        questions = json.loads(kit.read("questions.json"))
        measured(kit, questions, given.table, given.threads or questions["threads"], given.seconds or questions["time_box"])
    print("written: " + given.table)


if __name__ == "__main__":
    main()
