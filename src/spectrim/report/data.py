"""The content of the page as plain data: a compact plan, and the content of a run's folder."""

import base64
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from spectrim.budget.plan_rows import WeightPlan
from spectrim.budget.plan_table import Plan
from spectrim.errors import FormatError
from spectrim.files import check_digest, read_json
from spectrim.forms.form import rung_of
from spectrim.metrics.measurement import Measurement
from spectrim.metrics.verdict import Verdict

CHOICES = 600_000
"""Most numbers of distortion in a page, about 3 MB; above it, ranks go in steps."""

POINTS = 120
"""Most singular values drawn of one spectrum, and most epochs of one phase in the course of a layer."""

KNOWN = ("loss", "mean_rank", "learning_rate", "examples_per_s", "seconds")
"""What a line of the training log holds beside penalties and ``eval_*``."""

HINT = "the same command writes it again"

WORDS = {
    "rank": "number of singular values that a layer holds; full rank is `min(out, in)`",
    "spectrum": "the singular values, descending",
    "energy": "sum of squared singular values; `keep` is the fraction kept, in (0, 1]",
    "break-even rank": "the largest rank at which two operations cost fewer MACs than the dense one",
    "MACs": "multiply-accumulates for one example; FLOPs are twice that",
}
"""Words of the page, as the glossary has them."""

LABELS = {"final": "low-rank", "truncated": "truncated SVD", "continued": "dense, trained on"}


def plan_data(plan: Plan) -> dict[str, Any]:
    """Return a plan as compact plain data: distortions of the ranks to choose from as base64 of 32-bit floats, costs as slopes.

    Ranks above the break-even cost what the dense weight costs and lose more, so of them only the highest is a choice.

    Args:
        plan: from `spectrim.plan`.
    """
    step, methods = _step(plan), list(plan.weights[0].distortions) if plan.weights else []
    return {
        "importance": plan.importance,
        "importances": methods,
        "step": step,
        "dense": vars(plan.dense),
        "fixed": vars(plan.fixed),
        "settings": dict(plan.settings),
        "weights": [_weight(weight, methods, step) for weight in plan.weights],
        "skipped": [vars(layer) for layer in plan.skipped],
        "budgets": [{**vars(row), "totals": row.totals and vars(row.totals)} for row in plan.budgets],
    }


def _step(plan: Plan) -> int:
    """Return the smallest power of two that keeps the page small."""
    step = 1
    while sum(len(_choices(weight, step)) * len(weight.distortions) for weight in plan.weights) > CHOICES:
        step *= 2
    return step


def _choices(weight: WeightPlan, step: int) -> list[int]:
    held, multiple = len(weight.macs), weight.multiple * step
    start = multiple if multiple < held else held
    ranks = [rank for rank in range(start, held, multiple) if rank <= weight.break_even]
    if step > 1 and held > 1:
        ranks = [weight.multiple, *ranks] if weight.multiple < start else ranks  # the smallest network stays reachable
    return [*ranks, held]


def _weight(weight: WeightPlan, methods: Sequence[str], step: int) -> dict[str, Any]:
    ranks = _choices(weight, step)
    distortions = {name: _packed(weight.distortions[name][rank] for rank in ranks) for name in methods}
    return {
        "name": weight.name,
        "kind": weight.kind,
        "scheme": weight.scheme,
        "shape": list(weight.shape),
        "blocks": weight.blocks,
        "held": len(weight.macs),
        "breakEven": weight.break_even,
        "bytes": weight.element_bytes,
        "ranks": _runs(ranks),
        "sizes": None if weight.sizes is None else [weight.sizes[rank - 1] for rank in ranks],
        "distortions": distortions,
        "macs": _costs(weight.macs, ranks),
        "params": _costs(weight.params, ranks),
        "seconds": None if weight.seconds is None else _costs(weight.seconds, ranks),
        "dense": {"macs": weight.dense_macs, "params": weight.dense_params, "seconds": weight.dense_seconds},
        "spectrum": _thinned(weight.spectrum),
    }


