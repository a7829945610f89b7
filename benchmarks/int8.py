"""Dense and low-rank networks in float32 and int8, side by side: ``python benchmarks/int8.py [NETWORK ...]``.

Each network is compressed once and kept in ``runs/int8`` (``--epochs`` and ``--images`` change how; a stopped run goes on), then all four
files are written, scored and timed in turns, in ONNX Runtime. ``benchmarks/results/int8/NETWORK.json`` is the result, ``docs/int8.md`` the
page. ``--smoke`` takes few images and writes into a temporary folder, ``--render`` only writes the page, ``--check`` compares it.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectrim as sp
from run import git_state
from spectrim import zoo
from spectrim.metrics.inputs import one_example
from spectrim.pipeline.compress import compress
from spectrim.pipeline.environment import environment
from spectrim.runtimes import Int8, evaluate_exported
from spectrim.runtimes.evaluation import _Runtime
from spectrim.runtimes.export import export
from spectrim.runtimes.int8 import Quantized, quantize
from spectrim.runtimes.readers import open_exported

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS, RUNS = HERE / "results" / "int8", ROOT / "runs" / "int8"
PAGE, PLOTS = ROOT / "docs" / "int8.md", ROOT / "docs" / "plots"
SIMD = (
    "sse4_1",
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "avx_vnni_int8",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
)
FILES = ("dense float32", "dense int8", "low-rank float32", "low-rank int8")


@dataclass(frozen=True)
class Network:
    """One network: where it comes from, how it is compressed and what is read off it."""

    title: str
    model: Callable[[], nn.Module]
    data: Callable[[int | None], Any]
    loss: Callable[[Any, Any], torch.Tensor]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    merit: str
    budget: float
    epochs: int
    images: int | None
    dense_epochs: int = 0
    scheme: Any = "auto"
    clip: float | None = None
    smoke: int = 256
    calibration: int = 256
    note: str = ""


NETWORKS = {
    "resnet8": Network(
        "MLPerf-Tiny ResNet-8, CIFAR-10",
        lambda: zoo.mlperftiny_resnet8(pretrained=True),
        lambda limit: zoo.cifar10(batch_size=128, normalize="raw", limit=limit),
        nn.CrossEntropyLoss(),
        lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True),
        "accuracy", budget=0.5, epochs=2, images=20_000, scheme="spatial",
        note="Its published weights were trained on the validation images, too.",
    ),
    "lenet5": Network(
        "LeNet-5, Fashion-MNIST",
        lambda: zoo.lenet5(),
        lambda limit: zoo.fashion_mnist(batch_size=128, limit=limit),
        nn.CrossEntropyLoss(),
        lambda parameters: torch.optim.Adam(parameters, lr=0.001),
        "accuracy", budget=0.5, epochs=2, images=None, dense_epochs=4, scheme="spatial",
    ),
    "vgg_digits": Network(
        "VGG, small, 8 x 8 digits",
        lambda: zoo.vgg_small(in_channels=1),
        lambda limit: zoo.digits(),
        nn.CrossEntropyLoss(),
        lambda parameters: torch.optim.Adam(parameters, lr=0.001),
        "accuracy", budget=0.5, epochs=5, images=None, dense_epochs=10, calibration=1_078,
    ),
    "stories260k": Network(
        "stories260K language model, TinyStories",
        lambda: zoo.stories260k(),
        lambda limit: zoo.stories(batch_size=16, length=256, limit=limit),
        zoo.language_model_loss,
        lambda parameters: torch.optim.Adam(parameters, lr=0.001),
        "loss", budget=0.7, epochs=1, images=1_000, clip=1.0, smoke=16, calibration=32,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a run can be told."""

    epochs: int | None = None
    images: int | None = None
    seconds: float = 0.2
    repeats: int = 15
    results: Path = RESULTS
    runs: Path = RUNS
    smoke: bool = False


