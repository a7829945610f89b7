"""What the interpolative writing is worth on a real network: ``python benchmarks/micro/interpolative_quality.py``.

stories260K, its 35 linear layers, calibration only: activation-whitened truncation, ranks by one exact knapsack over the relative error
of the layers' outputs, no refit, no training. Once with the price of the pair, ``min(m n, r (m + n))``, once with that of the
interpolative writing, ``r (m + n - r)``; validation nats per token. Each interpolative network is then written in its plain layers and
evaluated again. Then one cut is fine-tuned as factors and as written layers. An argument, ``calibration_only`` or ``fine_tuning``, runs
one of the two.
"""

import copy
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import spectrim as sp
from harness import write
from spectrim import zoo
from spectrim.layers import named_factors
from spectrim.linalg import svd
from spectrim.linalg.writings import prices
from spectrim.linalg.writings import write as write_weight
from spectrim.plain.writing import interpolative_layer

BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.5)
EXAMPLES = 256
TUNED, STEPS, PEAKS = 0.85, 60, (1e-3, 3e-3)


def price(out: int, in_: int, rank: int, writing: str) -> int:
    listed = prices(out, in_, rank)
    names = ("dense", "pair") if writing == "pair" else ("dense", "rows")
    return min(listed[name].params for name in names)  # type: ignore[index]


def knapsack(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], most: int) -> list[int]:
    """Choose one entry of each row so that the costs sum to at most `most` and the losses to the least: dynamic programming, exact."""
    best, places = np.zeros(most + 1), []
    for loss, cost in zip(losses, costs, strict=True):
        found, place = np.full(most + 1, np.inf), np.zeros(most + 1, dtype=np.int16)
        for choice, (value, units) in enumerate(zip(loss, cost, strict=True)):
            if units > most:
                continue
            candidate = best[: most + 1 - units] + value
            better = candidate < found[units:]
            found[units:][better] = candidate[better]
            place[units:][better] = choice
        best = found
        places.append(place)
    picked, room = [], most
    for place, cost in zip(reversed(places), reversed(costs), strict=True):
        picked.append(int(place[room]))
        room -= cost[picked[-1]]
    return picked[::-1]


def ranks_for(harms: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], writing: str, budget: float) -> dict[str, int]:
    losses, costs = [], []
    for name, (out, in_) in shapes.items():
        full = min(out, in_)
        losses.append([float(harms[name][rank]) for rank in range(1, full + 1)])
        costs.append([price(out, in_, rank, writing) for rank in range(1, full + 1)])
    most = int(budget * sum(out * in_ for out, in_ in shapes.values()))
    picked = knapsack(losses, costs, most)
    return {name: choice + 1 for name, choice in zip(shapes, picked, strict=True)}


def nats(model: nn.Module, data: Any) -> float:
    with torch.inference_mode():
        losses = [(zoo.language_model_loss(model(x), y).item(), len(x)) for x, y in data]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def written(dense: nn.Module, cut: nn.Module, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Write the layers of a cut network into a copy of the dense one, in place, each in its cheapest writing; return how."""
    names = list(ranks)
    kinds: dict[str, int] = {}
    params, growth = 0, 0.0
    for name in names:
        layer = dense.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        rank = ranks[name]
        U, S, Vh = svd(cut.get_submodule(name).weight.detach())  # type: ignore[arg-type]
        made = write_weight(U[:, :rank], Vh[:rank], S[:rank])
        key: str = made.name
        params += made.price.params
        if (form := made.interpolation) is not None:
            key += " with free pivots" if form.order is not None else ""
            growth = max(growth, form.growth)
            dense.set_submodule(name, interpolative_layer(layer, form.side, form.kept, form.mix, start=form.start, order=form.order))
        kinds[key] = kinds.get(key, 0) + 1
    assert params == sum(p.numel() for name in names for p in dense.get_submodule(name).parameters()), "what was priced is what is there"
    return {"params": params, "writings": kinds, "largest_coefficient": growth}


def cuts(data: Any, dense: nn.Module) -> tuple[nn.Module, Any, dict[str, Tensor], dict[str, tuple[int, int]]]:
    """Factorize the linear layers of the blocks and calibrate them; return factors, moments, relative errors by rank, and sizes."""
    low = sp.factorize(dense, where=lambda name, module: isinstance(module, nn.Linear) and name.startswith("layers"))
    known = sp.calibrate(low, data.train, examples=EXAMPLES)
    return low, known, dict(sp.budget.distortion.WhitenedEnergy(known)(low)), {name: factors.shape for name, factors in named_factors(low)}


def calibration_only() -> None:
    data, dense = zoo.stories(), zoo.stories260k().eval()
    low, known, harms, shapes = cuts(data, dense)
    total = sum(out * in_ for out, in_ in shapes.values())
    rows = []
    for budget in BUDGETS:
        row: dict[str, Any] = {"kept": budget}
        for writing in ("pair", "interpolative"):
            ranks = ranks_for(harms, shapes, writing, budget)
            cut = sp.prune(low, ranks, calibration=known).eval()
            row[writing] = {"nats": nats(cut, data.val), "ranks": ranks}
            row[writing]["params"] = sum(price(*shapes[name], rank, writing) for name, rank in ranks.items())
            if writing == "interpolative":
                plain = copy.deepcopy(dense)
                row["written"] = written(plain, cut, ranks) | {"nats": nats(plain, data.val)}
        rows.append(row)
        print(budget, {name: round(row[name]["nats"], 3) for name in ("pair", "interpolative", "written")}, row["written"], flush=True)
    settings = {"network": "stories260K", "layers": len(shapes), "dense_params": total, "examples": EXAMPLES}
    content = {"kind": "interpolative quality", "settings": settings, "dense_nats": nats(dense, data.val), "rows": rows}
    write("interpolative-quality", content)


def tuned(model: nn.Module, data: Any, peak: float) -> list[float]:
    """Fine-tune in place; return the validation loss before and after."""
    before = nats(model.eval(), data.val)
    optimizer = torch.optim.Adam(model.parameters(), peak)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, STEPS, pct_start=0.2, cycle_momentum=False)
    model.train()
    for x, y in itertools.islice(data.train, STEPS):
        optimizer.zero_grad()
        zoo.language_model_loss(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return [before, nats(model.eval(), data.val)]


def fine_tuning() -> None:
    """The same cut, fine-tuned as factors and as written layers: the same batches."""
    data, dense = zoo.stories(), zoo.stories260k().eval()
    low, known, harms, shapes = cuts(data, dense)
    ranks = ranks_for(harms, shapes, "interpolative", TUNED)
    rows = []
    for peak in PEAKS:
        row: dict[str, Any] = {"peak": peak}
        for form in ("factors", "written"):
            model = sp.prune(low, ranks, calibration=known)
            if form == "written":
                model, cut = copy.deepcopy(dense), model
                written(model, cut, ranks)
            row[form] = tuned(model, zoo.stories(), peak)  # data anew: the same batches
        rows.append(row)
        print(row, flush=True)
    settings = {"network": "stories260K", "kept": TUNED, "steps": STEPS, "batch": 16, "length": 256, "seed": 0}
    write("interpolative-finetuning", {"kind": "interpolative fine-tuning", "settings": settings, "rows": rows})


if __name__ == "__main__":
    torch.set_num_threads(1)
    for measurement in (calibration_only, fine_tuning):
        if not sys.argv[1:] or measurement.__name__ in sys.argv[1:]:
            measurement()
