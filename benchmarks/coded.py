"""Coded bytes against quality, without training and labels: ``python benchmarks/coded.py [NETWORK] [--rows PART] [--render | --check]``.

Rows are written to ``benchmarks/results/coded/NETWORK.json`` one by one; those that are there are skipped. Settings were chosen by the
Kullback-Leibler divergence on held-out training images. The test split is read once for each row.
"""

import argparse
import io
import json
import lzma
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import coded_curves
import spectrim as sp
from coded_networks import NETWORKS, RUNS, Network, logits_of
from run import git_state
from spectrim.budget.rounding.attempts import Search
from spectrim.budget.rounding.pairs import with_pairs
from spectrim.budget.rounding.round_to import round_to
from spectrim.files import make_folder, write_json
from spectrim.metrics.inputs import first_examples
from spectrim.pipeline.environment import environment
from spectrim.runtimes.evaluation import _Runtime
from spectrim.runtimes.int8 import quantize
from spectrim.runtimes.readers import open_exported
from spectrim.storage.coded.group import decoded, encoded
from spectrim.storage.pack import coded, pack, unpack
from spectrim.surgery.batchnorm import fold_batchnorms
from spectrim.surgery.exchange import duplicate
from spectrim.surgery.observing import isolated

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "coded", ROOT / "docs" / "coded.md"
NETWORK = ["resnet20"]


def network() -> Network:
    return NETWORKS[NETWORK[0]]


@cache
def splits(seed: int) -> Any:
    return network().data(seed)


@cache
def known(seed: int) -> list[Any]:
    """Return the calibration set: the same examples in each call."""
    return first_examples(splits(seed).train, network().examples)


@cache
def dense() -> nn.Module:
    return network().model().eval()


@cache
def folded() -> nn.Module:
    model = duplicate(dense()).eval()
    fold_batchnorms(model)
    return model


@cache
def reference() -> Tensor:
    return logits_of(dense(), splits(0).val, network().held_out).log_softmax(1)


@cache
def tested() -> list[Any]:
    test = splits(0).test
    return first_examples(test, network().test or test.examples)


def judged(model: nn.Module) -> dict[str, float]:
    """Return the divergence on held-out training examples, and the merit on test examples, which are read here once."""
    now = logits_of(model.eval(), splits(0).val, network().held_out).log_softmax(1)
    kl = float((reference().exp() * (reference() - now)).sum(1).mean())
    found = sp.evaluate(model, tested(), network().loss)
    merit = found["accuracy"] * 100 if network().merit == "accuracy" else found["loss"]
    return {"kl": kl, network().merit: merit, "images": sum(len(x) for x, _ in tested())}


def sizes(model: nn.Module, folder: Path) -> dict[str, int]:
    """Return the sizes of the coded file, once it was decoded into the network again, bit for bit."""
    packed = pack(model, folder / "model.spz")
    back = unpack(folder / "model.spz")
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
    return {"bytes": packed.coded_bytes, "data_bytes": packed.data_bytes, "index_bytes": packed.index_bytes}


def levels(model: nn.Module, seed: int, limit: int, **more: Any) -> tuple[nn.Module, dict[str, Any]]:
    made = round_to(model, known(seed), limit, examples=network().examples, progress=False, **more)
    return made.model, {"bits": {name: round(value, 3) for name, value in made.bits.items()}, "unexplained": made.unexplained}


def low_rank(seed: int, limit: int, params: float) -> tuple[nn.Module, dict[str, Any]]:
    data = splits(seed)
    made = sp.compress(dense(), data.train, nn.CrossEntropyLoss(), sp.Budget(params=params), progress=False)
    return levels(made.model.eval(), seed, limit)


