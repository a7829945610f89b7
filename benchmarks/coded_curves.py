"""The part of `docs/coded.md` on curves and goals, and the plot of the curves; read by `coded.py`."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coded_networks import NETWORKS

HERE = Path(__file__).resolve().parent
RESULTS, PRUNING, FILES = (HERE / "results" / name for name in ("coded", "pruning", "pruning_levels"))
TRAINED = HERE / "results" / "rounded_training" / "rows.json"
PLOT = HERE.parent / "docs" / "plots" / "coded.svg"


EMPTY: dict[str, Any] = {"rows": {}}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def results() -> dict[str, Any]:
    """Return what there is of each network."""
    return {name: read(RESULTS / f"{name}.json") for name in NETWORKS if (RESULTS / f"{name}.json").exists()}


def levels_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of `round_to` with the first draw, by bytes."""
    found = [row for name, row in result["rows"].items() if name.startswith("levels") and name.endswith("seed 0")]
    return sorted(found, key=lambda row: -row["bytes"])


def shown(merit: str, row: dict[str, Any]) -> str:
    return f"{row[merit]:.2f}" if merit == "accuracy" else f"{row[merit]:.4f}"


def entries(result: dict[str, Any]) -> Iterable[tuple[str, int, dict[str, Any]]]:
    """Return label, bytes and row of each line of a network's table."""
    rows = result["rows"]
    for name, title in (("float32", "float32"), ("int8", "int8, a scale for each output")):
        yield title, rows[name]["plain_bytes"], rows[name]
        for key, coder in (("zstd_bytes", "zstd -19"), ("xz_bytes", "xz")):
            if key in rows[name]:
                yield f"{title}, by {coder}", rows[name][key], rows[name]
    if "onnx int8" in rows:
        yield f"int8 ONNX file, {rows['onnx int8']['method']}", rows["onnx int8"]["bytes"], rows["onnx int8"]
    for row in levels_of(result):
        yield "`round_to`, `.spz`", row["bytes"], row
        if "xz_bytes" in row:
            yield "the same levels, a byte or two each, by xz", row["xz_bytes"], row


def table(name: str, result: dict[str, Any]) -> list[str]:
    """Return the table of a network."""
    network, merit = NETWORKS[name], result["merit"]
    size = result["rows"]["float32"]["plain_bytes"]
    head = "test accuracy" if merit == "accuracy" else "test loss, nats"
    lines = [f"### {network.title}", "", f"| | bytes | smaller | divergence | {head} |", "|---|---:|---:|---:|---:|"]
    for title, count, row in entries(result):
        lines.append(f"| {title} | {count:,} | {size / count:.1f}x | {row['kl']:.4f} | {shown(merit, row)} |")
    images = next(iter(result["rows"].values()))["images"]
    said = [f"{images:,} test examples", f"{result['held_out']:,} held out for the divergence", f"{result['examples']:,} to calibrate"]
    seconds = [row["seconds"] for row in levels_of(result)]
    spent = f" `round_to` took {min(seconds):.0f} to {max(seconds):.0f} seconds of one core." if seconds else ""
    return [*lines, "", f"{', '.join(said)}{'; ' + network.note if network.note else ''}.{spent}", ""]


def curves() -> list[str]:
    """Return the section on curves."""
    found = {name: result for name, result in results().items() if levels_of(result) and name not in ("resnet20", "resnet8")}
    lines = ["## Bytes against quality, network by network", ""]
    lines += ["Without training and without labels, one calibration draw. Bytes are of whole files, except for plain int8 and float32: the"]
    lines += ["tensors one after another, and the same by general coders. The divergence is from the dense network's outputs.", ""]
    lines += ["![Bytes against quality](plots/coded.svg)", ""]
    for name, result in found.items():
        lines += table(name, result)
    return lines


def verdict(value: float, limit: float, unit: str, at_most: bool = True) -> str:
    """Return whether a number meets a limit, and by how much not."""
    over = value - limit if at_most else limit - value
    return "met" if over <= 1e-9 else f"missed by {over:.2f} {unit}"


def mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def rows_of(folder: Path, stem: str) -> list[dict[str, Any]]:
    return [read(path) for path in sorted(folder.glob(f"{stem}-[0-9].json"))]


def drops(rows: list[dict[str, Any]]) -> list[float]:
    """Return how many points each row is below the dense network of its seed."""
    dense = {row["settings"]["seed"]: row["test"]["accuracy"] for row in rows_of(PRUNING, "dense")}
    return [100 * (dense[row["settings"]["seed"]] - row["test"]["accuracy"]) for row in rows]