class Limited:
    """The first images of each pass, all splits otherwise whole."""

    def __init__(self, batches: Any, images: int | None) -> None:
        self.batches, self.images = batches, images

    def __len__(self) -> int:
        whole = len(self.batches)
        return whole if self.images is None else min(whole, -(-self.images // self.batches.batch_size))

    def __iter__(self) -> Iterator[Any]:
        for _, batch in zip(range(len(self)), self.batches, strict=False):
            yield batch

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)


def networks(name: str, network: Network, train: Any, data: Any, folder: Path) -> tuple[nn.Module, nn.Module, dict[str, int]]:
    """Return the dense and the merged low-rank network, trained now or before, and the multiply-accumulates of both."""
    torch.manual_seed(0)
    dense = network.model()
    if network.dense_epochs:
        optimizer = torch.optim.Adam(dense.parameters(), lr=0.002)
        sp.fit(dense, train, network.loss, optimizer, network.dense_epochs, checkpoint=folder / "dense", progress=False)
    made = compress(
        dense, train, network.loss, sp.Budget(macs=network.budget), network.epochs, eval_data=data.val, scheme=network.scheme,
        tuning=sp.Tuning(network.optimizer, clip=network.clip), folder=folder / "low", progress=False,
    )  # fmt: skip
    return dense.eval(), made.model.eval(), {key: made.measured[key].macs or 0 for key in ("dense", "final")}


def run(name: str, settings: Settings) -> dict[str, Any]:
    """Compress, write four files, score and time them; return the content of the result file."""
    network, begin = NETWORKS[name], time.perf_counter()
    network = replace(network, epochs=network.epochs if settings.epochs is None else settings.epochs)
    network = replace(network, images=settings.images or (network.smoke if settings.smoke else network.images))
    data = network.data(network.smoke if settings.smoke else None)
    train = Limited(data.train, network.images)
    folder = settings.runs / f"{name}-{network.epochs}-{network.images or 'all'}"
    dense, low, macs = networks(name, network, train, data, folder)
    inputs, examples = one_example(data.val), calibration(network)
    files, made = write(folder, dense, low, examples)
    scores = {
        split: {key: evaluate_exported(path, getattr(data, split), network.loss) for key, path in files.items()}
        for split in ("val", "test")
    }
    modules = {key: _Runtime(open_exported(path, threads=1)) for key, path in files.items()}
    times = sp.compare_latency(modules, inputs, threads=1, repeats=settings.repeats, min_time=settings.seconds)
    rows = {}
    for key in FILES:
        kind, precision = key.split()
        report = made[kind]
        rows[key] = {
            "macs": macs["dense" if kind == "dense" else "final"],
            "size_bytes": report.size_bytes if precision == "int8" else report.float_bytes,
            "val": scores["val"][key], "test": scores["test"][key],
            "latency_s": times[key].median_s, "latency_iqr_s": times[key].iqr_s, "runs": times[key].runs,
        }  # fmt: skip
        if precision == "int8":
            rows[key] |= {name: report.to_dict()[name] for name in ("method", "error", "difference", "layers", "operators")}
    return {
        "network": name, "title": network.title, "merit": network.merit, "note": network.note, "budget_macs": network.budget,
        "epochs": network.epochs, "images": network.images, "dense_epochs": network.dense_epochs,
        "calibration": asdict(Int8()) | {"examples": network.calibration},
        "rows": rows, "choices": choices(folder, low, examples, data.val, network), "batch": 1, "threads": 1, "processor": processor(),
        "seconds": round(time.perf_counter() - begin, 1), "git": git_state(),
        "environment": environment() | {"runtime": {part: version(part) for part in ("onnx", "onnxruntime")}},
    }  # fmt: skip


def calibration(network: Network) -> list[Any]:
    """Return the training batches of the first epoch that calibrate."""
    return list(network.data(network.calibration).train)


def write(folder: Path, dense: nn.Module, low: nn.Module, examples: list[Any]) -> tuple[dict[str, Path], dict[str, Quantized]]:
    """Write the four files."""
    files, made = {}, {}
    for kind, model in (("dense", dense), ("low-rank", low)):
        files[f"{kind} float32"] = export(model, examples[0][0], folder / f"{kind}-float32.onnx").path
        files[f"{kind} int8"] = folder / f"{kind}-int8.onnx"
        made[kind] = quantize(files[f"{kind} float32"], examples, files[f"{kind} int8"])
    return files, made


def choices(folder: Path, low: nn.Module, examples: list[Any], val: Any, network: Network) -> dict[str, dict[str, Any]]:
    """Return what other settings give for the low-rank network, on the validation split."""
    pairs = [name for name, module in low.named_modules() if isinstance(module, nn.Sequential) and is_pair(module)]
    source, target = folder / "low-rank-float32.onnx", folder / "choice.onnx"
    static = network.merit == "accuracy"
    ways: dict[str, tuple[Int8, Any]] = {
        "channels between pairs as they come": (Int8(equalize=False), None),
        "8-bit weights": (Int8(weight_bits=8), None),
        "low-rank pairs in float": (Int8(), sp.match(*pairs) if pairs else None),
    } | ({"ranges by percentile 99.999": (Int8(ranges="percentile"), None)} if static else {})
    found: dict[str, dict[str, Any]] = {}
    for title, (how, keep) in ways.items():
        if title == "low-rank pairs in float" and keep is None:
            continue
        made = quantize(source, examples, target, how, keep=keep)
        score = evaluate_exported(target, val, network.loss)[network.merit]
        found[title] = {"error": made.error, "val": score, "size_bytes": made.size_bytes}
    target.unlink()
    return found


def is_pair(module: nn.Sequential) -> bool:
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return len(module) == 2 and all(isinstance(part, layers) for part in module) and module[0].bias is None


def processor() -> dict[str, Any]:
    """Return the processor's name and those of its instructions that matter for int8."""
    lines: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            lines.setdefault(key.strip(), value.strip())
    flags = set((lines.get("flags") or lines.get("Features") or "").split())
    return {
        "name": lines.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in SIMD if flag in flags],
    }


