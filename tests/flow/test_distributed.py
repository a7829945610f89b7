"""Two processes train what one does: DDP and FSDP2 on gloo, started by torchrun and by ``accelerate launch``."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_worker as worker
import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.training.checkpoint import CHECKPOINT

FILE = Path(worker.__file__)


def launch(module: str, *arguments: object) -> None:
    """Start processes on the CPU, as a user would."""
    offline = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote for every scenario."""
    folder = tmp_path_factory.mktemp("processes")
    launch("torch.distributed.run", "--standalone", "--nproc-per-node", 2, FILE, folder)
    return folder


def of(folder: Path, name: str) -> list[dict[str, Any]]:
    """What each process found."""
    return [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(2)]


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """The same run to rounding: sums over processes are taken in another order, in float64."""
    assert a["cuts"] == b["cuts"]
    assert a["examples"] == b["examples"]
    for one, other in ((a["epochs"], b["epochs"]), (a["layers"], b["layers"]), (a["weights"], b["weights"])):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)  # Adam divides by roots of second moments, which amplifies rounding
    torch.testing.assert_close(a.get("output"), b.get("output"), rtol=1e-7, atol=1e-9) if "output" in a else None


SAME = ["ddp_mlp", "ddp_conv", "ddp_ramp", "ddp_squeeze", "ddp_course", "ddp_batches", "fsdp_mlp", "fsdp_conv", "fsdp_accelerated"]


@pytest.mark.parametrize("name", SAME)
def test_two_processes_train_what_one_does(folder: Path, tmp_path: Path, name: str) -> None:
    first, second = of(folder, name)
    alone = worker.SCENARIOS[name](tmp_path, False)
    assert_same(alone, first)
    assert_same(first, second)
    if name == "fsdp_accelerated":
        assert first["before"] == second["before"]
        for one, other in zip(first["before"], alone["before"], strict=True):
            torch.testing.assert_close(one["epochs"], other["epochs"], rtol=1e-7, atol=1e-9)  # as above
    else:
        assert alone["epochs"][1]["loss"] != alone["epochs"][0]["loss"]


def test_two_processes_calibrate_what_one_does(folder: Path, tmp_path: Path) -> None:
    first, second = of(folder, "ddp_calibrated")
    alone = worker.calibrated(tmp_path, False)
    assert alone["sometimes"]["inputs"].keys() == {"first", "second"}
    for one, other in ((alone, first), (first, second)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_penalties_are_in_the_gradient_once(folder: Path, tmp_path: Path) -> None:
    """The comparison above would not see a penalty that is too weak to matter: without it the weights differ."""
    (first, _), (history, model, _) = of(folder, "ddp_mlp"), worker.train("mlp", False, tuning=sp.Tuning(clip=0.5))
    plain = dict(model.state_dict())
    assert max(float((plain[name] - weight).abs().max()) for name, weight in first["weights"].items()) > 1e-3
    assert first["epochs"][0].keys() - history.last.keys() == {"Orthogonality", "Hoyer", "FrobeniusDecay"}


def test_ranks_were_cut(folder: Path) -> None:
    for name in ("ddp_ramp", "ddp_squeeze", "ddp_course"):
        first, second = of(folder, name)
        assert first["cuts"] == second["cuts"]
        assert first["layers"][-1]["ranks"] != {"1": 24, "5": 15, "7": 4}


@pytest.mark.parametrize("name", ["ddp_wide", "fsdp_wide"])
def test_weights_composed_anew_in_the_backward_pass(folder: Path, tmp_path: Path, name: str) -> None:
    first, second = of(folder, name)
    alone = worker.wide(tmp_path, False)
    torch.testing.assert_close(first["weights"], alone["weights"])
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ddp_resumed", "fsdp_resumed"])
def test_a_resumed_run_ends_with_the_same_bits(folder: Path, name: str) -> None:
    processes = of(folder, name)
    for found in processes:
        torch.testing.assert_close(found["whole"], found["parts"], rtol=0, atol=0)
    assert not torch.equal(processes[0]["whole"]["draw"], processes[1]["whole"]["draw"]), "every process draws its own numbers"


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_goes_on_with_another_number_of_processes(folder: Path, tmp_path: Path, sharded: bool) -> None:
    whole, *_ = worker.train("mlp", False, 2, penalties=worker.PENALTIES)
    path = folder / f"checkpointed{sharded}"
    history, _, optimizer = worker.train("mlp", False, 2, penalties=worker.PENALTIES, checkpoint=path)
    torch.testing.assert_close(worker.line(history)["epochs"], worker.line(whole)["epochs"], rtol=1e-7, atol=1e-9)  # as above
    alone = tmp_path / "alone"
    worker.train("mlp", False, 1, penalties=worker.PENALTIES, checkpoint=alone)
    several, one = (torch.load(folder / CHECKPOINT, weights_only=True) for folder in (path, alone))
    assert several["kinds"] == one["kinds"]
    assert optimizer.state_dict()["state"].keys() == one["optimizer"]["state"].keys()


def test_the_file_is_what_one_process_writes(folder: Path, tmp_path: Path) -> None:
    """Before `test_a_run_goes_on` writes it anew the file of FSDP2 has whole tensors; the first epoch's are in the history too."""
    worker.train("mlp", False, 1, penalties=worker.PENALTIES, checkpoint=tmp_path)
    one = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    for name in ("ddp_checkpointed", "fsdp_checkpointed"):
        for found in of(folder, name):
            file = found["file"]
            assert file.keys() - {"random_of_others"} == one.keys()
            for part in ("model", "optimizer"):
                torch.testing.assert_close(file[part], one[part], rtol=1e-7, atol=1e-9)  # as above


@pytest.mark.parametrize("name", ["ddp_diverged", "fsdp_diverged"])
def test_all_processes_stop_when_one_diverges(folder: Path, name: str) -> None:
    first, second = of(folder, name)
    assert first["error"] == second["error"]
    assert first["error"].startswith("loss became nan at step 0 (epoch 0)")


def test_a_distributed_sampler_divides_the_data(folder: Path, tmp_path: Path) -> None:
    first, second = of(folder, "ddp_sampler")
    assert first["seen"] == second["seen"] == (0, 1)
    assert len(first["targets"]) == len(second["targets"]) == worker.EXAMPLES, "half of the examples, two epochs"
    assert first["examples"] == [worker.EXAMPLES] * 2
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)


