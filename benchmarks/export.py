"""Seven networks, dense and at half the multiply-accumulates, in four formats: equal to torch? how large? how fast?

.venv/bin/python benchmarks/export.py [NETWORK ...]     # writes benchmarks/results/export/NETWORK.json, then docs/export.md
.venv/bin/python benchmarks/export.py --smoke [NETWORK ...]     # few repetitions, into a temporary folder; the page stays
.venv/bin/python benchmarks/export.py --render | --check     # docs/export.md from these files

Batch 1, one thread; all files of a network, and the network itself in torch, are timed in turns.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as sp
from networks import vit
from run import git_state
from spectrim import zoo
from spectrim.errors import ExportError, FormatError
from spectrim.files import write_text
from spectrim.metrics.calls import call_model
from spectrim.metrics.clock import Latency, compare_latency
from spectrim.metrics.macs import count_macs
from spectrim.pipeline.environment import environment
from spectrim.runtimes.export import TOLERANCE, export
from spectrim.runtimes.formats import TITLES, Runner
from spectrim.runtimes.readers import open_exported
from spectrim.runtimes.tensors import compare_outputs
from spectrim.tables import SUFFIXES

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "export"
PAGE = HERE.parent / "docs" / "export.md"
BUDGET = 0.5
BATCHES = (1, 4)
FORMATS = {format: suffix for suffix, format in SUFFIXES.items() if format != "litert"}  # which takes another environment, with jax
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "executorch", "openvino", "transformers")
HEAD = f"""# Export