# The page


HEAD = """# int8

This page is written by `python benchmarks/int8.py` from the files in `benchmarks/results/int8`, which it wrote. Each network is measured
dense and low-rank, each in float32 and in int8 (`quantize` with its defaults), as ONNX files in ONNX Runtime. The low-rank network is the
result of `compress` under the stated budget. Calibration uses training batches; the test split is read once for each file. *Size* is that
of the file without the exporter's metadata. *Latency*: batch 1, one thread, all four files alternately; the median and, in brackets, the
interquartile range. *Error* is the root mean square error of the int8 network's outputs on the calibration examples, as a fraction of its
float32 outputs.

How to make such files: [Quantize to int8](howto/int8.md).
"""
VNNI = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm")


def load(name: str, results: Path = RESULTS) -> dict[str, Any] | None:
    path = results / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def shown(merit: str, value: float) -> str:
    return f"{100 * value:.2f}" if merit == "accuracy" else f"{value:.4f}"


def section(name: str, result: dict[str, Any] | None) -> str:
    if result is None:
        return f"\n## {NETWORKS[name].title}\n\nNot measured yet: `python benchmarks/int8.py {name}`.\n"
    merit, rows, first = result["merit"], result["rows"], result["rows"][FILES[0]]
    unit = "accuracy, %" if merit == "accuracy" else "loss, nats per token"
    body = [
        [
            key, shown(merit, row["test"][merit]), shown(merit, row["val"][merit]), f"{row['size_bytes'] / 1000:,.1f}",
            f"{first['size_bytes'] / row['size_bytes']:.2f}x", f"{1e3 * row['latency_s']:.3f} ({1e3 * row['latency_iqr_s']:.3f})",
            f"{first['latency_s'] / row['latency_s']:.2f}x", f"{100 * row['error']:.1f} %" if "error" in row else "",
        ]
        for key, row in rows.items()
    ]  # fmt: skip
    head = ["", f"test {unit}", f"validation {unit}", "size, kB", "compression", "latency, ms", "speedup", "error"]
    low, dense = rows["low-rank int8"], rows["dense int8"]
    done = {kind: sum(state == "int8" for state in row["layers"].values()) for kind, row in (("dense", dense), ("low-rank", low))}
    kept = sorted({state for row in (dense, low) for state in row["layers"].values() if state != "int8"})
    parts = [f"{done[kind]} of {len(row['layers'])} layers of the {kind} network" for kind, row in (("dense", dense), ("low-rank", low))]
    count = f"int8 are {' and '.join(parts)}"
    training = f"epochs: {result['epochs']}" + (f" of {result['images']:,} examples" if result["images"] else "")
    flags, cpu = result["processor"]["flags"], result["processor"]["name"]
    wide = "with" if set(flags) & set(VNNI) else "without"
    same = {"val": low["val"][merit], "error": low["error"], "size_bytes": low["size_bytes"]}
    choice = [
        [title, shown(merit, row["val"]), f"{100 * row['error']:.1f} %", f"{row['size_bytes'] / 1000:,.1f}"]
        for title, row in {"as in the table": same, **result["choices"]}.items()
    ]
    text = [f"\n## {result['title']}\n\n", table(head, body), f"\n{count}"]
    text += [
        "; the rest: " + "; ".join(kept) if kept else "",
        f". Ranges are {low['method']}. Low-rank: `Budget(macs={result['budget_macs']})`, ",
    ]
    text += [f"{training}. {result['note']}".rstrip(), f"\n\n![{result['title']}](plots/int8-{name}.svg)\n\n"]
    text += ["Other settings for the low-rank network, validation split:\n\n", table(["", unit, "error", "size, kB"], choice)]
    versions = result["environment"]["runtime"] | {"torch": result["environment"]["versions"]["torch"]}
    text += [f"\nMeasured on {cpu} {wide} int8 dot products ({', '.join(flags)}), "]
    return "".join(text) + ", ".join(f"{part} {number}" for part, number in versions.items()) + ".\n"


