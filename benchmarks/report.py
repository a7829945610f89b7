"""Render ``benchmarks/results`` into ``docs/results.md``: nobody types a number. ``--check`` only compares."""

import json
import math
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "results.md"
NAMES = {
    "dense": "dense",
    "continued": "dense, trained for as many more epochs",
    "truncated": "plain truncated SVD + training, same MACs and epochs",
    "final": "SVD training",
}
HEAD = """# Results

This page is written by `python benchmarks/report.py` from the files in `benchmarks/results`, which the runner wrote. Accuracies and losses
are those of the test split, which is read once, at the end of a run. Seconds are medians at batch 1, measured side by side in one process:
compare their ratios, not the seconds themselves. `±` is the sample standard deviation over seeds. With one seed there is none, and
differences below about 0.3 point are not significant. The pretrained CIFAR-10 network was trained on our validation images, so they choose
nothing in `cifar10_resnet20`, and its intermediate validation numbers are too optimistic. Its learning rate was the better of two by the
loss on training images; one of the two was known from short trials that had used 2,048 test images.
"""


def number(entry: dict[str, float], scale: float = 1.0, digits: int = 2) -> str:
    spread = f" ± {entry['std'] * scale:.{digits}f}" if entry["n"] > 1 else ""
    return f"{entry['mean'] * scale:,.{digits}f}{spread}"


def section(task: str, method: str, result: dict[str, Any]) -> str:
    table, case = result["summary"], result["case"]
    classifier = "accuracy" in table["dense"]
    merit = ["accuracy, %"] if classifier else ["loss, nats", "perplexity"]
    head = ["network", *merit, "MACs", "MAC reduction", "parameters", "compression", "speedup"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    dense = table["dense"]
    for name in (key for key in NAMES if key in table):
        own = table[name]
        good = [number(own["accuracy"], 100)] if classifier else [number(own["loss"], 1, 4), f"{math.exp(own['loss']['mean']):.2f}"]
        ratios = [dense[key]["mean"] / own[key]["mean"] for key in ("macs", "size_bytes", "latency_s")]
        cells = [
            NAMES[name], *good, f"{own['macs']['mean']:,.0f}", f"{ratios[0]:.2f}x", f"{own['params']['mean']:,.0f}",
            f"{ratios[1]:.2f}x", f"{ratios[2]:.2f}x",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    first = result["runs"][0]
    stages, recipe, machine = first["stages"], first["recipe"], first["environment"]
    epochs = {"dense": recipe["dense"]["epochs"], "regularized": sum(phase["epochs"] for phase in recipe["train"])}
    epochs |= {"fine-tuning": recipe["finetune"]["epochs"]}
    spent = ", ".join(f"{value} {name}" for name, value in epochs.items())
    key, scale, unit = ("accuracy", 100, " %") if classifier else ("loss", 1, " nats")
    cut = [("regularized", stages["2-train"]["val"]), ("right after the cut", stages["3-prune"]["val_cut"])]
    cut += [("BatchNorm recalibrated", stages["3-prune"]["val"])] if "val" in stages["3-prune"] else []
    cut += [("fine-tuned", stages["4-finetune"]["val"])]
    way = ", ".join(f"{name} {values[key] * scale:.{2 if classifier else 4}f}{unit}" for name, values in cut)
    return "\n".join(
        [
            f"\n## {task}: {method}\n",
            f"Recipe `{case['recipe']}`, seeds {', '.join(map(str, case['seeds']))}, epochs: {spent}. "
            f"Validation split after each stage (first seed): {way}.\n",
            *lines,
            f"\n*{machine['machine']}, {machine['device']}, torch {machine['versions']['torch']}, latency with "
            f"{recipe['latency_threads']} thread(s), commit `{result['git']['commit'][:10]}`, {sum(result['wall_s']) / 60:.0f} minutes.*\n",
        ]
    )


def render() -> str:
    files = sorted(path for path in (HERE / "results").glob("*/*.json") if (HERE / "cases" / path.parent.name).is_dir())
    return HEAD + "".join(section(path.parent.name, path.stem, json.loads(path.read_text())) for path in files)


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == render() else f"{PAGE} is out of date: run python benchmarks/report.py")
    main()