This page is written by `python benchmarks/export.py` from the files in `benchmarks/results/export`, which it writes first. Each network
is written dense and cut to {100 * BUDGET:.0f} % of its multiply-accumulates (`allocate`, `prune`, `merge`; no fine-tuning, which does not
change the time), for a batch of any size (ExecuTorch: up to {max(BATCHES)}). Inputs are examples of the validation split. *Difference* is
the largest difference to torch's outputs at batch {" and ".join(map(str, BATCHES))}, as a fraction of the output's largest magnitude; a
file that differs by more than {TOLERANCE:g} is not written. Times are for one example on one thread, median and interquartile range; all
files of a network are timed alternately. *XNNPACK* is the fraction of operators that XNNPACK runs; the others use ExecuTorch's slower
portable kernels.
"""


@dataclass(frozen=True)
class Case:
    """A network and its inputs."""

    title: str
    make: Callable[[], nn.Module]
    data: Callable[[], zoo.Splits]
    scheme: Any = "auto"
    weights: str = "pretrained"
    where: Any = None


def images() -> zoo.Splits:
    return zoo.cifar10(batch_size=max(BATCHES), limit=8)


CASES = {
    "resnet8": Case(
        "MLPerf-Tiny ResNet-8, CIFAR-10",
        lambda: zoo.mlperftiny_resnet8(pretrained=True),
        lambda: zoo.cifar10(batch_size=max(BATCHES), limit=8, normalize="raw"),
        "spatial",
    ),
    "resnet20": Case("ResNet-20, CIFAR-10", lambda: zoo.resnet20(pretrained="akamaster"), images, "spatial"),
    "lenet5": Case("LeNet-5, Fashion-MNIST", zoo.lenet5, lambda: zoo.fashion_mnist(batch_size=max(BATCHES), limit=8), weights="random"),
    "vgg": Case("VGG, 64 to 256 channels, CIFAR-10", zoo.vgg_small, images, weights="random"),
    "lstm": Case(
        "LSTM language model, Penn Treebank, 8 words",
        lambda: zoo.LSTMLanguageModel(10_000, 128, 128, 2),
        lambda: zoo.ptb(batch_size=max(BATCHES), length=8, limit=8),
        weights="random",
        where=sp.match("*"),  # most of its multiplications are in the head
    ),
    "stories260k": Case(
        "stories260K language model (Llama), 64 tokens", zoo.stories260k, lambda: zoo.stories(batch_size=max(BATCHES), length=64, limit=8)
    ),
    "vit": Case("ViT, 4 blocks of 192 (transformers), CIFAR-10", vit, images, weights="random"),
}


class Running(nn.Module):
    """A file as a module, for the clock."""

    def __init__(self, run: Runner) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


def both(case: Case) -> tuple[dict[str, nn.Module], Tensor]:
    """Return the dense network and the low-rank one, and a batch of real inputs."""
    torch.manual_seed(0)
    x = next(iter(case.data().val))[0].contiguous()
    dense = case.make().eval()
    low = sp.factorize(dense, case.scheme, case.where)
    ranks = sp.allocate(low, sp.Budget(macs=BUDGET), x[:1])
    return {"dense": dense, "low_rank": sp.merge(sp.prune(low, ranks)).eval()}, x


def write_file(network: nn.Module, x: Tensor, path: Path) -> tuple[dict[str, Any], Running | None]:
    """Write one file, and compare it with the network; return what was found, and the file in its own runtime."""
    start = time.perf_counter()
    try:
        made = export(network, x, path, max_batch=max(BATCHES))
    except ExportError as error:
        return {"error": error.problem, "operator": error.operator, "layer": error.layer}, None
    entry: dict[str, Any] = {"size_bytes": made.size_bytes, "seconds_to_write": time.perf_counter() - start, "operators": made.operators}
    entry |= {} if made.delegated is None else {"delegated": made.delegated}
    run = open_exported(path, threads=1)
    with torch.no_grad():
        outputs = {batch: call_model(network, x[:batch]) for batch in BATCHES}
    entry["differences"] = {
        str(batch): compare_outputs(run(x[:batch]), [output if isinstance(output, Tensor) else output[0]])
        for batch, output in outputs.items()
    }
    return entry, Running(run)


def measure(name: str, case: Case, folder: Path, repeats: int, min_time: float) -> dict[str, Any]:
    """Write all files of a network, then time them and the network itself in turns."""
    networks, x = both(case)
    found: dict[str, dict[str, Any]] = {"torch": {}}
    running: dict[str, nn.Module] = {}
    for kind, network in networks.items():
        size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
        found["torch"][kind] = {"size_bytes": size}
        running[f"torch {kind}"] = network
        for format, suffix in FORMATS.items():
            entry, file = write_file(network, x, folder / f"{name}-{kind}{suffix}")
            found.setdefault(format, {})[kind] = entry
            if file is not None:
                running[f"{format} {kind}"] = file
            print(f"{name:12} {format:10} {kind:8}", entry.get("differences") or entry.get("error"), flush=True)
    timed: dict[str, Latency] = compare_latency(running, x[:1], repeats=repeats, min_time=min_time)
    for key, latency in timed.items():
        format, kind = key.split()
        found[format][kind] |= {"latency": asdict(latency)}
    macs = {kind: count_macs(network, x[:1]) for kind, network in networks.items()}
    return {"network": name, "title": case.title, "weights": case.weights, "macs": macs, "formats": found} | about()


def about() -> dict[str, Any]:
    """Return what the numbers depend on."""
    described = environment()
    described["versions"] |= {package: version(package) for package in PACKAGES if find_spec(package)}
    return {"environment": described, "git": git_state()}


# The page


def render() -> str:
    paths = [RESULTS / f"{name}.json" for name in CASES if (RESULTS / f"{name}.json").is_file()]
    parts = [HEAD, *(section(json.loads(path.read_text(encoding="utf-8"))) for path in paths)]
    missing = [case.title for name, case in CASES.items() if RESULTS / f"{name}.json" not in paths]
    return "\n".join(parts) + (f"\nNot measured yet: {'; '.join(missing)}.\n" if missing else "")


def section(result: dict[str, Any]) -> str:
    macs, env = result["macs"], result["environment"]
    head = ("", "size, dense", "low-rank", "difference, dense", "low-rank", "time, dense", "low-rank", "speed-up", "XNNPACK")
    lines = [f"## {result['title']}\n", "| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    failures = []
    for format, kinds in result["formats"].items():
        entries = [kinds["dense"], kinds["low_rank"]]
        cells = [*map(size_text, entries), *map(difference_text, entries), *map(time_text, entries), speedup(*entries)]
        delegated = [f"{100 * entry['delegated']:.0f} %" for entry in entries if "delegated" in entry]
        lines.append("| " + " | ".join([TITLES.get(format, "torch"), *cells, ", ".join(delegated) or "-"]) + " |")
        failures += [f"{TITLES[format]}, {kind.replace('_', '-')}: {failure(entry)}" for kind, entry in kinds.items() if "error" in entry]
    threads = next(iter(result["formats"]["torch"].values()))["latency"]["threads"]
    note = f"*{macs['dense']:,} and {macs['low_rank']:,} multiply-accumulates; {result['weights']} weights; "
    note += f"{env['machine']}, {threads} thread, torch {env['versions']['torch']}.*"
    return "\n".join([*lines, "", *(f"- not written: {text}" for text in failures), *([""] if failures else []), note, ""])


def failure(entry: dict[str, Any]) -> str:
    where = " in ".join(
        part for part in (entry["operator"] and f"`{entry['operator']}`", entry["layer"] and f"layer `{entry['layer']}`") if part
    )
    return f"{where or 'the model'}: {entry['error']}"


def size_text(entry: dict[str, Any]) -> str:
    return f"{entry['size_bytes'] / 1e3:,.0f} kB" if "size_bytes" in entry else "-"


def difference_text(entry: dict[str, Any]) -> str:
    return f"{max(entry['differences'].values()):.1e}" if "differences" in entry else "-"


def time_text(entry: dict[str, Any]) -> str:
    found = entry.get("latency")
    return f"{1e3 * found['median_s']:.3f} ({1e3 * found['iqr_s']:.3f}) ms" if found else "-"


def speedup(dense: dict[str, Any], low: dict[str, Any]) -> str:
    return f"{dense['latency']['median_s'] / low['latency']['median_s']:.2f}" if "latency" in dense and "latency" in low else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(CASES)}; all when omitted")
    parser.add_argument("--smoke", action="store_true", help="few repetitions, into a temporary folder")
    parser.add_argument("--render", action="store_true", help="write the page from the files")
    parser.add_argument("--check", action="store_true", help="compare the page with the files")
    args = parser.parse_args()
    if args.check:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == render() else f"{PAGE} is out of date: run python benchmarks/export.py --render")
    if unknown := sorted(set(args.networks) - set(CASES)):
        sys.exit(f"unknown networks {', '.join(unknown)}; known: {', '.join(CASES)}")
    if not args.render:
        torch.set_num_threads(1)
        repeats, min_time = (1, 0.01) if args.smoke else (5, 0.2)
        for name in args.networks or CASES:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    result = measure(name, CASES[name], Path(folder), repeats, min_time)
                except (FormatError, ImportError) as error:  # no data, or no transformers
                    print(f"{name:12} skipped: {error}", flush=True)
                    continue
                target = Path(tempfile.mkdtemp() if args.smoke else RESULTS) / f"{name}.json"
                target.parent.mkdir(parents=True, exist_ok=True)
                write_text(target, json.dumps(result, indent=1) + "\n")
                print(f"written: {target}", flush=True)
                if args.smoke:
                    print(section(result), flush=True)
    if not args.smoke:
        write_text(PAGE, render())


if __name__ == "__main__":
    main()
