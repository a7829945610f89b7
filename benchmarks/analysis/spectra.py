"""Convolution spectra: how exact, how fast, and Lipschitz bounds before and after compression; two minutes of one core.

python benchmarks/analysis/spectra.py    # writes benchmarks/results/analysis/spectra.json
"""

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import spectrim as sp
from common import SEEDS, write
from spectrim import zoo
from spectrim.analysis.conv_spectra import conv_singular_values, spectral_norm_bound
from spectrim.analysis.lipschitz import lipschitz_bound, lipschitz_lower
from spectrim.analysis.norm_limits import limit_norm

CASES: list[dict[str, Any]] = [
    {"padding": 1},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": 1},
    {"padding": 1, "groups": 2},
    {"padding": 2, "dilation": 2},
]
KERNELS, SIZES = 40, (8, 12, 16)
BUDGETS = (0.75, 0.5, 0.33)
TEST, NEAR = 1000, 32
LIMIT, EPOCHS, RADII, SHARPNESS = 1.0, 15, (0.1, 0.25, 0.5), 8.0


def seconds() -> float:
    return time.process_time()


def written_out(layer: nn.Module, channels: int, size: int) -> Tensor:
    """Return the singular values of the operator, by torch's own layer on unit vectors."""
    units = torch.eye(channels * size**2, dtype=torch.float64).reshape(-1, channels, size, size)
    with torch.no_grad():
        return torch.linalg.svdvals(layer(units).flatten(1))


def exactness() -> list[dict[str, Any]]:
    """Compare with the operator written out, sizes to 12, and the bound with the largest value over random kernels."""
    rows = []
    for settings in CASES:
        for mode in ("zeros", "circular"):
            error, ratios = 0.0, []
            for seed in range(KERNELS):
                torch.manual_seed(seed)
                layer = nn.Conv2d(4, 6, 3, padding_mode=mode, bias=False, **settings).double()
                size = (6, 8, 12)[seed % 3]
                true = written_out(layer, 4, size)
                error = max(error, float((conv_singular_values(layer, size) - true).abs().max()))
                ratios.append(spectral_norm_bound(layer) / float(true[0]))
            rows.append(
                {"settings": settings, "mode": mode, "error": error, "least_bound": min(ratios), "largest_bound": max(ratios)}
            )  # over the true norm
    return rows


def approximation() -> list[dict[str, Any]]:
    """Compare the spectra of both approximations with the exact one, random 4 x 3 x 3 x 3 kernels, zero padding."""
    rows = []
    for size in SIZES:
        errors: dict[str, list[float]] = {"circular": [], "symbol": []}
        for seed in SEEDS:
            torch.manual_seed(seed)
            kernel = torch.randn(4, 3, 3, 3)
            exact = conv_singular_values(kernel, size)
            for method, found in errors.items():
                found.append(float((conv_singular_values(kernel, size, method) - exact).norm() / exact.norm()))
        rows.append({"size": size, **errors})
    return rows


def shapes(model: nn.Module, x: Tensor) -> dict[str, int]:
    found: dict[str, int] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0].shape[-1]}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


def whole_spectrum() -> dict[str, Any]:
    """Time all singular values of all convolutions of ResNet-20 at 32 x 32."""
    model = zoo.resnet20(pretrained="akamaster")
    sizes = shapes(model, torch.zeros(1, 3, 32, 32))
    made: dict[str, Any] = {"layers": len(sizes)}
    for method in ("circular", "symbol"):
        start = seconds()
        made["values"] = sum(len(conv_singular_values(model.get_submodule(name), size, method)) for name, size in sizes.items())
        made[f"{method}_s"] = seconds() - start
    start = seconds()
    folded, operator = {}, {}
    for name in sizes:
        layer = model.get_submodule(name)
        folded[name] = float(torch.linalg.matrix_norm(layer.weight.detach().double().flatten(1), 2))
        operator[name] = spectral_norm_bound(layer)
    ratios = [operator[name] / folded[name] for name in sizes]
    return made | {"bounds_s": seconds() - start, "operator_over_folded": [min(ratios), max(ratios)]}


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).double().mean())


def low_rank(model: nn.Module, budget: float, x: Tensor) -> nn.Module:
    """Cut by the knapsack over spectral energy, merge; nothing is trained."""
    low = sp.factorize(model)
    return sp.merge(sp.prune(low, sp.allocate(low, sp.Budget(macs=budget), x[:1])))


def resnet20() -> dict[str, Any]:
    """Bound ResNet-20 and its low-rank versions; layers by name."""
    data = zoo.cifar10(batch_size=TEST, augment=False)
    x, y = next(iter(data.test))
    dense = zoo.resnet20(pretrained="akamaster").eval()
    rows = []
    for budget in (None, *BUDGETS):
        model = dense if budget is None else low_rank(dense, budget, x)
        start = seconds()
        made = lipschitz_bound(model, x)
        row = {"macs": budget or 1.0, "bound": made.bound, "bound_s": seconds() - start, "lower": lipschitz_lower(model, x[:NEAR])}
        rows.append(row | {"accuracy": accuracy(model, x, y), "layers": {one.name: one.norm for one in made.layers}})
    return {"examples": TEST, "near": NEAR, "rows": rows}


def small_network(limit: float | None) -> nn.Sequential:
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, padding=1), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
    for layer in model:
        if limit is not None and hasattr(layer, "weight"):
            limit_norm(layer, limit, grid=16)
    return model


def digits() -> list[dict[str, Any]]:
    """Train with and without limits on digits, compress, and certify the test split."""
    loss = nn.CrossEntropyLoss()
    rows = []
    for seed in SEEDS:
        data = zoo.digits(seed=seed)
        x, y = (torch.cat(part) for part in zip(*data.test, strict=True))
        for limit in (None, LIMIT):
            torch.manual_seed(seed)
            model = small_network(limit)
            sharp = 1.0 if limit is None else SHARPNESS  # logits of a network of slope one are close to each other
            optimizer = torch.optim.Adam(model.parameters(), 2e-3)
            sp.fit(model, data.train, lambda out, target, sharp=sharp: loss(sharp * out, target), optimizer, EPOCHS, progress=False)
            for layer in model:
                if parametrize.is_parametrized(layer):
                    parametrize.remove_parametrizations(layer, "weight")
            for budget in (None, 0.5):
                made = model if budget is None else low_rank(model, budget, x)
                bounded = lipschitz_bound(made, x)
                with torch.no_grad():
                    radii = bounded.radius(made(x), y)
                certified = {f"{radius:g}": float((radii > radius).double().mean()) for radius in RADII}
                row = {"seed": seed, "limit": limit, "macs": budget or 1.0, "bound": bounded.bound, "certified": certified}
                rows.append(row | {"lower": lipschitz_lower(made, x[:NEAR]), "accuracy": accuracy(made, x, y)})
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts = {"exactness": exactness, "approximation": approximation, "resnet20_spectrum": whole_spectrum, "resnet20": resnet20}
    parts |= {"digits": digits}
    write("spectra", {"seconds": "processor time of one thread"} | {name: part() for name, part in parts.items()})