def pairs(seed: int, limit: int) -> tuple[nn.Module, dict[str, Any]]:
    """Round with ranks and steps by one price of a bit, whether that is better on the calibration set or not."""
    network = duplicate(folded()).eval()
    batches = [x for x, _ in known(seed)]
    with isolated(network):
        search = Search(network, batches, True, False)
        options = search.joint(limit)
        made, counterparts = with_pairs(network, options) if options else (network, {})
        with isolated(made):
            found = Search(made, batches, True, False, (search, counterparts)).within(limit)
    predicted = {name: (option.rank, option.lost) for name, option in options.items()}
    return found.model, {"ranks": {name: rank for name, (rank, _) in predicted.items()}, "unexplained": found.unexplained}


def rank_alone(seed: int, limit: int) -> tuple[nn.Module, dict[str, Any]]:
    """Cut to the largest share of the parameters whose file meets the bytes, with 8-bit levels, a scale for each output."""
    low, high, found, share = 0.02, 0.9, folded(), 0.0
    for _ in range(5):
        middle = (low + high) / 2
        made = sp.compress(dense(), known(seed), nn.CrossEntropyLoss(), sp.Budget(params=middle), progress=False).model.eval()
        fold_batchnorms(made)
        eight_bits(made)
        low, high = (low, middle) if len(coded(made)[0]) > limit else (middle, high)
        if low == middle:
            found, share = made, middle
    return found, {"params": share}


def one_step(limit: int) -> tuple[nn.Module, dict[str, Any]]:
    """Round all weights to the nearest multiple of one step, the smallest that meets the bytes; biases to 8 bits."""
    low, high, found = 1e-3, 1.0, folded()
    for _ in range(16):
        step = (low * high) ** 0.5
        model = duplicate(folded())
        with torch.no_grad():
            for parameter in model.parameters():
                scale = torch.tensor(step if parameter.dim() > 1 else float(parameter.abs().max()) / 127)
                parameter.copy_((parameter / scale).round() * scale + 0)
        low, high = (step, high) if len(coded(model)[0]) > limit else (low, step)
        if high == step:
            found = model
    return found, {"step": high}


@torch.no_grad()
def eight_bits(model: nn.Module) -> bytes:
    """Round each output channel to 8 bits, in place; return the integers and scales as they are."""
    stored = io.BytesIO()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            stored.write(parameter.numpy().tobytes())
            continue
        scale = (parameter.flatten(1).abs().amax(1) / 127).clamp_min(1e-12)
        spread = scale.reshape(-1, *[1] * (parameter.dim() - 1))
        numbers = (parameter / spread).round()
        stored.write(numbers.to(torch.int8).numpy().tobytes() + scale.numpy().tobytes())
        parameter.copy_(numbers * spread + 0)
    return stored.getvalue()


