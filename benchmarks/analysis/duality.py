"""Convex duality: closed forms against gradient descent, whitened MNIST images, and the certificate of trained networks; three minutes.

python benchmarks/analysis/duality.py    # writes benchmarks/results/analysis/duality.json
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from common import SEEDS, write
from spectrim import zoo
from spectrim.analysis.convex_program import NeuronGL1, convex_optimum
from spectrim.analysis.duality import certificate, linear_optimum, rank_one_optimum, relu_optimum

STEPS = 1500


def descended(
    X: Tensor, Y: Tensor, decay: float, layers: int, relu: bool, width: int, starts: int, steps: int = STEPS
) -> tuple[float, list[Tensor]]:
    """Return the best loss of several starts of Adam with a cosine schedule, and its weights."""
    best, found = math.inf, []
    for seed in range(starts):
        torch.manual_seed(seed)
        sizes = [X.shape[1], *[width] * (layers - 1), Y.shape[1]]
        weights = [torch.randn(b, a).double().div(a**0.5).requires_grad_() for a, b in pairwise(sizes)]
        optimizer = torch.optim.Adam(weights, 0.03)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        loss = torch.zeros(())
        for _ in range(steps):
            hidden = X
            for number, weight in enumerate(weights):
                hidden = hidden @ weight.mT
                hidden = hidden.clamp(min=0) if relu and number < layers - 1 else hidden
            loss = (hidden - Y).square().sum() / 2 + decay / 2 * torch.stack([weight.square().sum() for weight in weights]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if loss.item() < best:
            best, found = loss.item(), [weight.detach() for weight in weights]
    return best, found


def white(n: int, d: int) -> Tensor:
    long = torch.linalg.qr(torch.randn(max(n, d), min(n, d)).double()).Q
    return long if n >= d else long.mT


def closed_forms() -> list[dict[str, Any]]:
    """Compare every closed form with gradient descent on random data of each seed, and with the convex program where there is one."""
    rows = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        X, Y = white(12, 5), 3 * torch.randn(12, 3).double()
        one_hot = nn.functional.one_hot(torch.arange(12) % 4 % 3).double()
        wide, column, row, scalar = white(12, 15), torch.randn(10).double(), torch.randn(4).double(), torch.randn(10, 1).double()
        scalar = 2 * column[:, None] + scalar  # opposite targets on both sides
        outer = torch.outer(column, row)
        for layers in (2, 3):
            cases = [
                ("linear, whitened", linear_optimum(X, Y, 1.0, layers), (X, Y, 1.0, layers, False, 5, 2)),
                ("ReLU, whitened, one-hot", relu_optimum(wide, one_hot, 0.6, layers), (wide, one_hot, 0.6, layers, True, 12, 10)),
                ("ReLU, rank one", rank_one_optimum(column, row, scalar, 0.5, layers), (outer, scalar, 0.5, layers, True, 10, 4)),
            ]
            for name, best, settings in cases:
                made: dict[str, Any] = {
                    "case": name,
                    "layers": layers,
                    "seed": seed,
                    "closed": best.loss,
                    "descent": descended(*settings)[0],
                }
                if name == "ReLU, rank one" and layers == 2:
                    made["convex"] = convex_optimum(outer, scalar, NeuronGL1(0.5)).loss
                rows.append(made)
    return rows


def program() -> list[dict[str, Any]]:
    """Solve small random problems as convex programs, and bound what gradient descent finds."""
    rows = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        X, Y = torch.randn(8, 2).double(), torch.randn(8, 1).double()
        solved = convex_optimum(X, Y, NeuronGL1(0.3))
        loss, weights = descended(X, Y, 0.3, 2, True, 20, 4, 3000)
        model = network(weights, relu=True)
        bounds = {method: certificate(model, X, Y, 0.3, method=method).bound for method in ("arrangements", "relaxed", "sampled")}  # type: ignore[arg-type]
        rows.append({"seed": seed, "convex": solved.loss, "patterns": len(solved.patterns), "descent": loss, "bounds": bounds})
    return rows


def network(weights: list[Tensor], relu: bool) -> nn.Sequential:
    layers = [nn.Linear(weight.shape[1], weight.shape[0], bias=False).double() for weight in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data = weight.clone()
    return nn.Sequential(layers[0], nn.ReLU(), layers[1]) if relu else nn.Sequential(*layers)


def images(count: int) -> tuple[Tensor, Tensor]:
    x, y = next(iter(zoo.mnist(batch_size=count).train))
    return x.flatten(1).double(), nn.functional.one_hot(y, 10).double()


def whitened_mnist() -> list[dict[str, Any]]:
    """Descend on 200 whitened images; the closed form says loss and rank."""
    X, Y = images(200)
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    white = U @ Vh
    rows = []
    for decay in (0.5, 4.2, 4.5):
        best = relu_optimum(white, Y, decay)
        loss, weights = descended(white, Y, decay, 2, True, 20, 2, 600)
        rank = int(torch.linalg.matrix_rank(weights[0], rtol=1e-3))
        rows.append({"decay": decay, "closed": best.loss, "rank": best.rank, "descent": loss, "rank_of_descent": rank})
    return rows


def trained_mnist() -> list[dict[str, Any]]:
    """Certify two-layer networks trained on 2,000 images, linear and ReLU."""
    X, Y = images(2000)
    X = X / float(torch.linalg.matrix_norm(X, 2))
    rows = []
    for decay in (0.1, 1.0, 3.0):
        for relu in (False, True):
            loss, weights = descended(X, Y, decay, 2, relu, 64, 1, 600)
            made = certificate(network(weights, relu), X, Y, decay)
            row = {"decay": decay, "relu": relu, "loss": loss, "bound": made.bound, "gap": made.gap, "method": made.method}
            row |= {"rank": int(torch.linalg.matrix_rank(weights[0], rtol=1e-3))}
            if relu:
                row["estimate"] = certificate(network(weights, relu), X, Y, decay, method="sampled", samples=200).bound
            rows.append(row)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    write(
        "duality",
        {"closed_forms": closed_forms(), "program": program(), "whitened_mnist": whitened_mnist(), "trained_mnist": trained_mnist()},
    )
