"""The model card of a low-rank model: what it is, how to load it, what was cut and what it cost."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from spectrim.forms.form import Size, shown
from spectrim.metrics.measurement import Measurement, compare_table
from spectrim.pipeline.compressed import Compressed
from spectrim.plain.chain import PlainPair
from spectrim.surgery.coverage import LayerCoverage, coverage

NAMED = 4
"""Most layers named for one reason."""

Row = tuple[str, str, str, str]


def model_card(
    model: nn.Module, name: str, base_model: str | None, report: Compressed | Mapping[str, Measurement] | None, *, own_class: bool = False
) -> str:
    """Return a model card in Markdown, with the front matter of the Hub.

    Args:
        model: factorized or merged.
        name: title, and what the example loads.
        base_model: name on the Hub of the dense model; None to leave it out.
        report: measurements, and with a `Compressed` the scores and the reasons of `coverage` too.
        own_class: whether the class of the model has to be built by the reader.
    """
    made = report if isinstance(report, Compressed) else None
    measured = report.measured if isinstance(report, Compressed) else report
    lines = coverage(model) if made is None else made.coverage
    kind = type(model).__name__
    parts = [
        _front_matter(model, base_model),
        f"# {name}",
        f"`{kind}` with low-rank weights{f', made from `{base_model}`' if base_model else ''} by spectrim.",
        "## Load it",
        _example(name, kind, own_class),
    ]
    if measured:
        parts += ["## Size and cost", compare_table({_label(key): entry for key, entry in measured.items()})]
    if made is not None:
        parts.append(f"Step by step, on the data that `compress` was given:\n\n```\n{made.stages()}\n```")
    parts += _layers(model, lines, None if made is None else made.ranks)
    return "\n\n".join(parts) + "\n"


def _label(name: str) -> str:
    return "low-rank" if name == "final" else name


def _front_matter(model: Any, base_model: str | None) -> str:
    """Return YAML; JSON strings are YAML too."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    lines = ["---", "library_name: spectrim", "tags:", *(f"- {json.dumps(tag)}" for tag in ("low-rank", "spectrim", family) if tag)]
    if base_model:
        lines.append(f"base_model: {json.dumps(base_model)}")
    return "\n".join([*lines, "# license: state it here; the license of the base model still applies", "---"])


def _example(name: str, kind: str, own_class: bool) -> str:
    more = f", model={kind}(...)" if own_class else ""
    note = "this folder, or its name on the Hub" + ("; the dense original, built by you" if own_class else "")
    code = ["from spectrim.integrations.pretrained import from_pretrained", "", f'model = from_pretrained("{name}"{more})  # {note}']
    why = "`AutoModel.from_pretrained` alone finds no weights here: they belong to layers of other shapes than the config describes."
    return "\n".join(["```python", *code, "```", "", why])


def _layers(model: nn.Module, lines: Sequence[LayerCoverage], ranks: Mapping[str, Size] | None) -> list[str]:
    """Return the sections about low-rank and dense layers."""
    rows, inside = _rows(model, lines, ranks)
    skipped: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        if not (line.factorized or line.reason.endswith("has vectors only")) and not any(
            line.name == name or line.name.startswith(f"{name}.") for name in inside
        ):
            skipped["it was left dense" if line.reason == "can be factorized" else line.reason].append(line.name or "(model)")
    parts = []
    if rows:
        table = _table([("layer", "weight", "rank", "what"), *rows])
        parts += ["## Weights and ranks", f"<details><summary>{len(rows)} weights</summary>\n\n{table}\n\n</details>"]
    if skipped:
        reasons = [(reason, str(len(names)), _some(names)) for reason, names in skipped.items()]
        parts += ["## Unchanged layers", _table([("why", "count", "layers"), *reasons])]
    return parts


def _rows(model: nn.Module, lines: Sequence[LayerCoverage], ranks: Mapping[str, Size] | None) -> tuple[list[Row], list[str]]:
    """Return name, shape, rank and form of each low-rank weight, and the names of what holds them."""
    pairs = [(name, module) for name, module in model.named_modules() if isinstance(module, PlainPair)]
    known = [line for line in lines if line.factorized and line.shape is not None]
    if known:
        return [_known(line, ranks or {}) for line in known], [name for name, _ in pairs]
    return [(name, _size(pair.weight.shape), str(_rank(pair)), "two layers") for name, pair in pairs], [name for name, _ in pairs]


def _known(line: LayerCoverage, ranks: Mapping[str, Size]) -> Row:
    assert line.shape is not None
    return (
        line.name,
        _size(line.shape, line.blocks),
        f"{shown(ranks.get(line.name, line.rank or 0))} of {shown(line.full or min(line.shape))}",
        line.reason,
    )


def _rank(pair: Any) -> int:
    second = pair[1]
    return int(second.in_features if isinstance(second, nn.Linear) else second.in_channels // second.groups)


def _size(shape: Iterable[int], blocks: int = 1) -> str:
    size = " x ".join(map(str, shape))
    return f"{blocks} x {size}" if blocks > 1 else size


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(f"`{name}`" for name in names[:NAMED]) + more


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    head, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])