def general(data: bytes) -> dict[str, int]:
    """Return the sizes of bytes as they are and by general coders: zlib, xz (LZMA), and the program zstd where there is one."""
    made = {"plain_bytes": len(data), "zlib_bytes": len(zlib.compress(data, 9)), "xz_bytes": len(lzma.compress(data, preset=9))}
    if program := shutil.which("zstd"):
        made["zstd_bytes"] = len(subprocess.run([program, "-19", "-c"], input=data, capture_output=True, check=True).stdout)
    return made


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Return what the state holds, tied tensors once."""
    return list({tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values())


def int8() -> tuple[nn.Module, dict[str, Any]]:
    model = duplicate(folded())
    return model, general(eight_bits(model))


def float32() -> tuple[nn.Module, dict[str, Any]]:
    return folded(), general(b"".join(tensor.numpy().tobytes() for tensor in tensors_of(folded())))


def general_of(model: nn.Module) -> dict[str, int]:
    """Return the sizes by general coders of the levels of a rounded network, a byte or two for each, and of what is not on levels."""
    parts = []
    for tensor in tensors_of(model):
        held = tensor.numpy().ravel()
        step = np.abs(held[held != 0]).min(initial=np.inf)
        levels = np.rint(held / step) if np.isfinite(step) else np.zeros_like(held)
        exact = np.isfinite(step) and np.array_equal((levels * step).astype(held.dtype), held) and np.abs(levels).max() < 2**15
        small = np.int8 if np.abs(levels).max(initial=0) < 128 else np.int16
        parts.append(np.float32(step).tobytes() + levels.astype(small).tobytes() if exact else held.tobytes())
    return general(b"".join(parts))


def int8_onnx() -> tuple[nn.Module, dict[str, Any]]:
    """Return the network as an int8 ONNX file, in its runtime."""
    path = RUNS / "int8.onnx"
    made = quantize(dense(), known(0)[: 2 if network().merit == "accuracy" else None], path)
    return _Runtime(open_exported(path, threads=1)), {"bytes": made.size_bytes, "data_bytes": 0, "index_bytes": 0, "method": made.method}


@cache
def shared() -> tuple[Search, float]:
    """Return what `round_to` finds out first, whatever the budget, and the processor time of that."""
    began, model = time.process_time(), duplicate(folded()).eval()
    with isolated(model):
        made = Search(model, [x for x, _ in known(0)], network().sequential, False)
    return made, time.process_time() - began


def on_curve(limit: int) -> tuple[nn.Module, dict[str, Any]]:
    """Round as `round_to` does, from what the budgets share."""
    search, seconds = shared()
    with isolated(search.dense):
        made = search.within(limit)
    more = {"bits": {name: round(value, 3) for name, value in made.bits.items()}, "unexplained": made.unexplained}
    return made.model, more | {"shared_seconds": seconds}


def curve_rows() -> dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]]:
    """Return the rows of a curve: as it is, in int8, and on levels for each budget."""
    made: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {"float32": float32, "int8": int8, "onnx int8": int8_onnx}
    for limit in network().budgets:
        made[f"levels {limit} seed 0"] = lambda limit=limit: on_curve(limit)
    return made


def small_rows() -> dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]]:
    """Return the rows of ResNet-8: levels alone, ranks and levels by one price, rank alone."""
    made: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {"float32": float32, "int8": int8, "onnx int8": int8_onnx}
    for seed in (0, 1, 2):
        for limit in (24_000, 14_000, 9_000):
            made[f"levels {limit} seed {seed}"] = lambda limit=limit, seed=seed: levels(dense(), seed, limit)
            made[f"joint {limit} seed {seed}"] = lambda limit=limit, seed=seed: pairs(seed, limit)
    for limit in (24_000, 14_000):
        made[f"rank alone {limit} seed 0"] = lambda limit=limit: rank_alone(0, limit)
    return made


def rows() -> dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]]:
    """Return how each row is made, by its name, the most wanted first."""
    if NETWORK[0] == "resnet8":
        return small_rows()
    if NETWORK[0] != "resnet20":
        return curve_rows()
    made: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {"float32": float32, "int8": int8, "onnx int8": int8_onnx}
    for limit in (66_000, 50_000):
        made[f"levels {limit} seed 0"] = lambda limit=limit: levels(dense(), 0, limit)
    made["one step 66000"] = lambda: one_step(66_000)
    made["one step 99000"] = lambda: one_step(99_000)
    for params in (0.8, 0.6):
        made[f"rank {params} levels 50000 seed 0"] = lambda params=params: low_rank(0, 50_000, params)
    for seed in (1, 2):
        for limit in (66_000, 50_000):
            made[f"levels {limit} seed {seed}"] = lambda limit=limit, seed=seed: levels(dense(), seed, limit)
    for limit in (66_000, 50_000):
        made[f"static {limit} seed 0"] = lambda limit=limit: levels(dense(), 0, limit, sequential=False)
    for limit in (50_000, 25_000):
        made[f"joint {limit} seed 0"] = lambda limit=limit: pairs(0, limit)
    made["levels 25000 seed 0"] = lambda: levels(dense(), 0, 25_000)
    for limit in (40_000, 90_000, 32_000):
        made[f"levels {limit} seed 0"] = lambda limit=limit: levels(dense(), 0, limit)
    return made


def run(path: Path, folder: Path, part: str) -> None:
    """Make the rows that are missing and have a part of a name."""
    result = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    for name, make in rows().items():
        if name in result["rows"] or part not in name:
            continue
        if name.startswith("levels") and NETWORK[0] not in ("resnet20", "resnet8"):
            shared()
        began = time.process_time()
        model, more = make()
        seconds = time.process_time() - began + more.get("shared_seconds", 0.0)
        row = ({} if name.startswith("onnx") else sizes(model, folder)) | judged(model) | {"seconds": seconds} | more
        if name.startswith(("levels", "joint")):
            row |= general_of(model)
        result["rows"][name] = row | {"git": git_state()}
        size = sum(tensor.nbytes for tensor in tensors_of(dense()))
        result |= {"network": path.stem, "environment": environment(), "examples": network().examples, "held_out": network().held_out}
        result |= {"fp32_bytes": size, "merit": network().merit}
        write_json(path, {key: value for key, value in result.items() if key != "sha256"})
        print(name, {key: row[key] for key in ("bytes", "kl", network().merit, "seconds")}, flush=True)


def speed(path: Path) -> None:
    """Add megabytes of float32 a second of processor time, encoding and decoding: ResNet-20's shapes and a large weight, on levels."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "ResNet-20": [tensor.shape for tensor in folded().parameters() if tensor.dim() > 1],
        "1024 x 4096": [torch.Size((1024, 4096))],
    }
    found = {}
    for name, sides in shapes.items():
        tensors = {str(place): (torch.randn(side, generator=generator) / 0.7).round() * 0.25 for place, side in enumerate(sides)}
        size, taken = sum(tensor.nbytes for tensor in tensors.values()) / 1e6, []
        for _ in range(5):
            began = time.process_time()
            made, _ = encoded({key: tensor + 0 for key, tensor in tensors.items()})
            middle = time.process_time()
            decoded(made, [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()])
            taken.append((size / (middle - began), size / (time.process_time() - middle)))
        encode, decode = (sorted(values)[2] for values in zip(*taken, strict=True))
        found[name] = {"encode": encode, "decode": decode, "megabytes": size, "coded_bytes": len(made)}
    result = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    write_json(path, result | {"speed": found})
    print(found)


