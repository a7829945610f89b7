"""Starting ranks by a weight decay beside ranks allocated at equal numbers, and alignment of neighboring layers; two minutes of one core.

python benchmarks/analysis/starting_ranks.py    # writes benchmarks/results/analysis/starting_ranks.json
"""

import statistics
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as sp
from common import SEEDS, write
from spectrim import zoo
from spectrim.analysis.duality import alignment, output_spectra, suggest_ranks
from spectrim.budget.distortion import WhitenedEnergy

IMAGES, TEST, EPOCHS, TUNE, HIDDEN = 4000, 2000, 20, 3, 256
DECAYS, TRAINED_DECAYS = (0.01, 0.03, 0.1, 0.3), (0.0, 1e-3)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).double().mean())


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def mean_alignment(model: nn.Module) -> float:
    return statistics.mean(alignment(model).values())


def tuned(model: nn.Module, data: Any, seed: int, epochs: int, rate: float, decay: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=decay / rate if decay else 0.0)
    sp.fit(model, data, nn.CrossEntropyLoss(), optimizer, epochs, progress=False)
    return model


def rows(seed: int, x: Tensor, y: Tensor, tx: Tensor, ty: Tensor) -> list[dict[str, Any]]:
    """Train a network with and without weight decay, then cut it by each decay, and by an allocation of as many numbers."""
    data, made = list(zip(x.split(64), y.split(64), strict=True)), []
    for trained in TRAINED_DECAYS:
        torch.manual_seed(seed)
        layers = [nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()]
        dense = nn.Sequential(*layers, nn.Linear(HIDDEN, 10))
        first = mean_alignment(dense)
        tuned(dense, data, seed, EPOCHS, 1e-3, trained)
        low = sp.factorize(dense)
        calibration = sp.calibrate(low, data)
        spectra = output_spectra(low, calibration)
        row: dict[str, Any] = {"seed": seed, "decay_trained": trained, "numbers": numbers(dense), "accuracy": accuracy(dense, tx, ty)}
        row |= {"alignment_at_start": first, "alignment": mean_alignment(dense), "cuts": []}
        for decay in DECAYS:
            ranks = suggest_ranks(spectra, decay)
            suggested = sp.prune(low, ranks, calibration=calibration)
            count = numbers(sp.merge(suggested))
            budget = sp.Budget(params=count / row["numbers"])
            other = sp.prune(low, sp.allocate(low, budget, x[:1], importance=WhitenedEnergy(calibration)), calibration=calibration)
            cut: dict[str, Any] = {"decay": decay, "ranks": list(ranks.values()), "numbers": count, "alignment": mean_alignment(suggested)}
            for name, model in (("suggested", suggested), ("allocated", other)):
                before = accuracy(model, tx, ty)
                after = accuracy(tuned(model, data, seed, TUNE, 3e-4), tx, ty)
                cut[name] = {"cut": before, "tuned": after, "numbers": numbers(sp.merge(model))}
            row["cuts"].append(cut)
        made.append(row)
    return made


def main() -> None:
    loaders = zoo.mnist(batch_size=IMAGES)
    (x, y), (tx, ty) = next(iter(loaders.train)), next(iter(loaders.test))
    found: list[dict[str, Any]] = []
    for seed in SEEDS:
        found += rows(seed, x.flatten(1), y, tx[:TEST].flatten(1), ty[:TEST])
        settings = {"images": IMAGES, "test": TEST, "epochs": EPOCHS, "tune": TUNE, "hidden": HIDDEN}
        write("starting_ranks", {"settings": settings, "rows": found})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
