"""Fill the tables of the analysis pages from the result files: no number is typed. ``--check`` only compares."""

import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, read, spread

DOCS = Path(__file__).resolve().parents[2] / "docs"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> str:
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + (f"\n\n*{note}*" if note else "")


def percent(values: Sequence[float]) -> str:
    return spread([100 * value for value in values])


def exactness(result: dict[str, Any]) -> str:
    rows = [
        [
            ", ".join(f"{key} {value}" for key, value in row["settings"].items()),
            row["mode"],
            f"{row['error']:.0e}",
            f"{row['least_bound']:.3f}",
            f"{row['largest_bound']:.3f}",
        ]
        for row in result["exactness"]
    ]
    note = "40 random kernels 6 x 4 x 3 x 3 (seeds 0 to 39), images of 6, 8 and 12 pixels; error against torch's layer written out."
    return table(["convolution", "padding mode", "largest error of a value", "bound / norm, least", "largest"], rows, note)


def approximation(result: dict[str, Any]) -> str:
    rows = [[str(row["size"]), spread(row["circular"]), spread(row["symbol"])] for row in result["approximation"]]
    note = "Relative l2 error of the whole spectrum under zero padding; random kernels 4 x 3 x 3 x 3, seeds 0 to 2."
    return table(["size", "circular", "symbol"], rows, note)


def spectrum(result: dict[str, Any]) -> str:
    own = result["resnet20_spectrum"]
    low, high = own["operator_over_folded"]
    counts = f"All {own['values']:,} singular values of the {own['layers']} convolutions of ResNet-20 on 32 x 32 images take "
    times = (
        f"{own['circular_s']:.2f} s by `circular` and {own['symbol_s']:.1f} s by `symbol`, the bounds of all norms {own['bounds_s']:.1f} s "
    )
    ratio = f"(processor time of one thread). The operator's norm is {low:.2f} to {high:.2f} times that of the folded kernel."
    return counts + times + ratio


def resnet20(result: dict[str, Any]) -> str:
    own = result["resnet20"]
    rows = [
        [
            f"{row['macs']:g}",
            f"{100 * row['accuracy']:.1f}",
            f"{row['bound']:.2e}",
            f"{row['lower']:.1f}",
            f"{max(row['layers'].values()):.1f}",
            f"{row['bound_s']:.1f}",
        ]
        for row in own["rows"]
    ]
    note = f"ResNet-20, CIFAR-10, cut by spectral energy, nothing trained; {own['examples']} test images, slopes at {own['near']}; n=1."
    head = ["MACs kept", "accuracy, %", "bound", "largest slope found", "largest norm of a layer", "seconds"]
    return table(head, rows, note)


def digits(result: dict[str, Any]) -> str:
    rows = []
    for limit in (None, 1.0):
        for macs in (1.0, 0.5):
            chosen = [row for row in result["digits"] if row["limit"] == limit and row["macs"] == macs]
            values = [[row["certified"][radius] for row in chosen] for radius in chosen[0]["certified"]]
            name = f"{'no limits' if limit is None else 'limits of 1'}, {macs:g}"
            cells = [
                percent([row["accuracy"] for row in chosen]),
                spread([row["bound"] for row in chosen]),
                spread([row["lower"] for row in chosen]),
            ]
            rows.append([name, *cells, *(percent(value) for value in values)])
    radii = [f"certified at {radius}, %" for radius in result["digits"][0]["certified"]]
    note = "Digits, test split, seeds 0 to 2, mean and sample standard deviation; 15 epochs; cut by spectral energy, nothing trained then."
    return table(["network, MACs kept", "accuracy, %", "bound", "largest slope found", *radii], rows, note)


def collapse(result: dict[str, Any]) -> str:
    rows = []
    names = [name for name in result["mnist"][0] if not name.endswith("_log") and name not in ("seed", "start")]
    for name in names:
        chosen = [row[name] for row in result["mnist"]]
        cells = [spread([one[metric] for one in chosen]) for metric in ("nc1", "nc2", "nc3")]
        shares = [percent([one[metric] for one in chosen]) for metric in ("nc4", "accuracy", "test_accuracy")]
        label = name.replace("cut", "dense, cut to rank").replace("tuned", f"{result['settings']['tune']} epochs more, rank")
        rows.append([label.replace("svd", "SVD training"), *cells, *shares])
    own = result["settings"]
    network = f"MLP with {own['hidden']} hidden layers of 256, which are cut"
    note = f"{network}; {own['examples']} MNIST images, {own['epochs']} epochs, seeds 0 to 2."
    return table(["network", "NC1", "NC2", "NC3", "NC4, %", "training accuracy, %", "test accuracy, %"], rows, note)


