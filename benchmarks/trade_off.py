"""Accuracy against measured seconds and against bytes, for what a user can choose from: ``python benchmarks/trade_off.py --latency``.

Accuracies are those of ``benchmarks/results/compare`` and ``benchmarks/results/int8``, after the same fine-tuning for each method. Seconds
and bytes depend on the architecture and the ranks alone: the networks are built again from what the result files hold, with random weights,
and written as ONNX files (``--prepare``, once), which are timed in turns in one process (``--latency``; resumable by network). ``--render``
writes ``docs/trade-off.md`` and its plots from the result files, ``--check`` compares.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cells import mean_std
from spectrim import factorize, match, merge
from spectrim.files import write_text
from spectrim.metrics.macs import count_macs
from spectrim.pipeline.components import make
from spectrim.pipeline.environment import environment
from spectrim.runtimes.export import export
from spectrim.runtimes.int8 import quantize

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
COMPARE, INT8, RESULTS = HERE / "results" / "compare", HERE / "results" / "int8", HERE / "results" / "trade_off"
FILES, PAGE, PLOTS = ROOT / "runs" / "trade_off", ROOT / "docs" / "trade-off.md", ROOT / "docs" / "plots"
ROUNDS, SECONDS = 15, 0.04
"""Rounds in which every network is run for so many seconds."""


@dataclass(frozen=True)
class Network:
    """One network: its title, one example, and whether a lower merit is better."""

    title: str
    example: Callable[[], Any]
    merit: Callable[[dict[str, float]], float] = lambda scores: 100 * scores["accuracy"]
    axis: str = "test accuracy, %"
    lower: bool = False


NETWORKS = {
    "resnet8": Network("MLPerf-Tiny ResNet-8, CIFAR-10", lambda: torch.rand(1, 3, 32, 32)),
    "lenet5": Network("LeNet-5, Fashion-MNIST", lambda: torch.rand(1, 1, 28, 28)),
    "vit": Network("small ViT, Fashion-MNIST", lambda: torch.rand(1, 1, 28, 28)),
    "resnet20": Network("ResNet-20, CIFAR-10", lambda: torch.rand(1, 3, 32, 32)),
    "ptb_lstm": Network(
        "LSTM, Penn Treebank", lambda: torch.randint(10000, (1, 35)), lambda scores: 2.718281828459045 ** scores["loss"], "test perplexity",
        lower=True,
    ),
}  # fmt: skip

METHODS = {
    "dense": "dense",
    "dense int8": "int8",
    "narrow": "narrower network",
    "filters": "filter pruning",
    "truncated": "truncated SVD",
    "ours": "`compress`",
    "ours interpolative": "`compress`, interpolative writing",
    "low-rank int8": "truncated SVD, int8",
}
"""By the name in the result files: what the page calls it. ``truncated`` is distilled where no other row stands."""

LOOKS = {
    "dense": ("#57606a", "D"),
    "dense int8": ("#57606a", "P"),
    "narrow": ("#cc79a7", "v"),
    "filters": ("#009e73", "s"),
    "truncated": ("#d55e00", "^"),
    "ours": ("#0072b2", "o"),
    "ours interpolative": ("#56b4e9", "o"),
    "low-rank int8": ("#e69f00", "P"),
}


@dataclass(frozen=True)
class Row:
    """One point: a method at a budget, and what its seeds reached."""

    method: str
    budget: float
    merits: tuple[float, ...]
    first: dict[str, Any]
    epochs: int

    @property
    def name(self) -> str:
        """As in the result file."""
        return self.method if self.method.startswith("dense") else f"{self.method} {self.budget:g}"


# What the result files hold


def rows_of(name: str) -> list[Row]:
    """Return the points of a network that have an accuracy, method by method."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for path in sorted((COMPARE / name).glob("*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        method = one["method"]
        if method == "truncated_distilled" and not any((COMPARE / name).glob("truncated-*.json")):
            method = "truncated"
        if method in METHODS and one["epochs"]:
            found.setdefault((method, one["budget"]), []).append(one)
    merit, runs = NETWORKS[name].merit, [one for many in found.values() for one in many]
    seen = {one["seed"]: merit(one["dense"]["test"]) for one in runs}
    rows = [Row("dense", 1.0, tuple(seen.values()), runs[0], 0)]
    for (method, budget), many in sorted(found.items(), key=lambda item: (list(METHODS).index(item[0][0]), -item[0][1])):
        rows.append(Row(method, budget, tuple(merit(one["final"]["test"]) for one in many), many[0], many[0]["epochs"]))
        if method == "ours":
            rows.append(Row("ours interpolative", budget, rows[-1].merits, many[0], many[0]["epochs"]))
    return rows + list(_int8_rows(name, rows))


