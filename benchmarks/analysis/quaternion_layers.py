"""Quaternion convolutions beside real ones on color images at equal numbers, whole and cut to half; six minutes of one core.

python benchmarks/analysis/quaternion_layers.py    # writes benchmarks/results/analysis/quaternion_layers.json, row by row
python benchmarks/analysis/quaternion_layers.py --images 45000 --epochs 60    # full size; rows of other settings are made anew
"""

import argparse
import math
import time
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as sp
from common import RESULTS, SEEDS, read, write
from spectrim import zoo
from spectrim.budget.distortion import WhitenedEnergy
from spectrim.plain.quaternion import QConv2d

NETWORKS = ("quaternion", "real, equal numbers", "real, equal multiplications")
WIDTHS = (32, 64, 64)
BATCH, RATE, TEST, SHARE = 64, 2e-3, 2000, 0.5


def network(kind: str) -> nn.Sequential:
    """Return three convolutions and a linear head: of quaternions, real ones half as wide (as many numbers), or real ones as wide."""
    quaternion, half = kind == "quaternion", kind == "real, equal numbers"
    conv: Any = QConv2d if quaternion else nn.Conv2d
    a, b, c = (width // 2 if half else width for width in WIDTHS)
    blocks = [(4 if quaternion else 3, a, 2), (a, b, 2), (b, c, 1)]
    layers = [
        layer for into, out, stride in blocks for layer in (conv(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))


def images(count: int, test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training and test images as zeros, red, green and blue, and their classes."""
    data = zoo.cifar10(batch_size=max(count, test), augment=False, normalize="cifar10")
    (x, y), (tx, ty) = next(iter(data.train)), next(iter(data.test))
    return x[:count], y[:count], tx[:test], ty[:test]


def trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float, seed: int) -> float:
    """Train with Adam and a cosine schedule, flips and shifts of two pixels; return the processor seconds."""
    generator, start = torch.Generator().manual_seed(seed), time.process_time()
    optimizer = torch.optim.Adam(model.parameters(), rate)
    batches = math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH):
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            batch = torch.roll(x[chosen], shift, (2, 3))
            batch = batch.flip(3) if float(torch.rand((), generator=generator)) < 0.5 else batch
            loss = nn.functional.cross_entropy(model(batch), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    return time.process_time() - start


def measured(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Return accuracy on images, numbers and multiply-accumulates."""
    with torch.no_grad():
        right = float((model(x).argmax(1) == y).double().mean())
    macs = sp.measure(model, x[:1]).macs
    return {"accuracy": right, "numbers": sum(parameter.numel() for parameter in model.parameters()), "macs": macs}


def row(kind: str, seed: int, settings: dict[str, Any], data: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """Train one network, cut it to half its numbers by calibration, train that for a quarter of the epochs."""
    x, y, tx, ty = data if kind == "quaternion" else (data[0][:, 1:], data[1], data[2][:, 1:], data[3])
    torch.manual_seed(seed)
    model = network(kind)
    made: dict[str, Any] = {"network": kind, "seed": seed, "settings": settings}
    made["seconds"] = trained(model, x, y, settings["epochs"], RATE, seed)
    made["whole"] = measured(model, tx, ty)
    low = sp.factorize(model)
    calibration = sp.calibrate(low, [(x[:512], y[:512])])
    by = WhitenedEnergy(calibration)
    cut = sp.prune(low, sp.allocate(low, sp.Budget(params=SHARE), x[:1], importance=by), calibration=calibration)
    made["cut"] = measured(sp.merge(cut), tx, ty)
    trained(cut, x, y, max(1, settings["epochs"] // 4), RATE / 4, seed)
    made["tuned"] = measured(sp.merge(cut), tx, ty)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=10)
    chosen = parser.parse_args()
    settings = {"images": chosen.images, "epochs": chosen.epochs, "batch": BATCH, "rate": RATE, "test": TEST, "share": SHARE}
    x, y, tx, ty = images(chosen.images, TEST)
    data = (torch.cat([torch.zeros_like(x[:, :1]), x], 1), y, torch.cat([torch.zeros_like(tx[:, :1]), tx], 1), ty)
    rows = read("quaternion_layers")["rows"] if (RESULTS / "quaternion_layers.json").exists() else []
    rows = [one for one in rows if one["settings"] == settings]
    for seed in SEEDS:
        for kind in NETWORKS:
            if not any(one["network"] == kind and one["seed"] == seed for one in rows):
                rows.append(row(kind, seed, settings, data))
                write("quaternion_layers", {"settings": settings, "rows": rows})
                print(rows[-1], flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
