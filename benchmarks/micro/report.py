"""Render ``benchmarks/micro/results`` into ``docs/speed.md`` and its plots; no number is typed. ``--check`` only compares the page."""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
PAGE, PLOTS = DOCS / "speed.md", DOCS / "plots"
HEAD = """# Speed

This page is written by `python benchmarks/micro/report.py` from the files in `benchmarks/micro/results`. Variants run alternately in one
process, in a different order in each round. Ratios are computed within each round; the tables show the median over rounds with the
quartiles. The seconds themselves depend on the machine and are only in the files.
"""
STEP = """
## One training step, against dense

Forward, loss, penalties (`Orthogonality` and `Hoyer`), backward and an SGD step, as a ratio to the dense network's step: below 1 is
faster. `factored` runs two operations at every rank and writes the penalties layer by layer, as published code does; `composed` always
composes the weight; `auto`, the default, chooses for each layer the execution with fewer multiply-accumulates; `measured` the faster one
by measurement (`choose_execution`); `PolarHoyer` regularizes the weights of the dense network; *penalty sampled* is
`Orthogonality(sample=0.125)`, *no penalty* has `Hoyer` alone, and *retraction alone* is `Retraction` once, without a step: every 16
steps, it adds a sixteenth of that to *no penalty*. The number after the name is the rank as a fraction of the full rank. *Memory* is
the peak within a step above the memory in use before it, relative to dense; *without factors* excludes the gradients of the factors.
"""
LATENCY = """
## Inference, at half the multiply-accumulates

Batch 1, one thread: the speed-up over the dense network. `by MACs` chooses ranks and forms by multiply-accumulates only, `by latency`
with the latency table of ONNX Runtime (`latency_table`), under the smallest of the budgets 0.5, 0.6, ... that can be met with layers that
are faster as pairs. *Share* is the ONNX Runtime speed-up over the MAC reduction: at 1 latency falls in proportion to MACs.
"""
GROWTH = """
## Growth with width, depth and rank

One step of a single square layer, relative to dense, with the lower limit set by multiply-accumulates (dashed), including those of the
exact penalty. Rows of the linear layers: {rows}, positions of the convolutions: {positions}. These are small: the cost of the composition
and the penalty does not depend on the number of rows, so the excess over 1 shrinks in proportion as rows are added.

![Step time of a linear layer against rank](plots/growth-linear.svg)
![Step time of a convolution against rank](plots/growth-conv.svg)
"""
FACTORIZE = """
## Factorizing

Seconds of `factorize(rank=width / 16)` of one square layer: the randomized SVD against the exact one.
"""


def quartiles(entry: dict[str, float]) -> str:
    return f"{entry['median']:.2f} ({entry['low']:.2f} to {entry['high']:.2f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def machine(result: dict[str, Any]) -> str:
    own = result["environment"]
    software = f"torch {own['versions']['torch']}, ONNX Runtime {own['versions']['onnxruntime']}"
    return f"\n*{own['machine']}, {own['device']}, {own['threads']} thread(s), {software}.*\n"


def step_section(result: dict[str, Any]) -> str:
    peak, held = result["peak_bytes"], result["parameter_bytes"]
    rows = []
    for name, entry in result["ratios"].items():
        memory = (
            [f"{peak[name] / peak['dense']:.2f}", f"{(peak[name] - held[name] + held['dense']) / peak['dense']:.2f}"]
            if name in peak
            else ["", ""]
        )
        rows.append([name, quartiles(entry), *memory])
    title = f"\n### {result['network']}, batch {result['batch']}\n\n"
    return title + table(["variant", "time", "memory", "without factors"], rows) + machine(result)