def goals() -> list[str]:
    """Return the goals, and whether they are met."""
    lines = [
        "## Goals",
        "",
        "Each goal was set before its rows were run. "
        "Settings of the files of LeNet-5 after the first were chosen after scores of those before were known.",
        "",
    ]
    twenty = results().get("resnet20", {"rows": {}})["rows"]
    for limit, least in ((66_000, 91.4), (50_000, 90.7)):
        found = [row["accuracy"] for name, row in twenty.items() if name.startswith(f"levels {limit}")]
        if found:
            said = f"{mean(found)} over {len(found)} calibration draw{'s' if len(found) > 1 else ''}"
            lines.append(
                f"- ResNet-20 at {limit:,} bytes, at least {least}: {said}: {verdict(statistics.fmean(found), least, 'point', False)}."
            )
    alone, cut = twenty.get("levels 50000 seed 0"), twenty.get("rank 0.8 levels 50000 seed 0")
    if alone and cut:
        words = "helps" if cut["kl"] < alone["kl"] else "does not help"
        lines.append(
            f"- Does low rank help bytes? ResNet-20 at 50,000 bytes: levels alone {alone['accuracy']:.2f}, divergence {alone['kl']:.4f};"
            f" cut to 80 % of the parameters before, {cut['accuracy']:.2f}, divergence {cut['kl']:.4f}: it {words}."
        )
    trained = read(TRAINED)["rows"] if TRAINED.exists() else {}
    for name, row in trained.items():
        words = name.split()
        pruned = int(words[words.index("pruned") + 1]) if "pruned" in words else 0
        if words[0] == "resnet20" and int(words[6]) + pruned == 10:
            after, of_these = row["after"], f", {pruned} of pruning before" if pruned else ""
            lines.append(
                f"- ResNet-20, 10 epochs of training{of_these or ' on levels'}, at most 45,000 bytes and at least 91.4: "
                f"{row['before']['bytes']:,} bytes at "
                f"{row['before']['accuracy']:.2f} before, {after['bytes']:,} at {after['accuracy']:.2f} after"
                f" ({verdict(after['bytes'], 45_000, 'bytes')}; {verdict(after['accuracy'], 91.4, 'point', False)})."
            )
    for rate, most in (("85x", 0.15), ("balanced-85x", 0.15), ("167x", 0.5), ("balanced-167x", 0.5)):
        for method in ("gradual", "gradual-taught", "gradual-taught-longer", "gradual-taught-mixed", "admm", "admm-longer", "one-shot"):
            if rows := rows_of(PRUNING, f"{method}-{rate}"):
                gone, seeds = drops(rows), len(rows)
                said = f"{mean(gone)} over {seeds} seed{'s' if seeds > 1 else ''}"
                lines.append(
                    f"- LeNet-5, {rate} fewer weights, {method}, at most {most} point below dense: {said}:"
                    f" {verdict(statistics.fmean(gone), most, 'point')}."
                )
    for stem in sorted({path.stem.rpartition("-")[0] for path in FILES.glob("*-[0-9].json")}):
        files = [read(path) for path in sorted(FILES.glob(f"{stem}-[0-9].json"))]
        ratios, gone = [row["fp32_bytes"] / row["file"]["coded_bytes"] for row in files], drops(files)
        sizes = ", ".join(f"{row['file']['coded_bytes']:,}" for row in files)
        seeds = ", ".join(str(row["settings"]["seed"]) for row in files)
        lines.append(
            f"- LeNet-5, a file 300x smaller at most 0.2 point below dense, `{stem}`, seed{'s' if len(files) > 1 else ''} {seeds}: "
            f"{sizes} bytes, {min(ratios):.0f}x or more ({verdict(min(ratios), 300, 'times', False)}), {mean(gone)} below"
            f" ({verdict(statistics.fmean(gone), 0.2, 'point')})."
        )
    missing = [
        NETWORKS[name].title for name in ("resnet56", "stories260k", "vit", "ptb_lstm") if len(levels_of(results().get(name, EMPTY))) < 3
    ]
    said = f"not for {', '.join(missing)}" if missing else "met"
    lines.append(f"- Curves of ResNet-56, stories260K, the small ViT and the LSTM, three budgets each: {said}.")
    return [*lines, ""]


def plot() -> None:
    """Draw the curves."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "spectrim", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    found = {name: result for name, result in results().items() if levels_of(result)}
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(3.1 * columns, 2.8 * lines), squeeze=False, layout="constrained")
    for axis in grid.flat[len(found) :]:
        axis.remove()
    for axis, (name, result) in zip(grid.flat, found.items(), strict=False):
        merit = NETWORKS[name].merit
        rows, curve = result["rows"], levels_of(result)
        axis.plot([row["bytes"] / 1000 for row in curve], [row[merit] for row in curve], "o-", color="C0", label="round_to, coded file")
        points = [("float32, general coder", "s", "C7", rows["float32"]), ("int8, general coder", "D", "C1", rows["int8"])]
        points += [("int8 ONNX file", "^", "C3", rows["onnx int8"])] if "onnx int8" in rows else []
        for label, marker, color, row in points:
            size = min((row[key] for key in ("xz_bytes", "zstd_bytes", "zlib_bytes") if key in row), default=row["bytes"])
            axis.plot(size / 1000, row[merit], marker, color=color, label=label)
        axis.axhline(rows["float32"][merit], color="0.7", linewidth=0.8, zorder=0)
        axis.set(title=NETWORKS[name].title, xscale="log", xlabel="kB", ylabel="test accuracy, %" if merit == "accuracy" else "test loss")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.title.set_fontsize(8)
        axis.grid(alpha=0.3)
    named = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(PLOT, metadata={"Date": None})
    plt.close(figure)
