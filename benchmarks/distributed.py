"""Train the same networks on one process, on two with DDP and on two with FSDP2, and compare losses, weights and ranks.

``python benchmarks/distributed.py`` writes ``benchmarks/results/distributed/digits/*.json`` and the table in ``docs/howto/many-gpus.md``;
``--render`` writes the table alone, ``--check`` compares it.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import spectrim as sp
from spectrim import zoo
from spectrim.layers.sharded import gathered

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results" / "distributed" / "digits", HERE.parent / "docs" / "howto" / "many-gpus.md"
BEGIN, END = "<!-- begin: benchmarks/distributed.py -->\n", "<!-- end: benchmarks/distributed.py -->\n"
MODES = {"one": "one process", "ddp": "DDP, 2 processes", "fsdp2": "FSDP2, 2 processes"}
PROCESSES, BATCH, EPOCHS, EXAMPLES = 2, 64, 3, 1024
SETTINGS = {
    "batch": BATCH,
    "epochs": EPOCHS,
    "examples": EXAMPLES,
    "penalties": "Orthogonality(1.0), Hoyer(0.02)",
    "optimizer": "SGD, momentum",
}


def dense(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10))
    first, second = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3, groups=2)
    return nn.Sequential(first, nn.GroupNorm(4, 16), nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


def batches(given: zoo.Batches, dtype: torch.dtype, processes: int) -> DataLoader[Any]:
    x, y = (torch.cat(parts)[:EXAMPLES] for parts in zip(*given, strict=True))
    data = TensorDataset(x.to(dtype), y)
    return DataLoader(data, BATCH // processes, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(0)))


def run(mode: str, name: str, dtype: torch.dtype, ramp: bool) -> dict[str, Any]:
    """Train one network; the returned weights are whole."""
    processes = 1 if mode == "one" else PROCESSES
    low = sp.factorize(dense(name).to(dtype), where=sp.match("*"))
    if mode == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (PROCESSES,))
        for layer in low[:-1]:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(low, mesh=mesh)
    data = zoo.digits(batch_size=BATCH)
    schedule = sp.Ramp(sp.Budget(macs=0.5), end=0.5, cuts=3)
    history = sp.fit(
        low,
        batches(data.train, dtype, processes),
        nn.CrossEntropyLoss(),
        torch.optim.SGD(low.parameters(), 0.05, momentum=0.9),
        EPOCHS,
        penalties=[sp.Orthogonality(1.0), sp.Hoyer(0.02)],
        eval_data=[(x.to(dtype), y) for x, y in data.val],
        courses=[schedule] if ramp else [],
        progress=False,
    )
    keys = ("loss", "Orthogonality", "Hoyer", "eval_loss", "eval_accuracy")
    weights = {key: tensor.clone() for key, tensor in gathered(low).state_dict().items()}
    return {
        "epochs": [{key: line[key] for key in keys} for line in history.epochs],
        "ranks": history.layers[-1]["ranks"],
        "weights": weights,
    }


def cases(mode: str) -> dict[str, tuple[str, torch.dtype, bool]]:
    """Name every training: network, precision and whether ranks are cut on the way, which FSDP2 refuses."""
    found = {f"{name}, {str(dtype)[6:]}": (name, dtype, False) for name in ("mlp", "conv") for dtype in (torch.float32, torch.float64)}
    return found | ({} if mode == "fsdp2" else {"mlp, float64, ranks cut": ("mlp", torch.float64, True)})


def work(mode: str, folder: Path) -> None:
    torch.set_num_threads(1)
    main = True
    if mode != "one":
        from accelerate import Accelerator

        main = Accelerator(cpu=True).is_main_process
    found = {case: run(mode, *settings) for case, settings in cases(mode).items()}
    if main:
        torch.save(found, folder / f"{mode}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def compared(found: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    """Return the losses and the largest differences to one process."""
    differences = [max(abs(ours[key] - theirs[key]) for key in ours) for ours, theirs in zip(found["epochs"], one["epochs"], strict=True)]
    weights = max(float((found["weights"][key] - one["weights"][key]).abs().max()) for key in one["weights"])
    return {"epochs": found["epochs"], "ranks": found["ranks"], "difference": {"of each epoch": differences, "weights": weights}}


def measure() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for mode in MODES:
            several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
            start = [sys.executable, *([] if mode == "one" else several)]
            subprocess.run([*start, __file__, "--worker", mode, name], env=environment, check=True)
            found[mode] = torch.load(Path(name) / f"{mode}.pt", weights_only=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    versions = {package: version(package) for package in ("spectrim", "torch", "accelerate")}
    for mode, runs in found.items():
        result = {
            "mode": mode,
            "processes": 1 if mode == "one" else PROCESSES,
            "backend": "none" if mode == "one" else "gloo",
            "settings": SETTINGS,
            "versions": versions,
            "machine": platform.machine(),
            "runs": {case: compared(run, found["one"][case]) for case, run in runs.items()},
        }
        (RESULTS / f"{mode}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table() -> str:
    results = {mode: json.loads((RESULTS / f"{mode}.json").read_text(encoding="utf-8")) for mode in MODES}
    lines = ["| network | | training loss | accuracy | losses differ by | weights differ by |", "|---|---|---:|---:|---:|---:|"]
    for case in results["one"]["runs"]:
        for mode, title in MODES.items():
            run = results[mode]["runs"].get(case)
            if run is None:
                continue
            last, difference = run["epochs"][-1], run["difference"]
            apart = ["", ""] if mode == "one" else [f"{max(difference['of each epoch']):.0e}", f"{difference['weights']:.0e}"]
            if run["ranks"] != results["one"]["runs"][case]["ranks"]:
                apart[1] = "other ranks"
            row = [case, title, f"{last['loss']:.6f}", f"{100 * last['eval_accuracy']:.2f} %", *apart]
            lines.append("| " + " | ".join(row) + " |")
    own = results["one"]
    return "\n".join(lines) + f"\n\n*CPU, gloo, torch {own['versions']['torch']}, accelerate {own['versions']['accelerate']}.*\n"


def render() -> str:
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return head + BEGIN + table() + END + rest.split(END)[1]


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], Path(sys.argv[3]))
        return
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != render():
            sys.exit(f"{PAGE}: not up to date; run python benchmarks/distributed.py --render")
        return
    if sys.argv[1:] != ["--render"]:
        measure()
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