def latency_section(result: dict[str, Any]) -> str:
    rows = []
    for point in result["points"]:
        for key, title in (("macs", "by MACs"), ("timed", "by latency")):
            reduction = point["mac_reduction"][key]
            speeds = [quartiles(point[backend][key]) for backend in ("onnx", "compiled", "eager")]
            share = point["onnx"][key]["median"] / reduction
            rows.append([f"{point['network']}, {title}", f"{reduction:.2f}", *speeds, f"{share:.2f}"])
    return (
        LATENCY
        + "\n"
        + table(["network", "MAC reduction", "ONNX Runtime", "torch compiled", "torch eager", "share"], rows)
        + machine(result)
    )


def limit(result: dict[str, Any], point: dict[str, Any], fraction: float) -> float:
    """Return the multiply-accumulates of a step over the dense step's: the cheaper form, three products each, and two for the penalty."""
    convolution = point["kind"].startswith("conv")
    uses, out = result["positions" if convolution else "rows"], point["width"]
    in_, rank = out * (9 if convolution else 1), round(fraction * out)
    form = min(uses * out * in_ + out * in_ * rank, uses * rank * (out + in_))
    return float((3 * form + 2 * rank**2 * (out + in_)) / (3 * uses * out * in_))


def growth_section(result: dict[str, Any]) -> str:
    rows = []
    for point in result["points"]:
        for fraction in (1.0, 0.5, 0.25, 0.125):
            ours, theirs = (point["ratios"][f"{name} {fraction}"] for name in ("auto", "factored"))
            label = f"{point['kind']}, width {point['width']}, {point['depth']} layer(s), rank {fraction}"
            rows.append([label, quartiles(ours), quartiles(theirs), f"{limit(result, point, fraction):.2f}"])
    head = GROWTH.format(rows=result["rows"], positions=result["positions"])
    return head + "\n" + table(["layer", "auto", "factored", "limit"], rows) + machine(result)


def factorize_section(result: dict[str, Any]) -> str:
    rows = [[f"width {point['width']}", f"{point['exact'] / point['randomized']:.1f}x faster"] for point in result["points"]]
    return FACTORIZE + "\n" + table(["layer", "randomized"], rows) + machine(result)


def results() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))}


def render() -> str:
    found = results()
    parts = [HEAD]
    if "latency" in found:
        parts.append(latency_section(found["latency"]))
    steps = [result for result in found.values() if result["kind"] == "step"]
    parts += [STEP, *map(step_section, steps)] if steps else []
    if "growth-training" in found:
        parts.append(growth_section(found["growth-training"]))
    if "growth-factorize" in found:
        parts.append(factorize_section(found["growth-factorize"]))
    return "".join(parts)


def draw(result: dict[str, Any]) -> None:
    """Draw step time against rank, one line a width, the limits dashed."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "spectrim"
    from matplotlib import pyplot as plt

    PLOTS.mkdir(exist_ok=True)
    for prefix in ("linear", "conv"):
        points = [point for point in result["points"] if point["kind"].startswith(prefix) and point["depth"] == 1]
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        for point, color, marker in zip(points, plt.get_cmap("viridis")([0.0, 0.3, 0.6, 0.85]), "osD^", strict=True):
            fractions = [1.0, 0.5, 0.25, 0.125]
            ours = [point["ratios"][f"auto {fraction}"] for fraction in fractions]
            spread = [[r["median"] - r["low"] for r in ours], [r["high"] - r["median"] for r in ours]]
            axes.errorbar(fractions, [r["median"] for r in ours], spread, color=color, marker=marker, label=f"width {point['width']}")
            axes.plot(fractions, [limit(result, point, fraction) for fraction in fractions], "--", color=color, alpha=0.6)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="rank / full rank", ylabel="step time / dense step time", title=points[0]["kind"])
        axes.set_xticks([1.0, 0.5, 0.25, 0.125], ["1", "1/2", "1/4", "1/8"])
        axes.set_yticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(title="solid: measured, dashed: limit", fontsize="small")
        figure.savefig(PLOTS / f"growth-{prefix}.svg", metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8")
    if "growth-training" in (found := results()):
        draw(found["growth-training"])


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == render() else f"{PAGE} is out of date: run python benchmarks/micro/report.py")
    main()
