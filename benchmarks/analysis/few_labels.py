"""Few labels: structured outputs with auto-encoding, and classes with invariant representations; three minutes of one core.

python benchmarks/analysis/few_labels.py    # writes benchmarks/results/analysis/few_labels.json
"""

from typing import Any

import torch
from torch import Tensor, nn

import spectrim as sp
from common import SEEDS, write
from spectrim import zoo
from spectrim.analysis.collapse import neural_collapse
from spectrim.budget.rules import Fixed
from spectrim.training.autoencoding import Autoencoding
from spectrim.training.class_invariance import ClassInvariance

PAIRS, ALONE, TEST, EPOCHS = 500, 7000, 2000, 60
LABELS, CLASS_EPOCHS = 200, 60
RANK = 16


def pixels(count: int, skip: int = 0) -> tuple[Tensor, Tensor]:
    """Return training images of MNIST with values in [0, 1], and their classes, in the fixed order of the first epoch."""
    x, y = next(iter(zoo.mnist(batch_size=skip + count).train))
    return ((x * 0.3081 + 0.1307).clamp(0, 1))[skip:], y[skip:]


def structured() -> list[dict[str, Any]]:
    """Predict the lower half of a digit from the upper half, with outputs and inputs alone or without, dense and factorized."""
    x, _ = pixels(PAIRS + ALONE + TEST)
    upper, lower = x[:, 0, :14].flatten(1), x[:, 0, 14:].flatten(1)
    paired, alone, held = slice(0, PAIRS), slice(PAIRS, PAIRS + ALONE), slice(PAIRS + ALONE, None)
    rows = []
    for seed in SEEDS:
        for low in (False, True):
            for kind in ("pairs", "and outputs", "and inputs and outputs"):
                torch.manual_seed(seed)
                layers = [
                    nn.Linear(392, 256),
                    nn.ReLU(),
                    nn.Linear(256, 128),
                    nn.ReLU(),
                    nn.Linear(128, 256),
                    nn.ReLU(),
                    nn.Linear(256, 392),
                ]
                model: Any = nn.Sequential(*layers)
                if low:
                    model = sp.prune(sp.factorize(model, where=sp.match("*")), Fixed(RANK))
                into, out = nn.Sequential(nn.Linear(392, 256), nn.ReLU(), nn.Linear(256, 128)), nn.Linear(128, 392)
                lessons = [Autoencoding(into, model[4:], lower[alone], 0.5, corruption=0.1)] if kind != "pairs" else []
                lessons += [Autoencoding(model[:3], out, upper[alone], 0.25, corruption=0.1)] if kind.startswith("and inputs") else []
                parameters = [*model.parameters(), *into.parameters(), *out.parameters()]
                optimizer = torch.optim.Adam(parameters, 1e-3)
                pairs = torch.utils.data.TensorDataset(upper[paired], lower[paired])
                data = torch.utils.data.DataLoader(pairs, 50, shuffle=True)
                tuning = sp.Tuning(keep_best=True)
                held_data = list(zip(upper[held].split(1000), lower[held].split(1000), strict=True))
                validation, test = held_data[:1], held_data[1:]
                sp.fit(model, data, nn.MSELoss(), optimizer, EPOCHS, tuning=tuning, eval_data=validation, lessons=lessons, progress=False)
                rows.append({"seed": seed, "low_rank": low, "data": kind, "mse": sp.evaluate(model, test, nn.MSELoss())["loss"]})
    return rows


def classes() -> list[dict[str, Any]]:
    """Train a classifier on few labels with and without the lesson."""
    test = list(zoo.mnist(batch_size=2000).test)
    rows = []
    for seed in SEEDS:
        x, y = next(iter(zoo.mnist(batch_size=(seed + 1) * LABELS).train))
        x, y = x[seed * LABELS :], y[seed * LABELS :]
        for weight in (0.0, 0.1, 0.5):
            torch.manual_seed(seed)
            model = zoo.lenet5()
            data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 50, shuffle=True)
            lessons = [ClassInvariance(["fc1", "fc2"], weight)] if weight else []
            optimizer = torch.optim.Adam(model.parameters(), 1e-3)
            sp.fit(model, data, nn.CrossEntropyLoss(), optimizer, CLASS_EPOCHS, lessons=lessons, progress=False)
            measured = neural_collapse(model, [(x, y)])
            score = sp.evaluate(model, test, nn.CrossEntropyLoss())["accuracy"]
            rows.append({"seed": seed, "weight": weight, "accuracy": score, "nc1": measured.nc1, "nc4": measured.nc4})
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = {"pairs": PAIRS, "alone": ALONE, "epochs": EPOCHS, "labels": LABELS, "class_epochs": CLASS_EPOCHS, "rank": RANK}
    write("few_labels", {"settings": settings, "structured": structured(), "classes": classes()})