def render(results: Path = RESULTS) -> str:
    return HEAD + "".join(section(name, load(name, results)) for name in NETWORKS)


def draw(name: str, result: dict[str, Any], folder: Path) -> None:
    """Draw merit against bytes and against latency."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "spectrim"
    from matplotlib import pyplot as plt

    merit = result["merit"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for key, marker, color in zip(FILES, "osos", ("tab:blue", "tab:blue", "tab:orange", "tab:orange"), strict=True):
        row = result["rows"][key]
        y = row["test"][merit] * (100 if merit == "accuracy" else 1)
        style = {"marker": marker, "color": color, "linestyle": "none", "fillstyle": "none" if "float" in key else "full", "markersize": 8}
        axes[0].plot(row["size_bytes"] / 1000, y, label=key, **style)
        axes[1].errorbar(1e3 * row["latency_s"], y, xerr=500 * row["latency_iqr_s"], capsize=2, **style)
    for axis, label in zip(axes, ("size, kB", "latency, ms (batch 1, one thread)"), strict=True):
        axis.set(xlabel=label, xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %" if merit == "accuracy" else "test loss, nats per token")
    axes[0].legend(fontsize="small")
    figure.suptitle(result["title"], fontsize="medium")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"int8-{name}.svg", metadata={"Date": None})
    plt.close(figure)


def page(results: Path = RESULTS, target: Path = PAGE, plots: Path = PLOTS) -> None:
    target.write_text(render(results), encoding="utf-8")
    for name in NETWORKS:
        if result := load(name, results):
            draw(name, result, plots)


def save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}; all when omitted")
    parser.add_argument("--epochs", type=int, help="of fine-tuning the low-rank network")
    parser.add_argument("--images", type=int, help="training examples in an epoch")
    parser.add_argument("--smoke", action="store_true", help="a few examples of each split, results into a temporary folder")
    parser.add_argument("--render", action="store_true", help="write the page, measure nothing")
    parser.add_argument("--check", action="store_true", help="whether the page is up to date")
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.networks) - set(NETWORKS)):
        sys.exit(f"no such network: {', '.join(unknown)}; there are: {', '.join(NETWORKS)}")
    if given.check:
        return (
            0
            if PAGE.read_text(encoding="utf-8") == render()
            else sys.exit(f"{PAGE} is out of date: run python benchmarks/int8.py --render")
        )
    if given.render:
        page()
        return 0
    torch.set_num_threads(1)
    settings, target, plots = Settings(given.epochs, given.images), PAGE, PLOTS
    if given.smoke:
        folder = Path(tempfile.mkdtemp(prefix="int8-"))
        settings = Settings(1, None, 0.01, 2, folder / "results", folder / "runs", smoke=True)
        target, plots = folder / "int8.md", folder / "plots"
    for name in given.networks or NETWORKS:
        result = run(name, settings)
        save(settings.results / f"{name}.json", result)
        line = ", ".join(f"{key} {shown(result['merit'], row['test'][result['merit']])}" for key, row in result["rows"].items())
        print(f"{name}: {line}; {result['seconds']:.0f} s", flush=True)
    page(settings.results, target, plots)
    print(f"written: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