def collapse_resnet20(result: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['macs']:g}",
            *(f"{row[name]:.3f}" for name in ("nc1", "nc2", "nc3")),
            f"{100 * row['nc4']:.1f}",
            f"{100 * row['accuracy']:.1f}",
        ]
        for row in result["resnet20"]
    ]
    return table(["MACs kept", "NC1", "NC2", "NC3", "NC4, %", "training accuracy, %"], rows)


def closed(result: dict[str, Any]) -> str:
    rows = []
    for name in dict.fromkeys(row["case"] for row in result["closed_forms"]):
        for layers in (2, 3):
            chosen = [row for row in result["closed_forms"] if row["case"] == name and row["layers"] == layers]
            worst = max(abs(row["descent"] - row["closed"]) / row["closed"] for row in chosen)
            convex = max((abs(row["convex"] - row["closed"]) / row["closed"] for row in chosen if "convex" in row), default=None)
            cells = [", ".join(f"{row['closed']:.5f}" for row in chosen), f"{worst:.0e}", "" if convex is None else f"{convex:.0e}"]
            rows.append([f"{name}, {layers} layers", *cells])
    note = "Random data of seeds 0 to 2; the largest relative difference to the best of 2 to 10 starts of Adam, and to the convex program."
    return table(["case", "closed form", "to gradient descent", "to the program"], rows, note)


def program(result: dict[str, Any]) -> str:
    rows = [
        [
            str(row["seed"]),
            str(row["patterns"]),
            f"{row['convex']:.6f}",
            f"{row['descent']:.6f}",
            *(f"{value:.6f}" for value in row["bounds"].values()),
        ]
        for row in result["program"]
    ]
    head = ["seed", "patterns", "convex program", "gradient descent", "bound, arrangements", "bound, relaxed", "estimate, sampled"]
    return table(
        head, rows, "ReLU, 8 random examples in 2 dimensions, one output, decay 0.3; bounds from the network that gradient descent found."
    )


def whitened(result: dict[str, Any]) -> str:
    rows = [
        [f"{row['decay']:g}", f"{row['closed']:.4f}", f"{row['descent']:.4f}", str(row["rank"]), str(row["rank_of_descent"])]
        for row in result["whitened_mnist"]
    ]
    head = ["decay", "closed form", "gradient descent", "classes that survive", "rank of the first layer, descent"]
    return table(head, rows, "Two-layer ReLU network, 200 whitened MNIST images, one-hot targets; the better of two starts.")


def trained(result: dict[str, Any]) -> str:
    rows = []
    for row in result["trained_mnist"]:
        kind = "ReLU" if row["relu"] else "linear"
        cells = [
            f"{row['loss']:.3f}",
            f"{row['bound']:.3f}",
            f"{100 * row['gap']:.2g} %",
            f"{row['estimate']:.3f}" if "estimate" in row else "",
        ]
        rows.append([f"{kind}, decay {row['decay']:g}", *cells, str(row["rank"])])
    head = ["network", "loss", "proven bound", "gap", "estimate", "rank of the first layer"]
    return table(
        head, rows, "64 hidden units, 2,000 MNIST images scaled to norm 1 as a matrix, one-hot targets, 600 steps of Adam, seed 0."
    )


def bayes(result: dict[str, Any]) -> str:
    rows = []
    for row in result["ranks"]:
        counts = {name: ", ".join(f"{rank}: {count}" for rank, count in row[name].items()) for name in ("ranks", "energy_0.9")}
        error = [f"{row[name]:.3f}" for name in ("error", "oracle_error", "best_truncation_error")]
        rows.append(
            [f"{row['strengths']}, {'known' if row['noise_known'] else 'estimated'}", counts["ranks"], counts["energy_0.9"], *error]
        )
    head = ["strengths, noise", "rank: times", "`Energy(0.9)`", "squared error", "truncation at the true rank", "best truncation"]
    return table(
        head,
        rows,
        "100 draws (seeds 0 to 99) of 20 x 30 with noise 0.1, whose largest singular value is about 0.93; below 0.49 nothing can be seen.",
    )


