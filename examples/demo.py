"""The demo: one small network, two budgets, two baselines, one ONNX file, one table, one verdict. About a minute on two cores.

Every low-rank network gets the same fine-tuning: four epochs with the same optimizer. The validation split makes every choice; accuracies
are on the test split, which is read once.
"""

import time
from pathlib import Path

import torch
from torch import nn

import spectrim as sp
from spectrim import zoo
from spectrim.errors import ExportError
from spectrim.metrics.measurement import Measurement, measure_together
from spectrim.metrics.table import markdown_table
from spectrim.metrics.verdict import accuracy_error, verdict

EPOCHS, SEED = 4, 0
OUT = Path("runs/demo")


def trained(model: nn.Module, data: zoo.Splits, epochs: int, penalties: list[sp.Hoyer | sp.Orthogonality], rate: float) -> nn.Module:
    """Train in place: SGD whose rate rises and falls once."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=0.0 if penalties else 5e-4)

    def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)

    tuning = sp.Tuning(scheduler=one_cycle, scheduler_steps="batch")
    sp.fit(model, data.train, nn.CrossEntropyLoss(), optimizer, epochs, penalties=penalties, tuning=tuning, progress=False)
    return model


def cut(low: nn.Module, data: zoo.Splits, budget: float, x: torch.Tensor) -> nn.Module:
    """Cut a factorized network to a budget by its singular values, and renew BatchNorm statistics."""
    made = sp.prune(low, sp.allocate(low, sp.Budget(macs=budget), x))
    sp.recalibrate(made, data.train)
    return made


def table(measured: dict[str, Measurement]) -> str:
    """Return one row for each network."""
    dense = measured["dense"]
    rows = []
    for name, found in measured.items():
        told = verdict(dense, found)
        words = "" if found is dense else f"{told.quality.split(' (')[0].lower()}, {told.speed.split(' (')[0].lower()}"
        accuracy = f"{100 * (found.accuracy or 0):.1f} ± {100 * (accuracy_error(found) or 0):.1f} %"
        costs = (f"{(found.macs or 0) / 1e6:.2f} M", f"{found.size_bytes / 2**20:.2f} MiB", f"{1e3 * (found.latency_s or 0):.2f} ms")
        rows.append([name, accuracy, *costs, words])
    return markdown_table(rows, ["", "accuracy", "MACs", "size", "latency", "beside dense"])


def main() -> None:
    """Train, compress, compare, export."""
    start = time.perf_counter()
    torch.manual_seed(SEED)
    data, loss = zoo.digits(), nn.CrossEntropyLoss()
    x = next(iter(data.val))[0][:1]
    print("training a small VGG on 8x8 digits", flush=True)
    dense = trained(zoo.vgg_small(in_channels=1), data, 6, [], 0.1)
    networks = {"dense": dense}
    for budget in (0.5, 0.25):
        print(f"compress to {100 * budget:.0f} % of the multiply-accumulates, {EPOCHS} epochs", flush=True)
        made = sp.compress(dense, data.train, loss, sp.Budget(macs=budget), EPOCHS, eval_data=data.val, progress=False)
        networks[f"compress {100 * budget:.0f} %"] = made.model
    print("the baselines at 25 %: truncated SVD, and SVD training from the same network", flush=True)
    truncated = trained(cut(sp.factorize(dense), data, 0.25, x), data, EPOCHS, [], 0.02)
    networks["truncated SVD 25 %"] = sp.merge(truncated)
    low = trained(sp.factorize(dense), data, EPOCHS // 2, [sp.Orthogonality(1.0), sp.Hoyer(0.05)], 0.02)
    networks["SVD training 25 %"] = sp.merge(trained(cut(low, data, 0.25, x), data, EPOCHS // 2, [sp.Orthogonality(1.0)], 0.02))

    measured = measure_together(networks, x, data.test, loss)
    print(f"\n{table(measured)}\n")
    for name in ("compress 50 %", "compress 25 %"):
        print(f"{name}: {verdict(measured['dense'], measured[name], trained=True, split='test split')}\n")
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        made_file = sp.export(networks["compress 25 %"], x, OUT / "compress-25.onnx", progress=False)
        print(f"{made_file.path}: ONNX, its outputs compared with the network's: largest difference {made_file.difference:.1e}")
    except (ImportError, ExportError) as error:
        print(f"no ONNX file: {error}")
    print(f"done in {time.perf_counter() - start:.0f} s; seed {SEED}, one run: differences between methods here are an example, no proof")


if __name__ == "__main__":
    main()