def test_ranks_of_a_sharded_model_are_cut_between_two_runs(folder: Path, tmp_path: Path) -> None:
    first, second = of(folder, "fsdp_cut")
    assert first["ranks"] == second["ranks"] == {"1": 12, "5": 8, "7": 2}
    assert_same(worker.cut_between(tmp_path, False), first)
    assert_same(first, second)


def test_what_a_sharded_model_cannot_do(folder: Path) -> None:
    first, second = of(folder, "fsdp_refused")
    assert first == second
    assert "cut gathered(model) with prune between two calls of fit" in first["schedule"]
    assert "execution must be 'macs' for a model that FSDP2 shards" in first["measured"]
    for verb in ("prune", "prune_", "save"):
        assert "is sharded over processes; give" in first[verb]
    assert "accelerate leaves it aside with MULTI_CPU" in first["plugin"]
    assert "layer '1.factors.weight': is sharded by itself" in first["factors"]
    assert "fit wraps it" in first["wrapped"]
    assert not (folder / "saved").exists()


def test_accelerate_launch(tmp_path: Path) -> None:
    launch("accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, FILE, tmp_path, "ddp_mlp")
    assert_same(worker.mlp(tmp_path, False), of(tmp_path, "ddp_mlp")[0])


def test_a_plain_model_is_copied_too() -> None:
    low = sp.factorize(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 3)), where=sp.match("0"))
    low[0].register_forward_hook(lambda module, args, output: output)
    copy = worker.gathered(low)
    assert {name: type(module) for name, module in copy.named_modules()} == {name: type(module) for name, module in low.named_modules()}
    assert len(copy[0]._forward_hooks) == 1, "a hook of the user's stays"
    torch.testing.assert_close(copy(torch.ones(2, 4)), low(torch.ones(2, 4)), rtol=0, atol=0)
    with torch.no_grad():
        copy[1].weight_ih_l0.zero_()
    assert low[1].weight_ih_l0.abs().sum() > 0
    assert not torch.equal(copy(torch.ones(2, 4))[0], low(torch.ones(2, 4))[0]), "the copy's LSTM runs its own weights"


def test_importing_leaves_accelerate_aside_and_the_command_line_what_few_commands_need() -> None:
    code = "import sys, spectrim.cli; names = ('torch', 'scipy', 'accelerate'); assert not {*names} & {*sys.modules}, 'for --help';"
    code += "import spectrim.cli.commands; late = ('scipy.optimize', 'scipy.linalg', 'accelerate', 'transformers', 'onnx', 'matplotlib');"
    code += "assert not {*late} & {*sys.modules}, {*late} & {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