def bayes_networks(result: dict[str, Any]) -> str:
    rows = [
        [row["network"], str(row["layers"]), f"{row['mean_share_of_full_rank']:.2f}", f"{row['least']:.2f}"] for row in result["networks"]
    ]
    return table(
        ["ResNet-20, weights", "layers", "rank / full rank, mean", "least"], rows, "`PosteriorRank` on all weights that `factorize` takes."
    )


def images(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        for way in ("quaternion", "channels", "stacked"):
            own = row[way]
            wins = sum(a < b for a, b in zip(own["psnr"], row["quaternion"]["psnr"], strict=True))
            better = "" if way == "quaternion" else f"{wins} of {len(own['psnr'])}"
            rows.append([f"{row['numbers']}, {way}", str(own["rank"]), str(own["numbers"]), spread(own["psnr"]), better])
    head = ["numbers, way", "rank", "numbers used", "PSNR, dB", "quaternion is better on"]
    return table(
        head,
        rows,
        f"The first {result['settings']['images']} test images of CIFAR-10, 3,072 numbers each; mean and standard deviation over images.",
    )


def randomized(result: dict[str, Any]) -> str:
    rows = [[str(row["rank"]), str(row["passes"]), f"{row['mean']:.4f}", f"{row['largest']:.4f}"] for row in result["randomized"]]
    return table(
        ["rank", "passes", "error / optimal, mean", "largest"], rows, "`randomized_qsvd` on the same images, 8 columns beyond the rank."
    )


def structured(result: dict[str, Any]) -> str:
    own = result["settings"]
    rows = []
    for low in (False, True):
        for kind in ("pairs", "and outputs", "and inputs and outputs"):
            chosen = [row["mse"] for row in result["structured"] if row["low_rank"] == low and row["data"] == kind]
            name = f"rank {own['rank']}" if low else "dense"
            rows.append(
                [
                    f"{name}, {'pairs alone' if kind == 'pairs' else 'pairs ' + kind}",
                    spread(chosen, 4),
                    ", ".join(f"{one:.5f}" for one in chosen),
                ]
            )
    digits = "Lower half of an MNIST digit from its upper half"
    data = f"{own['pairs']} pairs, {own['alone']} further halves alone"
    note = f"{digits}: {data}, {own['epochs']} epochs, best epoch by validation, seeds 0 to 2."
    return table(["network, data", "test squared error", "by seed"], rows, note)


def few_classes(result: dict[str, Any]) -> str:
    own = result["settings"]
    rows = []
    for weight in dict.fromkeys(row["weight"] for row in result["classes"]):
        chosen = [row for row in result["classes"] if row["weight"] == weight]
        cells = [
            percent([row["accuracy"] for row in chosen]),
            spread([row["nc1"] for row in chosen]),
            percent([row["nc4"] for row in chosen]),
        ]
        rows.append([f"{weight:g}", *cells])
    note = f"LeNet-5, {own['labels']} MNIST images, {own['class_epochs']} epochs, seeds 0 to 2 (other images for each); layers fc1 and fc2."
    return table(["weight", "test accuracy, %", "NC1, training images", "NC4, %"], rows, note)


def quaternion_layers(result: dict[str, Any]) -> str:
    own, rows = result["settings"], []
    for kind in dict.fromkeys(row["network"] for row in result["rows"]):
        chosen = [row for row in result["rows"] if row["network"] == kind]
        for stage, label in (("whole", "trained"), ("cut", "cut to half"), ("tuned", "cut to half, fine-tuned")):
            values = [row[stage]["accuracy"] for row in chosen]
            first = chosen[0][stage]
            rows.append([f"{kind}, {label}", f"{first['numbers']:,}", f"{first['macs'] / 1e6:.2f}", percent(values), str(len(values))])
    images = f"CIFAR-10: {own['images']} training images, {own['epochs']} epochs, a quarter of them again after the cut, "
    rest = f"the first {own['test']} test images; seeds 0 to 2; cut by calibration to half the numbers; multiply-accumulates in millions."
    return table(["network", "numbers", "MACs", "test accuracy, %", "seeds"], rows, images + rest)


def starting_ranks(result: dict[str, Any]) -> str:
    own, rows = result["settings"], []
    for trained in dict.fromkeys(row["decay_trained"] for row in result["rows"]):
        chosen = [row for row in result["rows"] if row["decay_trained"] == trained]
        label = "with weight decay" if trained else "without"
        whole = [f"{chosen[0]['numbers']:,}", "", percent([row["accuracy"] for row in chosen]), "", ""]
        rows.append([f"{label}, dense", *whole, spread([row["alignment"] for row in chosen])])
        for place, first in enumerate(chosen[0]["cuts"]):
            cuts = [row["cuts"][place] for row in chosen]
            ranks = [f"{min(values)} to {max(values)}" for values in zip(*(cut["ranks"] for cut in cuts), strict=True)]
            cells = [percent([cut[name][stage] for cut in cuts]) for name in ("suggested", "allocated") for stage in ("cut", "tuned")]
            shown = [f"{cells[0]}; {cells[1]}", f"{cells[2]}; {cells[3]}"]
            numbers = f"{statistics.mean(cut['numbers'] for cut in cuts):,.0f}"
            rows.append([f"{label}, {first['decay']:g}", numbers, ", ".join(ranks), "", *shown, spread([cut["alignment"] for cut in cuts])])
    start = spread([row["alignment_at_start"] for row in result["rows"]])
    network = f"MLP with 3 hidden layers of {own['hidden']}"
    note = f"{network}, {own['images']} MNIST images, {own['epochs']} epochs, {own['tune']} after a cut, seeds 0 to 2; "
    more = f"accuracy on the first {own['test']} test images, % as cut; fine-tuned. Alignment before training: {start}."
    head = ["trained, decay of the cut", "numbers", "ranks, least to most", "dense", "suggested", "allocated at these numbers", "alignment"]
    return table(head, rows, note + more)


Section = Callable[[dict[str, Any]], str]
SECTIONS: dict[str, dict[str, tuple[str, Section]]] = {
    "methods/convolution-spectra.md": {
        "exactness": ("spectra", exactness),
        "approximation": ("spectra", approximation),
        "spectrum": ("spectra", spectrum),
    },
    "methods/neural-collapse.md": {"collapse": ("collapse", collapse), "collapse-resnet20": ("collapse", collapse_resnet20)},
    "methods/convex-duality.md": {
        "closed": ("duality", closed),
        "program": ("duality", program),
        "whitened": ("duality", whitened),
        "trained": ("duality", trained),
        "starting-ranks": ("starting_ranks", starting_ranks),
    },
    "methods/bayesian-ranks.md": {"bayes": ("bayes", bayes), "bayes-networks": ("bayes", bayes_networks)},
    "methods/few-labels.md": {"structured": ("few_labels", structured), "classes": ("few_labels", few_classes)},
    "methods/quaternion-svd.md": {
        "layers": ("quaternion_layers", quaternion_layers),
        "images": ("images", images),
        "randomized": ("images", randomized),
    },
    "howto/certify-a-network.md": {"resnet20": ("spectra", resnet20), "digits": ("spectra", digits)},
}
"""By page: the marks in it, the result file of each and what renders it."""


def render(page: str, text: str) -> str:
    for name, (file, section) in SECTIONS[page].items():
        if not (RESULTS / f"{file}.json").exists():
            continue
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert mark.search(text), f"{page} has no place for {name}"
        body = section(read(file))
        text = mark.sub(lambda found, body=body: f"{found[1]}\n{body}\n\n{found[2]}", text)
    return text


def outdated() -> list[str]:
    """Return the pages that are not what the result files say."""
    return [
        page for page in SECTIONS if (DOCS / page).read_text(encoding="utf-8") != render(page, (DOCS / page).read_text(encoding="utf-8"))
    ]


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(f"out of date, run python benchmarks/analysis/pages.py: {', '.join(outdated())}" if outdated() else 0)
    for page in SECTIONS:
        path = DOCS / page
        path.write_text(render(page, path.read_text(encoding="utf-8")), encoding="utf-8")
