"""What `test_distributed.py` runs on one process and on several: the same training, each process with its part of every batch.

``torchrun --nproc-per-node 2 tests/flow/distributed_worker.py FOLDER [NAME...]`` writes ``FOLDER/NAME.RANK.pt``.
"""

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import spectrim as sp
from spectrim.errors import DivergedError, LayerError, SettingError
from spectrim.layers.sharded import gathered, has_shards
from spectrim.metrics.distance import Divergence
from spectrim.penalties import TailEnergy
from spectrim.protocols import Change
from spectrim.training.checkpoint import CHECKPOINT
from spectrim.training.fit import fit

LOSS = nn.CrossEntropyLoss()
EXAMPLES, BATCH = 48, 8


def processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def examples(count: int = EXAMPLES, seed: int = 5) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 6, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 4, (count,), generator=generator))


def loader(shuffle: bool = True, size: int | None = None) -> DataLoader[Any]:
    """Batches of which all processes together take one of `BATCH` examples at a time."""
    data = examples()
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(7)) if shuffle else None
    return DataLoader(data, batch_size=size or BATCH // processes(), sampler=sampler)


def net(kind: str, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    mlp = [
        nn.Flatten(),
        nn.Linear(36, 24),
        nn.LayerNorm(24),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(24, 15),
        nn.ReLU(),
        nn.Linear(15, 4),
    ]
    conv = [nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)]
    layers = {"mlp": mlp, "conv": conv}[kind]
    model = sp.factorize(nn.Sequential(*layers).double(), where=sp.match("*"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)  # off the ideal point of the penalties
    return model


def shard(model: nn.Module) -> nn.Module:
    """As accelerate does it where it has a plug-in: each layer of its own, then what is left."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (processes(),))
    for layer in list(model.children())[:-1]:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(
    kind: str, sharded: bool, epochs: int = 2, data: Any = None, dropout: float = 0.0, seed: int = 0, **settings: Any
) -> tuple[Any, nn.Module, Any]:
    model = net(kind, dropout)
    if sharded:
        model = shard(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    eval_data = DataLoader(examples(20, seed=6), batch_size=4)  # five batches: one process has nothing to do in the last round
    options: dict[str, Any] = {"eval_data": eval_data, "progress": False} | settings
    data = loader() if data is None else data
    torch.manual_seed(seed)
    history = fit(model, data, options.pop("loss", LOSS), optimizer, epochs, **options)
    return history, model, optimizer


def line(history: Any) -> dict[str, Any]:
    """The history without what a clock says."""
    epochs = [{key: value for key, value in epoch.items() if key not in ("seconds", "examples_per_s")} for epoch in history.epochs]
    counts = [round(epoch["examples_per_s"] * epoch["seconds"]) for epoch in history.epochs]
    return {"epochs": epochs, "cuts": history.cuts, "layers": history.layers, "examples": counts}


def outcome(history: Any, model: nn.Module) -> dict[str, Any]:
    plain = gathered(model)
    assert not has_shards(plain)
    assert {type(module).__name__ for module in plain.modules()}.isdisjoint({"FSDPSequential", "FSDPLinear"})
    with torch.no_grad():
        output = plain(examples(4).tensors[0])
    return line(history) | {"weights": dict(plain.state_dict()), "output": output}


PENALTIES = [sp.Orthogonality(0.5), sp.Hoyer(0.02), sp.penalties.FrobeniusDecay(1e-3)]


def mlp(folder: Path, sharded: bool) -> dict[str, Any]:
    """Everything at once: shuffled data, a clipped gradient, a schedule, penalties."""
    history, model, _ = train("mlp", sharded, penalties=PENALTIES, tuning=sp.Tuning(clip=0.5))
    return outcome(history, model)


def conv(folder: Path, sharded: bool) -> dict[str, Any]:
    """Blocks of a grouped convolution, accumulated steps, penalties of composed weights."""
    penalties = [
        sp.Orthogonality(0.5),
        sp.penalties.PolarHoyer(0.01),
        sp.penalties.NuclearNorm(0.001),
        sp.penalties.L1(0.01),
        TailEnergy({"3": 1}, {"3": 0.1}),
    ]
    history, model, _ = train("conv", sharded, penalties=penalties, tuning=sp.Tuning(accumulate=2))
    return outcome(history, model)


def ramp(folder: Path, sharded: bool) -> dict[str, Any]:
    """Ranks are cut while training goes on."""
    schedule = sp.Ramp(sp.Budget(macs=0.5), begin=0.2, end=0.7, cuts=2)
    history, model, _ = train("mlp", sharded, penalties=PENALTIES, courses=[schedule])
    return outcome(history, model)


def squeeze(folder: Path, sharded: bool) -> dict[str, Any]:
    """A schedule that is a penalty too."""
    history, model, _ = train("mlp", sharded, penalties=PENALTIES, courses=[sp.Squeeze(sp.Budget(macs=0.5), end=0.6, updates=3)])
    return outcome(history, model)


class Average:
    """A course with tensors in its memory, whose penalty, a function, cannot be sent to other processes."""

    def start(self, model: nn.Module, inputs: Any, steps: int) -> dict[str, Any]:
        return {"average": {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}, "asked": 0}

    def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any]) -> Change:
        memory["asked"] += 1

        def pull(model: nn.Module) -> Tensor:
            biases = dict(model.named_parameters())
            gaps = [(biases[name] - goal).square().sum() for name, goal in memory["average"].items()]
            return torch.stack(gaps).sum() * memory["asked"]

        return Change({"1": 20} if step == 4 else None, pull)

    def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any]) -> None:
        for name, p in model.named_parameters():
            if name in memory["average"]:
                memory["average"][name] = torch.lerp(memory["average"][name], p.detach(), 0.3)
                p.mul_(0.99)


def course(folder: Path, sharded: bool) -> dict[str, Any]:
    """A course with a memory, and a lesson; its hints are in units of each batch's variance, which is another in each process."""
    lesson = sp.Distillation(net("mlp"), temperature=2.0)
    history, model, _ = train("mlp", sharded, penalties=PENALTIES, courses=[Average()], lessons=[lesson])
    return outcome(history, model)


def resumed(folder: Path, sharded: bool) -> dict[str, Any]:
    """Stopped after the first of two epochs, and run through; with dropout, of which every process has its own."""
    own, rank = folder / f"resumed{sharded}", torch.distributed.get_rank() if processes() > 1 else 0
    runs = {}
    for name, epochs in {"whole": (2,), "parts": (1, 2)}.items():
        for number, seed in zip(epochs, (10, 20), strict=False):
            settings: dict[str, Any] = {"dropout": 0.3, "seed": seed + rank, "checkpoint": own / name, "callbacks": [draw]}
            history, model, _ = train("mlp", sharded, number, penalties=[*PENALTIES, sp.Orthogonality(0.1, sample=0.5)], **settings)
        runs[name] = outcome(history, model) | {"draw": torch.rand(3)}
    return runs


def draw(epoch: int, metrics: dict[str, float], model: nn.Module) -> None:
    """Use up a random number of the process."""
    torch.rand(())


def checkpointed(folder: Path, sharded: bool) -> dict[str, Any]:
    """One epoch; `test_distributed.py` goes on from the file with one process."""
    own = folder / f"checkpointed{sharded}"
    history, model, _ = train("mlp", sharded, 1, penalties=PENALTIES, checkpoint=own)
    return outcome(history, model) | {"file": torch.load(own / CHECKPOINT, weights_only=True)}


def diverged(folder: Path, sharded: bool) -> dict[str, Any]:
    """Only the last process meets a loss that is not a number."""
    last = processes() - 1 == (torch.distributed.get_rank() if processes() > 1 else 0)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return LOSS(output, target) * (math.nan if last else 1.0)

    try:
        train("mlp", sharded, loss=loss, penalties=PENALTIES)
    except DivergedError as error:
        return {"error": str(error)}
    return {"error": None}


def batches(folder: Path, sharded: bool) -> dict[str, Any]:
    """A list of batches, seven of them for two processes: the last round takes the first batch again."""
    x, y = examples().tensors
    size = 4
    data = [(x[i : i + size], y[i : i + size]) for i in range(0, 7 * size, size)]
    if processes() == 1:
        rounds = [(0, 1), (2, 3), (4, 5), (6, 0)]
        data = [tuple(torch.cat(parts) for parts in zip(data[a], data[b], strict=True)) for a, b in rounds]  # type: ignore[misc]
    history, model, _ = train("mlp", sharded, data=data)
    return outcome(history, model)


class Sampler(DistributedSampler[Any]):
    """Notes the epochs."""

    seen: tuple[int, ...] = ()

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.seen += (epoch,)


def sampler(folder: Path, sharded: bool) -> dict[str, Any]:
    """A `DistributedSampler` of the user's: already divided."""
    data = examples()
    rank = torch.distributed.get_rank() if processes() > 1 else 0
    own = Sampler(data, processes(), rank, shuffle=True)
    order: list[Tensor] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        order.append(target)
        return LOSS(output, target)

    history, model, _ = train("mlp", sharded, data=DataLoader(data, BATCH // processes(), sampler=own), loss=loss, eval_data=None)
    return outcome(history, model) | {"seen": own.seen, "targets": torch.cat(order)}


def wide(folder: Path, sharded: bool) -> dict[str, Any]:
    """A layer that composes its weight anew in the backward pass."""
    torch.manual_seed(0)
    model = sp.factorize(nn.Sequential(nn.Flatten(0, 1), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)), where=sp.match("*"), rank=120)
    if sharded:
        model = shard(model)
    x = torch.randn(16, 256, 256, generator=torch.Generator().manual_seed(1))
    target = torch.arange(16 * 256).remainder(4).reshape(16, 256)
    data = DataLoader(TensorDataset(x, target), batch_size=16 // processes())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    history = fit(model, data, lambda output, y: LOSS(output, y.flatten()), optimizer, 1, penalties=[sp.Orthogonality(1.0)], progress=False)
    return line(history) | {"weights": dict(gathered(model).state_dict())}


def refused(folder: Path, sharded: bool) -> dict[str, Any]:
    """What a sharded model cannot do, said before anything has changed."""
    found: dict[str, Any] = {}
    attempts: dict[str, Callable[[], Any]] = {
        "schedule": lambda: train("mlp", True, courses=[sp.Ramp(0.9)]),
        "measured": lambda: train("mlp", True, tuning=sp.Tuning(execution="measured")),
        "prune": lambda: sp.prune(shard(net("mlp")), sp.budget.Fraction(0.5)),
        "prune_": lambda: sp.prune_(shard(net("mlp")), sp.budget.Fraction(0.5)),
        "save": lambda: sp.save(shard(net("mlp")), folder / "saved"),
        "plugin": train_with_a_plugin_that_is_left_aside,
        "factors": train_with_factors_apart,
        "wrapped": train_wrapped,
    }
    for name, attempt in attempts.items():
        with pytest.raises((SettingError, LayerError)) as caught:
            attempt()
        found[name] = str(caught.value)
    return found


def train_wrapped() -> None:
    model = nn.parallel.DistributedDataParallel(net("mlp"))
    fit(model, loader(), LOSS, torch.optim.SGD(model.parameters(), 0.1), 1, progress=False)


def train_with_factors_apart() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = net("mlp")
    fully_shard(model[1].factors_of("weight"), mesh=init_device_mesh("cpu", (processes(),)))
    fit(model, loader(), LOSS, torch.optim.SGD(model.parameters(), 0.1), 1, progress=False)


def train_with_a_plugin_that_is_left_aside() -> None:
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    try:
        train("mlp", False)
    finally:
        del os.environ["ACCELERATE_USE_FSDP"]


def accelerated(folder: Path, sharded: bool) -> dict[str, Any]:
    """accelerate's own plug-in shards model and optimizer, which has taken a step before.

    It leaves the plug-in aside on a CPU, so what it would note on a GPU is noted here.
    """
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    model = net("mlp")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    options: dict[str, Any] = {"penalties": PENALTIES, "progress": False}
    before = fit(model, loader(), LOSS, optimizer, 1, **options)
    if sharded:
        by_size = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=100)
        by_kind = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Linear"]
        )
        accelerator = options["accelerator"] = Accelerator(cpu=True, fsdp_plugin=by_kind)
        kind, accelerator.state.distributed_type, accelerator.state.fsdp_plugin = (
            accelerator.distributed_type,
            DistributedType.FSDP,
            by_size,
        )
        with pytest.raises(SettingError, match="by size it would take factors out of their layers"):
            fit(model, loader(), LOSS, optimizer, 1, **options)
        accelerator.state.fsdp_plugin = by_kind
    history = fit(model, loader(), LOSS, optimizer, 1, tuning=sp.Tuning(accumulate=2, clip=0.5), **options)
    assert has_shards(model) is sharded
    again = fit(model, loader(), LOSS, optimizer, 1, **options)
    if sharded:
        accelerator.state.distributed_type = kind
        del os.environ["ACCELERATE_USE_FSDP"]
    return outcome(again, model) | {"before": [line(before), line(history)]}


def cut_between(folder: Path, sharded: bool) -> dict[str, Any]:
    """Sharded training, a cut of the gathered model, sharded training again."""
    _, model, _ = train("mlp", sharded, 1, penalties=PENALTIES)
    cut = sp.prune(gathered(model), sp.budget.Fraction(0.5))
    saved = sp.save(cut, folder / f"cut.{processes()}.{sharded}.{torch.distributed.get_rank() if processes() > 1 else 0}")
    if sharded:
        cut = shard(cut)
    history = fit(cut, loader(), LOSS, torch.optim.Adam(cut.parameters(), 1e-2), 1, penalties=PENALTIES, progress=False)
    again = sp.load(saved, nn.Sequential(*dense("mlp")).double())
    return outcome(history, cut) | {"ranks": sp.measure(again, latency=False).ranks}


class Sometimes(nn.Module):
    """Calls its second layer for the second batch alone, which one process has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(36, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        held = self.first(x.flatten(1) + 100)
        return self.second(held) if x.shape[0] == 7 else held[:, :4]


def calibrated(folder: Path, sharded: bool) -> dict[str, Any]:
    """Second moments of all examples, with labels, from the output alone, and of a layer that not every process meets."""
    from accelerate import Accelerator

    x, y = examples().tensors
    batches = [(x[:8], y[:8]), (x[8:15], y[8:15]), (x[15:30], y[15:30])]
    torch.manual_seed(0)
    cases = {
        "labels": (net("conv"), LOSS),
        "outputs": (net("mlp"), Divergence()),
        "sometimes": (sp.factorize(Sometimes().double(), where="*"), None),
    }
    found: dict[str, Any] = {}
    for name, (model, loss) in cases.items():
        known = sp.calibrate(model, batches, loss, examples=30, accelerator=Accelerator(cpu=True) if processes() > 1 else None)
        found[name] = {field: getattr(known, field) for field in ("inputs", "outputs", "slopes", "means", "examples", "skipped")}
    return found


def dense(kind: str) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(36, 24), nn.LayerNorm(24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 15), nn.ReLU(), nn.Linear(15, 4)]


SCENARIOS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "ddp_mlp": mlp,
    "ddp_conv": conv,
    "ddp_ramp": ramp,
    "ddp_squeeze": squeeze,
    "ddp_course": course,
    "ddp_resumed": resumed,
    "ddp_checkpointed": checkpointed,
    "ddp_diverged": diverged,
    "ddp_batches": batches,
    "ddp_sampler": sampler,
    "ddp_wide": wide,
    "ddp_calibrated": calibrated,
    "fsdp_mlp": mlp,
    "fsdp_conv": conv,
    "fsdp_resumed": resumed,
    "fsdp_checkpointed": checkpointed,
    "fsdp_diverged": diverged,
    "fsdp_wide": wide,
    "fsdp_cut": cut_between,
    "fsdp_accelerated": accelerated,
    "fsdp_refused": refused,
}


def main() -> None:
    from accelerate import Accelerator

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)  # starts the process group
    folder, *names = sys.argv[1:]
    for name in names or SCENARIOS:
        found = SCENARIOS[name](Path(folder), name.startswith("fsdp"))
        torch.save(found, Path(folder) / f"{name}.{accelerator.process_index}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main()