def _places(count: int) -> list[int]:
    """Return which of so many values to draw: the first, the last and evenly between."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(POINTS, count)).tolist()})


def _thinned(spectrum: Sequence[float]) -> list[list[float | int]]:
    return [[place + 1, float(f"{spectrum[place]:.4g}")] for place in _places(len(spectrum))]


def _runs(ranks: Sequence[int]) -> list[int]:
    """Return ``[first, step, count, last]`` where all but the last are evenly spaced, else the ranks themselves behind a 0."""
    head = list(ranks[:-1])
    step = head[1] - head[0] if len(head) > 1 else 1
    even = all(b - a == step for a, b in itertools.pairwise(head))
    return [head[0] if head else 1, step, len(head), ranks[-1]] if even else [0, *ranks]


def _packed(values: Iterable[float]) -> str:
    return base64.b64encode(np.fromiter(values, dtype="<f4").tobytes()).decode()


def _costs(table: Sequence[float | int], ranks: Sequence[int]) -> list[float | int]:
    """Return ``[slope, last]`` where the cost is proportional to the rank up to the last choice, else every cost behind a -1."""
    values = [table[rank - 1] for rank in ranks]
    slope = values[0] / ranks[0]
    if len(ranks) > 1 and all(value == slope * rank for value, rank in zip(values[:-1], ranks[:-1], strict=True)):
        return [slope, values[-1]]
    return [-1, *values]


def run_data(folder: Path) -> dict[str, Any]:
    """Return what the folder of a run, or of `compress`, holds: results, logs of every stage, the recipe.

    Args:
        folder: with ``recipe.yaml`` or ``result.json``; the rest may still be missing.

    Raises:
        FormatError: when it is not such a folder, or a file in it is damaged.
    """
    recipe, results = folder / "recipe.yaml", [folder / "result.json", folder / "compress" / "result.json"]
    if not recipe.is_file() and not results[0].is_file():
        hint = "pass what spectrim run or compress --out wrote, or a plan"
        raise FormatError(folder, "is not the folder of a run: it has no recipe.yaml", hint=hint)
    stages = {}
    for path in sorted(folder.glob("*/stage.json")):
        state = read_json(path, HINT)
        if path.parent.name != "measure" and state.get("finished"):
            numbers = state.get("numbers")
            with _naming(path):
                result_data({}, {path.parent.name: numbers})  # type: ignore[dict-item]
            stages[path.parent.name] = numbers
    path = next((path for path in results if path.is_file()), folder)
    with _naming(path):
        found = result_data(read_json(path, HINT) if path != folder else {}, stages)  # type: ignore[arg-type]
        measurements(found)
    if (manifest := folder / "manifest.json").is_file():
        check_digest(recipe, read_json(manifest, HINT).get("recipe"), f"copy it elsewhere to use it as a recipe; {HINT}")
    with _naming(recipe):
        text = recipe.read_text(encoding="utf-8") if recipe.is_file() else ""
    return found | {"name": folder.resolve().name, "recipe": text}


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in the error for what is in it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OSError) as error:
        if isinstance(error, FormatError) and str(error).startswith(str(path)):
            raise
        raise FormatError(path, f"is damaged ({error!r})", hint=HINT) from error


def result_data(result: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the same without a folder.

    Args:
        result: what ``result.json`` holds: measured networks by name and more; of `compress` the report.
        stages: the numbers of each finished stage of a run.
    """
    return {
        "name": "",
        "recipe": "",
        "environment": result.get("environment", {}),
        "split": _split(result),
        "verdict": _verdict(result),
        "verdicts": {str(name): Verdict.from_dict(found).to_dict() for name, found in (result.get("verdicts") or {}).items()},
        "tried": [dict(one) for one in result.get("tried") or []],
        "measured": {LABELS.get(name, name): entry for name, entry in result.items() if name != "packed" and _is_measured(entry)},
        "coded": _coded(result),
        "stages": [*(_stage(name, numbers) for name, numbers in stages.items()), *_compress_stages(result)],
        "ranks": _ranks(result, stages),
        "spectra": _spectra(stages),
    }