NOTES = {
    "float32": "float32, BatchNorm folded",
    "onnx int8": "int8 ONNX file, in ONNX Runtime",
    "int8": "int8, a scale for each output channel",
    "one step": "one step for all weights, nearest level",
    "static": "`round_to(sequential=False)`",
    "levels": "`round_to`",
    "joint": "ranks and steps by one price",
    "rank alone": "rank alone, 8-bit levels",
    "rank": "`compress(Budget(params={}))`, then `round_to`",
}


def table(result: dict[str, Any]) -> list[str]:
    """Return the rows as a table, by method and bytes."""
    lines = ["| method | calibration draw | bytes | values | zeros' positions | divergence | test accuracy | seconds |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    kinds = list(NOTES)
    listed = sorted(
        result["rows"].items(), key=lambda item: (next(k for k in range(len(kinds)) if item[0].startswith(kinds[k])), -item[1]["bytes"])
    )
    for name, row in listed:
        kind = next(kind for kind in kinds if name.startswith(kind))
        seed = name.partition("seed ")[2] or "-"
        note = NOTES[kind].format(name.split()[1] if kind == "rank" else "")
        values = f"{row['bytes']:,} | {row['data_bytes']:,} | {row['index_bytes']:,} | {row['kl']:.4f} | {row['accuracy']:.2f}"
        lines.append(f"| {note} | {seed} | {values} | {row['seconds']:.0f} |")
    return lines


def joint_lines(result: dict[str, Any]) -> list[str]:
    """Return the section on ResNet-8: levels alone beside ranks and levels together."""
    rows = result["rows"]
    lines = ["## Rank and bits together", "", "ResNet-8 (MLPerf Tiny, published weights, 87.21 %), the same protocol.", ""]
    lines += [*table(result), ""]
    cut = [
        f"`{name}`: {', '.join(f'{layer} in rank {rank}' for layer, rank in row['ranks'].items()) or 'no weight'}"
        for name, row in rows.items()
        if "ranks" in row
    ]
    lines += ["Which weights one price of a bit made pairs of, whether that helped or not: " + "; ".join(cut) + ".", ""]
    coders = [
        f"{row['bytes']:,} bytes coded are {row['xz_bytes']:,} by xz and {row['zlib_bytes']:,} by zlib (`{name}`)"
        for name, row in rows.items()
        if name.startswith("levels") and "seed 0" in name
    ]
    note = "The same levels, one or two bytes each, by general coders of the standard library (xz is LZMA, preset 9): "
    return [*lines, note + "; ".join(coders) + ".", ""]


def page() -> str:
    """Return the page of the results."""
    result = json.loads((RESULTS / "resnet20.json").read_text())
    int8, plain = result["rows"]["int8"], result["rows"]["float32"]
    lines = ["# Coded bytes", "", "This page is written by `python benchmarks/coded.py --render` from the results.", ""]
    lines += [
        "ResNet-20 on CIFAR-10, published weights (1,084,392 bytes of float32 with BatchNorm), without training and without labels.",
        "",
    ]
    lines += [*table(result), ""]
    lines += [
        "`bytes` is the coded file with everything in it; each was decoded into the network again, bit for bit. The",
        "divergence (Kullback-Leibler, from the dense network's outputs, in nats) is on",
        f"{result['held_out']:,} held-out training images, and settings were chosen by it. Accuracy is on all 10,000",
        "test images, which were read once for each row; one standard error of an accuracy is 0.3. A calibration draw",
        "is another 1,024 of the training images. Seconds are processor time, on one core.",
        "",
        f"Beside the coded file, int8 with its scales and float32 biases is {int8['plain_bytes']:,} bytes as it is and",
        f"{int8['zlib_bytes']:,} with zlib; float32 is {plain['plain_bytes']:,} and {plain['zlib_bytes']:,}. NNCodec 2.1.3, on",
        "the first 2,000 test images and not by this runner: 128,829 bytes at 91.6 and 100,026 at 90.4.",
        "",
    ]
    if (RESULTS / "resnet8.json").exists():
        lines += joint_lines(json.loads((RESULTS / "resnet8.json").read_text()))
    lines += [*coded_curves.curves(), *coded_curves.goals()]
    if "speed" in result:
        lines += ["## Speed", "", "| speed of the coder, MB of float32 a second of processor time | encode | decode |", "|---|---:|---:|"]
        lines += [
            f"| {name}, {row['megabytes']:.1f} MB | {row['encode']:.0f} | {row['decode']:.0f} |" for name, row in result["speed"].items()
        ]
        lines += [""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", nargs="?", default="resnet20", choices=list(NETWORKS))
    parser.add_argument("--rows", default="", help="make the rows whose name has this part")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--speed", action="store_true", help="measure the coder's speed only")
    parser.add_argument("--render", action="store_true", help="write the page only")
    parser.add_argument("--check", action="store_true", help="fail where the page is not what the results say")
    args = parser.parse_args()
    if args.check:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == page() else "run python benchmarks/coded.py --render")
    if args.render:
        PAGE.write_text(page(), encoding="utf-8")
        coded_curves.plot()
        return
    torch.set_num_threads(args.threads)
    NETWORK[0] = args.network
    make_folder(RESULTS)
    folder = RUNS
    make_folder(folder)
    path = RESULTS / f"{args.network}.json"
    if not args.speed:
        run(path, folder, args.rows)
    if args.network == "resnet20" and not args.rows:
        speed(path)
    PAGE.write_text(page(), encoding="utf-8")
    coded_curves.plot()


if __name__ == "__main__":
    main()
