"""Seconds and memory of one training step against the dense network's, by rank: ``python benchmarks/micro/step.py [NETWORK ...]``.

Every variant makes a whole step: forward, loss, penalties, backward, SGD with momentum. ``factored`` is what published code does (two
operations at any rank, penalties written layer by layer); ``composed`` composes every weight; ``auto`` takes for each layer what costs
fewer MACs, its penalty exact, ``sampled`` (an eighth of the columns) or left out (``no penalty``, which a penalty at every k-th step comes
near to: the difference to the exact one over k); ``measured`` what a clock said; ``PolarHoyer`` regularizes the
weights of a dense network.
"""

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as sp
from harness import in_turns, peak_bytes, ratios, write
from networks import TRAINING, Case
from spectrim.layers import named_factors, named_layers
from spectrim.training import Retraction

RANKS = (1.0, 0.5, 0.25)
COMPILED = ("resnet20-spatial",)
HALF = ("resnet20-spatial-bf16",)
NAMED_ONLY = ("gpt2-small, 2 blocks",)  # takes several minutes


def layer_by_layer(model: nn.Module) -> Tensor:
    """The penalty as published code writes it: one layer after the other, by autograd."""
    total = torch.zeros(())
    for _, factors in named_factors(model):
        for gram in (factors.U.mT @ factors.U, factors.Vh @ factors.Vh.mT):
            total = total + (gram - torch.eye(factors.rank)).square().sum() / factors.rank**2
        total = total + 0.01 * (factors.S.abs().sum() / factors.S.square().sum().sqrt() - 1)
    return total


def step_of(model: nn.Module, x: Tensor, penalties: list[Any], dtype: torch.dtype | None = None, run: Any = None) -> Callable[[], None]:
    """Return one training step as a function, with the bytes of its parameters as an attribute."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)
    forward = model if run is None else run

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            output = forward(x)
        loss = output.float().square().mean()
        for penalty in penalties:
            loss = loss + penalty(model)
        loss.backward()
        optimizer.step()

    step.parameter_bytes = sum(p.numel() * p.element_size() for p in model.parameters())  # type: ignore[attr-defined]
    return step


def always(low: nn.Module, composes: bool) -> nn.Module:
    """Return a copy in which every layer that has a choice runs one form."""
    low = copy.deepcopy(low)
    for _, layer in named_layers(low):
        layer.__class__ = type(type(layer).__name__, (type(layer),), {"composes": lambda self, name, shape: composes})
    return low


def variants(case: Case, dtype: torch.dtype | None, compiled: bool) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    dense, x = case.make(), case.inputs(case.batch)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    ours = [sp.Orthogonality(1.0), sp.Hoyer(0.01)]
    steps = {"dense": step_of(copy.deepcopy(dense), x, [], dtype)}
    steps["PolarHoyer"] = step_of(copy.deepcopy(dense), x, [sp.penalties.PolarHoyer(0.01)], dtype)
    if compiled:
        own = copy.deepcopy(dense)
        steps["dense, compiled"] = step_of(own, x, [], dtype, torch.compile(own))
    full = sp.factorize(dense, case.scheme)
    for fraction in RANKS:
        low = sp.prune(full, sp.budget.Fraction(fraction)) if fraction < 1 else full
        steps[f"factored {fraction}"] = step_of(always(low, False), x, [layer_by_layer], dtype)
        if fraction == 1:
            steps["composed 1.0"] = step_of(always(low, True), x, ours, dtype)
            sampled = [sp.Orthogonality(1.0, sample=0.125), sp.Hoyer(0.01)]
            steps["auto 1.0, penalty sampled"] = step_of(copy.deepcopy(low), x, sampled, dtype)
            steps["retraction alone"] = partial(Retraction(1).after, copy.deepcopy(low), 0, 1, {})
        steps[f"auto {fraction}, no penalty"] = step_of(copy.deepcopy(low), x, ours[1:], dtype)
        steps[f"auto {fraction}"] = step_of(copy.deepcopy(low), x, ours, dtype)
        timed = copy.deepcopy(low)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            sp.training.choose_execution(timed, x)
        steps[f"measured {fraction}"] = step_of(timed, x, ours, dtype)
        if compiled and fraction != 0.5:
            own = copy.deepcopy(low)
            steps[f"auto {fraction}, compiled"] = step_of(own, x, ours, dtype, torch.compile(own))
    return steps


def main(names: list[str]) -> None:
    for name, case in TRAINING.items():
        if name not in names and (names or name in NAMED_ONLY):
            continue
        dtype = torch.bfloat16 if name in HALF else None
        if dtype is not None and not (names or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
            print(f"== {name}: left out, this processor has no units for bfloat16", flush=True)
            continue
        steps = variants(case, dtype, compiled=name in COMPILED)
        print(f"== {name}", flush=True)
        seconds = in_turns(steps, rounds=case.rounds, warmup=1)
        table = ratios(seconds, "dense")
        held = {key: step.parameter_bytes for key, step in steps.items() if hasattr(step, "parameter_bytes")}
        memory = {key: peak_bytes(step) for key, step in steps.items() if key in held and "compiled" not in key}
        for key, entry in table.items():
            rise = memory.get(key, 0) / memory["dense"]
            print(f"{key:24} {entry['median']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]  memory {rise:.3f}", flush=True)
        content = {"kind": "step", "network": name, "batch": case.batch, "ratios": table}
        content |= {"peak_bytes": memory, "parameter_bytes": held, "rounds": seconds}
        write(f"step-{name.replace(', ', '-').replace(' ', '-')}", content)


if __name__ == "__main__":
    main(sys.argv[1:])