def _verdict(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the verdict as plain data, checked."""
    found = result.get("verdict")
    return None if found is None else Verdict.from_dict(found).to_dict()


def _is_measured(entry: Any) -> bool:
    return isinstance(entry, dict) and "size_bytes" in entry


def _coded(result: Mapping[str, Any]) -> list[list[Any]]:
    """Return name, bytes of values and of positions of each tensor in the coded file, the largest first."""
    tensors = (result.get("packed") or {}).get("tensors") or {}
    listed = [[name, float(data), float(index)] for name, (data, index) in tensors.items()]
    return sorted(listed, key=lambda line: -line[1] - line[2])


def _split(result: Mapping[str, Any]) -> str:
    """Return what accuracy and loss were measured on, in words."""
    if "split" in result:
        return "calibration set, of training examples" if result["split"] == "calibration" else f"{result['split']} split"
    return "validation split (where compress had none: the calibration set)" if "scores" in result else "test split"


def _compress_stages(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the scores and the log of `compress` as stages of a run."""
    scores, history = result.get("scores") or {}, result.get("history") or {}
    names = {"cut": "val_cut", "recalibrated": "val_recalibrated", "corrected": "val_corrected"}
    cut = {key: scores[name] for name, key in names.items() if name in scores}
    before = [_stage("dense", {"val": scores["dense"]})] if "dense" in scores else []
    after = {"phases": [history], "val": scores["final"]} if "final" in scores else {"phases": [history]}
    return [*before, _stage("cut", {}) | {"val": cut}, _stage("fine-tuning", after)] if scores or history.get("epochs") else []


def _stage(name: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return one stage: its phases, each a list of epochs, cuts and layers of each, its values on the validation split, its seconds."""
    phases = [phase for phase in _histories(numbers) if phase.get("epochs")]
    return {
        "name": name,
        "phases": [phase["epochs"] for phase in phases],
        "cuts": [[{key: cut[key] for key in ("step", "epoch")} for cut in phase.get("cuts") or [] if "epoch" in cut] for phase in phases],
        "layers": [_course(phase) for phase in phases],
        "val": {key: _scores(numbers[key]) for key in ("val_cut", "val_recalibrated", "val") if key in numbers},
        "seconds": numbers.get("seconds"),
    }


def _scores(values: Mapping[str, Any]) -> dict[str, float]:
    return {metric: float(value) for metric, value in values.items()}


def _histories(numbers: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the history of each phase; older files hold the lines of the epochs alone."""
    if "phases" not in numbers:
        return [numbers]
    more = [key for key in ("cuts", "layers") if key in numbers]
    return [
        phase if isinstance(phase, dict) else {"epochs": phase, **{key: numbers[key][index] for key in more}}
        for index, phase in enumerate(numbers["phases"])
    ]


def _course(phase: Mapping[str, Any]) -> dict[str, Any]:
    """Return rank and orthogonality defect of each weight over the epochs of a phase, thinned out; the first epochs may be missing."""
    lines = phase.get("layers") or []
    missing = len(phase["epochs"]) - len(lines)
    places = _places(len(lines))
    names = lines[-1]["ranks"] if lines else {}
    return {
        "epochs": [missing + place + 1 for place in places],
        "ranks": {name: [rung_of(lines[place]["ranks"][name]) for place in places] for name in names},
        "defects": {name: [float(f"{lines[place]['defects'][name]:.3g}") for place in places] for name in names},
    }


def _ranks(result: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    final = result.get("final") or {}
    found: dict[str, Any] = final.get("ranks") or next((numbers["ranks"] for numbers in stages.values() if "ranks" in numbers), {})
    return {name: rung_of(size) for name, size in found.items()}


def _spectra(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, list[list[float | int]]]:
    """Return the spectra before the cut, thinned out for drawing."""
    found: Mapping[str, Sequence[float]] = next((numbers["spectra"] for numbers in stages.values() if "spectra" in numbers), {})
    return {name: _thinned(values) for name, values in found.items()}


def measurements(run: Mapping[str, Any]) -> dict[str, Measurement]:
    """Return the measured networks of `run_data` by their labels."""
    return {name: Measurement.from_dict(entry) for name, entry in run["measured"].items()}