def _int8_rows(name: str, rows: Sequence[Row]) -> Iterator[Row]:
    """Yield int8: what it changed in the networks of ``benchmarks/int8.py``, dense and cut at a cost of a row here, added to these rows."""
    if not (INT8 / f"{name}.json").exists():
        return
    held = json.loads((INT8 / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    for kind, method in (("dense", "dense"), ("low-rank", "truncated")):
        before, after = (NETWORKS[name].merit(held[f"{kind} {number}"]["test"]) for number in ("float32", "int8"))
        for row in rows:
            if row.method == method and (kind == "dense" or row.first["final"]["macs"] == held[f"{kind} int8"]["macs"]):
                yield replace(row, method=f"{kind} int8", merits=tuple(merit + after - before for merit in row.merits))


# The networks again, with random weights


def build(name: str, row: Row) -> nn.Module | None:
    """Return the architecture of a row; None where it cannot be built as it was, or is that of another row."""
    settings, notes = row.first["settings"], row.first["notes"]
    model = {**settings["model"], "init_args": {**settings["model"]["init_args"]}}
    if row.method == "narrow":
        own = row.first["knobs"]["model"]
        own = {"class_path": own} if isinstance(own, str) else own
        model = {"class_path": own["class_path"], "init_args": {**own.get("init_args", {}), "width": notes["width"]}}
    torch.manual_seed(0)
    dense = make(model, "model").eval()
    if row.method.startswith("dense"):
        return dense
    if row.method == "narrow":
        return _as_it_was(name, row, dense)
    if row.method == "filters":
        return _as_it_was(name, row, _filtered(name, dense, notes))
    where = None if settings["where"] is None else match(*settings["where"])
    writing: Any = "interpolative" if row.method.endswith("interpolative") else "pair"
    low = factorize(dense, settings["scheme"], where, rank=row.first["ranks"], writing=writing)
    merged = merge(low)
    if writing == "pair":
        return _as_it_was(name, row, merged)
    return None if sum(parameter.numel() for parameter in merged.parameters()) == row.first["final"]["params"] else merged


def _filtered(name: str, dense: nn.Module, notes: dict[str, Any]) -> nn.Module:
    import torch_pruning

    from spectrim.surgery.select import head_of

    head = dense.get_submodule(head_of(dense) or "")
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    ratio, everywhere = 1 - notes["channels_kept"], notes["channels"] == "global"
    torch_pruning.pruner.MagnitudePruner(
        dense, NETWORKS[name].example(), importance, global_pruning=everywhere, pruning_ratio=ratio, ignored_layers=[head]
    ).step()
    return dense


def _as_it_was(name: str, row: Row, model: nn.Module) -> nn.Module | None:
    """Return the network where its parameters and multiply-accumulates are those of the row."""
    found = sum(parameter.numel() for parameter in model.parameters()), count_macs(model, NETWORKS[name].example())
    return model if found == (row.first["final"]["params"], row.first["final"]["macs"]) else None


def prepare(name: str) -> dict[str, Path]:
    """Write the ONNX files of a network that are not there; return all of them by row."""
    folder, files = FILES / name, {}
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows_of(name):
        path, missing = folder / f"{row.name.replace(' ', '-')}.onnx", folder / f"{row.name.replace(' ', '-')}.none"
        if not path.exists() and not missing.exists():
            model = build(name, row)
            if model is None:
                missing.touch()
                print(f"{name}: no file of {row.name}", flush=True)
                continue
            source = folder / "float.onnx" if row.method.endswith("int8") else path.with_suffix(".part.onnx")
            export(model, NETWORKS[name].example(), source, dynamic_batch=False, progress=False)
            if row.method.endswith("int8"):
                quantize(source, [NETWORKS[name].example() for _ in range(8)], path)
            else:
                source.rename(path)
            print(f"{name}: {row.name}", flush=True)
        if path.exists():
            files[row.name] = path
    return files


# Seconds


def measure(name: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Time the files of a network in turns."""
    sys.path.append(str(HERE / "micro"))  # behind its own: both have a networks.py
    import onnxruntime

    from harness import in_turns

    files, steps, session = prepare(name), {}, None
    for row, path in files.items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: NETWORKS[name].example().numpy()}
        steps[row] = partial(session.run, None, feed)
    taken = in_turns(steps, rounds=rounds, min_time=seconds)
    entries = {}
    for row, values in taken.items():
        low, median, high = statistics.quantiles(values, n=4)
        entries[row] = {"latency_s": median, "low_s": low, "high_s": high, "bytes": weight_bytes(files[row])}
    about = {
        "batch": 1,
        "threads": 1,
        "rounds": rounds,
        "onnxruntime": onnxruntime.__version__,
        "load": os.getloadavg()[0],
        "environment": environment(),
    }
    return {"network": name, "rows": entries, **about}


def weight_bytes(path: Path) -> int:
    """Return the bytes of all constants in an ONNX file; names and descriptions would be a tenth of the smallest ones."""
    import onnx

    return sum(onnx.numpy_helper.to_array(constant).nbytes for constant in onnx.load(path).graph.initializer)


# The page


def render() -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    for name, network in NETWORKS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            parts.append(section(name, network, json.loads(path.read_text(encoding="utf-8"))))
    return "\n".join(parts)


def section(name: str, network: Network, timed: dict[str, Any]) -> str:
    """Return a network's part of the page."""
    rows = rows_of(name)
    base = timed["rows"]["dense"]
    head = f"| | MACs kept | seeds | {network.axis} | bytes | of dense | milliseconds | times as fast | best |"
    lines = [f"## {network.title}", "", f"![{network.axis} against milliseconds and bytes](plots/trade-off-{name}.svg)", "", head]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    points = {row.name: point(row, network, timed) for row in rows}
    for row in shown(rows, timed):
        entry = timed["rows"].get(row.name)
        cells = [METHODS[row.method], f"{100 * row.budget:.3g} %" if row.budget < 1 else "", str(len(row.merits)), mean_std(row.merits)]
        if entry is None:
            cells += ["-", "-", "not built again", "-", ""]
        else:
            spread = f"{1e3 * entry['latency_s']:.3f} ({1e3 * entry['low_s']:.3f} to {1e3 * entry['high_s']:.3f})"
            share = f"{100 * entry['bytes'] / base['bytes']:.0f} %"
            fast = f"{base['latency_s'] / entry['latency_s']:.2f}"
            best = ", ".join(axis for place, axis in enumerate(("time", "bytes"), 1) if leads(row.name, points, place))
            cells += [f"{entry['bytes']:,}", share, spread, fast, best]
        lines.append(f"| {' | '.join(cells)} |")
    epochs = sorted({row.epochs for row in rows if row.epochs})
    where = f"{timed['environment']['machine']}, ONNX Runtime {timed['onnxruntime']}, load {timed['load']:.1f}"
    lines += ["", f"*Fine-tuned for {' or '.join(map(str, epochs))} epochs. {where}.*", ""]
    return "\n".join(lines)


def shown(rows: Sequence[Row], timed: dict[str, Any]) -> list[Row]:
    """Leave out interpolative writings that change nothing and so have no file."""
    return [row for row in rows if row.method != "ours interpolative" or row.name in timed["rows"]]


def point(row: Row, network: Network, timed: dict[str, Any]) -> tuple[float, float, float] | None:
    """Return merit (higher is better), seconds and bytes."""
    entry = timed["rows"].get(row.name)
    merit = statistics.fmean(row.merits)
    return None if entry is None else (-merit if network.lower else merit, entry["latency_s"], entry["bytes"])


def leads(name: str, points: dict[str, Any], place: int) -> bool:
    """Return whether no other row is at least as good in merit and in one cost."""
    own, others = points[name], [other for key, other in points.items() if key != name and other is not None]
    return not any(other[0] >= own[0] and other[place] <= own[place] and other != own for other in others)


INTRODUCTION = """# Accuracy against seconds and bytes

This page is written by `python benchmarks/trade_off.py --render`. Accuracies (mean and deviation over seeds) are those of the
[comparison](comparison.md), after the same fine-tuning for each method. For int8 they are those of the network in float, plus
what int8 changed in a network of that kind in [its measurement](int8.md). *bytes* are those of all constants in the ONNX file;
*milliseconds* are medians with quartiles of calls of ONNX Runtime, batch 1, one thread, all networks of a section in turns.
*best* marks rows that no other row beats in accuracy and in that cost at once.

A narrower network starts from random weights; with few epochs it stays far below. Ranks were chosen for multiply-accumulates, not
for seconds: [ranks by the clock](speed.md) are faster. The interpolative writing computes the same function as the pair; where it
changes no layer it is left out. Networks that cannot be built again from the result files, such as pruned ones whose channels
followed trained weights, have no seconds.
"""


def draw(name: str, network: Network, timed: dict[str, Any]) -> None:
    """Draw merit against seconds and against bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.hashsalt": "spectrim", "svg.fonttype": "none", "font.size": 10})
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    rows = [row for row in shown(rows_of(name), timed) if row.name in timed["rows"]]
    for panel, (key, scale, label) in zip(
        figure.subplots(1, 2, sharey=True),
        (("latency_s", 1e3, "milliseconds, ONNX Runtime"), ("bytes", 1e-3, "kilobytes of weights")),
        strict=True,
    ):
        for method in METHODS:
            own = [row for row in rows if row.method == method]
            x = [scale * timed["rows"][row.name][key] for row in own]
            y = [statistics.fmean(row.merits) for row in own]
            spread = [statistics.stdev(row.merits) if len(row.merits) > 1 else 0.0 for row in own]
            color, mark = LOOKS[method]
            if own:
                panel.errorbar(x, y, spread, color=color, marker=mark, capsize=3, linewidth=1, label=METHODS[method].replace("`", ""))
        panel.set(xlabel=label, xlim=(0, None))
        panel.grid(alpha=0.3)
        if key == "latency_s":
            panel.set(ylabel=network.axis)
    figure.suptitle(network.title)
    figure.legend(*panel.get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside right center")
    figure.savefig(PLOTS / f"trade-off-{name}.svg", metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the options say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)} (default: all)")
    for option, text in (
        ("--prepare", "write the ONNX files"), ("--latency", "time them, on a quiet machine"), ("--render", "write the page"),
        ("--check", "compare the page"),
    ):  # fmt: skip
        parser.add_argument(option, action="store_true", help=text)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    given = parser.parse_args(arguments)
    names = [name for name in NETWORKS if name in (given.networks or NETWORKS)]
    torch.set_num_threads(1)
    for name in names if given.prepare else ():
        prepare(name)
    for name in names if given.latency else ():
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_text(RESULTS / f"{name}.json", json.dumps(measure(name, given.rounds, given.seconds), indent=1) + "\n")
        print(f"{name}: timed", flush=True)
    if given.check:
        return 0 if PAGE.read_text(encoding="utf-8") == render() else sys.exit(f"{PAGE} is out of date")
    if given.render:
        write_text(PAGE, render())
        for name, network in NETWORKS.items():
            if (RESULTS / f"{name}.json").exists():
                draw(name, network, json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
