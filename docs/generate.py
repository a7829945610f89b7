"""Write ``docs/reference`` and ``docs/methods/index.md`` from public names and tables of methods: ``python docs/generate.py``."""

import importlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import spectrim
from spectrim import protocols
from spectrim.forms import Form
from spectrim.layers import METHODS
from spectrim.tables import Row

DOCS = Path(__file__).parent
NOTE = "This page is written by `python docs/generate.py` from the code; a test compares the two."
TABLES = [
    ("Penalties", "spectrim.penalties", protocols.Penalty),
    ("Rank rules", "spectrim.budget.rules", protocols.RankRule),
    ("Distortion", "spectrim.budget.distortion", protocols.Importance),
    ("Courses", "spectrim.training.methods", protocols.Course),
    ("Projections", "spectrim.projections", protocols.Projection),
    ("Forms of a weight", "spectrim.forms", Form),
]
"""Heading, module with ``METHODS`` and ``LAWS``, and contract, in the order of the pages."""

VERBS = ["compress", "plan", "factorize", "coverage", "match", "fit", "calibrate", "allocate", "prune", "prune_", "correct", "recalibrate"]
VERBS += ["merge", "same_function", "evaluate", "measure", "compare_latency", "latency_table", "export", "quantize", "save", "load"]
"""Functions in the order of the pipeline; others follow by name."""

FURTHER = {
    "Budgets and distortion": [
        "spectrim.budget.Plan",
        "spectrim.budget.LatencyTable",
        "spectrim.budget.device.latency_kit",
        "spectrim.budget.table_file.read_table",
        "spectrim.budget.distortion.compare_importances",
    ],
    "Weights and optimizers": [
        "spectrim.layers.named_factors",
        "spectrim.layers.gathered",
        "spectrim.surgery.balance_",
        "spectrim.surgery.prune_optimizer_state",
        "spectrim.training.choose_execution",
    ],
    "Many tasks": [
        "spectrim.surgery.add_task",
        "spectrim.surgery.select_task",
        "spectrim.surgery.prune_task",
        "spectrim.surgery.one_task",
        "spectrim.surgery.sharing",
        "spectrim.surgery.params_of_task",
        "spectrim.surgery.tasks_of",
        "spectrim.surgery.selected_task",
    ],
    "Results of the verbs": [
        "spectrim.metrics.Measurement",
        "spectrim.metrics.compare_table",
        "spectrim.pipeline.Compressed",
        "spectrim.runtimes.export.Exported",
        "spectrim.runtimes.run_exported",
        "spectrim.runtimes.Int8",
        "spectrim.runtimes.sensitivity",
        "spectrim.runtimes.evaluate_exported",
    ],
    "Coded files": [
        "spectrim.budget.rounding.round_to.round_to",
        "spectrim.budget.rounding.round_to.Rounded",
        "spectrim.storage.pack.pack",
        "spectrim.storage.pack.unpack",
        "spectrim.storage.pack.Packed",
    ],
    "Crossbars": [
        "spectrim.runtimes.crossbar.Device",
        "spectrim.runtimes.crossbar.Mapping",
        "spectrim.runtimes.crossbar.on_crossbars",
        "spectrim.runtimes.crossbar.monte_carlo",
        "spectrim.runtimes.crossbar.price_on_crossbars",
    ],
    "Training": [
        "spectrim.training.History",
        "spectrim.training.EpochCallback",
        "spectrim.training.tuning.one_cycle",
        "spectrim.protocols.Bits",
        "spectrim.protocols.Change",
        "spectrim.protocols.Lesson",
        "spectrim.protocols.Seen",
    ],
    "Distillation": ["spectrim.training.distillation.hint_layers", "spectrim.training.distillation.outputs_of"],
    "Factorized layers": [
        "spectrim.forms.svd.Factors",
        "spectrim.layers.FactorizedLayer",
        "spectrim.layers.register",
        "spectrim.plain.chain.PlainPair",
    ],
    "In other training loops": [
        "spectrim.integrations.tracking.Tracking",
        "spectrim.integrations.transformers.LowRankTrainer",
        "spectrim.integrations.transformers.SpectrimMixin",
        "spectrim.integrations.transformers.SpectrimCallback",
        "spectrim.integrations.lightning.SpectrimCallback",
        "spectrim.integrations.lightning.penalty",
        "spectrim.integrations.steps.match_ranks",
        "spectrim.integrations.adapters.adapter_targets",
        "spectrim.integrations.batches.pairs",
        "spectrim.integrations.batches.model_loss",
        "spectrim.integrations.pretrained.save_pretrained",
        "spectrim.integrations.pretrained.from_pretrained",
        "spectrim.integrations.pretrained.push_to_hub",
    ],
}
"""Names below the top level that users meet."""


def summary(thing: object) -> str:
    """Return the first paragraph of a docstring on one line, with Markdown's code marks."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def methods_of(module: str) -> Sequence[Row[Any]]:
    """Return the table of a module."""
    rows: Sequence[Row[Any]] = importlib.import_module(module).METHODS
    return rows


def classes(rows: Iterable[Row[Any]]) -> dict[type, list[Row[Any]]]:
    """Group the rows by class, in their order."""
    grouped: dict[type, list[Row[Any]]] = {}
    for row in rows:
        grouped.setdefault(row.method, []).append(row)
    return grouped


def title(card: str) -> str:
    """Return the heading of a method card."""
    return (DOCS / "methods" / f"{card}.md").read_text(encoding="utf-8").partition("# ")[2].partition("\n")[0]


def path_of(method: type, module: str) -> str:
    """Return where users import a method from: the top, or the room of its table."""
    if method.__name__ in spectrim.__all__:
        return f"spectrim.{method.__name__}"
    room = module if hasattr(importlib.import_module(module), "__path__") else module.rpartition(".")[0]
    return f"{room}.{method.__name__}"


def public() -> dict[str, Any]:
    """Return the public names without those that a table of methods holds."""
    tabled = {row.method for _, module, _ in TABLES for row in methods_of(module)}
    return {name: getattr(spectrim, name) for name in spectrim.__all__ if getattr(spectrim, name) not in tabled}


def blocks(paths: Iterable[str]) -> list[str]:
    """Return the lines that mkdocstrings replaces by the documentation of each name."""
    return [f"::: {path}" for path in paths]


def functions() -> list[str]:
    """Return the verbs in the order of the pipeline."""
    found = [name for name, thing in public().items() if inspect.isfunction(thing)]
    return sorted(found, key=lambda name: (VERBS.index(name) if name in VERBS else len(VERBS), name))


def values() -> list[str]:
    """Return the public names that are neither verbs nor rows of a table."""
    return [name for name, thing in public().items() if not inspect.isfunction(thing)]


def slug(heading: str) -> str:
    """Return the file name of a heading, without its suffix."""
    return heading.lower().replace(" ", "-")


def reference() -> str:
    """Return the first page of the reference: a line for each verb, the tables of methods, layers, and what is further down."""
    lines = ["# Reference", "", NOTE, "", "## Verbs", ""]
    lines += [f"- [`{name}`]({name}.md): {summary(getattr(spectrim, name))}" for name in functions()]
    lines += ["", "## Values", "", *(f"- [`{name}`]({name}.md): {summary(getattr(spectrim, name))}" for name in values())]
    for heading, module, contract in TABLES:
        lines += ["", f"## {heading}", "", summary(contract), ""]
        for method in classes(methods_of(module)):
            lines.append(f"- [`{method.__name__}`][{path_of(method, module)}]: {summary(method)}")
    lines += ["", "## Kinds of layers", "", "What each of them takes is in [supported layers](../supported-layers.md).", ""]
    lines += [f"- `{row.label}`: {summary(row.method)}" for row in METHODS]
    lines += ["", "## Below the top level", ""]
    for heading, paths in FURTHER.items():
        names = (path.rpartition(".")[2] for path in paths)
        lines.append(f"- [{heading}]({slug(heading)}.md): {', '.join(f'`{name}`' for name in names)}")
    return "\n".join(lines) + "\n"


def page(title: str, paths: Sequence[str]) -> str:
    """Return a page of the reference: what mkdocstrings replaces by the documentation of each name."""
    return "\n".join([f"# {title}", "", *blocks(paths)]) + "\n"


def pages() -> dict[Path, Callable[[], str]]:
    """Return what writes each page: one for each verb and value, and for each group of other names."""
    folder = DOCS / "reference"
    made: dict[Path, Callable[[], str]] = {folder / "index.md": reference}
    made |= {folder / f"{name}.md": partial(page, name, [f"spectrim.{name}"]) for name in [*functions(), *values()]}
    made |= {folder / f"{slug(heading)}.md": partial(page, heading, paths) for heading, paths in FURTHER.items()}
    return made | {DOCS / "methods" / "index.md": index}


def entry(method: type, module: str, rows: Sequence[Row[Any]]) -> list[str]:
    """Return the lines of one method: its sentence, its card, and the laws of its rows."""
    card = rows[0].card
    laws = ", ".join(f"*{law}*" for law in sorted(set().union(*(row.laws for row in rows))))
    line = f"- [`{method.__name__}`][{path_of(method, module)}]: {summary(method)}"
    return [line, f"  Card: [{title(card)}]({card}.md)." + (f" Laws: {laws}." if laws else "")]


def index() -> str:
    """Return the list of all methods: a section for each contract, with the meaning of its laws."""
    lines = ["# Methods", "", NOTE, ""]
    lines += ["A method is a frozen dataclass: its fields are its settings, checked when it is made, and it is called.", ""]
    lines += ["Tests hold every method to the laws listed with it."]
    for heading, module, contract in TABLES:
        lines += ["", f"## {heading}", "", summary(contract), ""]
        for method, rows in classes(methods_of(module)).items():
            lines += entry(method, module, rows)
        if laws := importlib.import_module(module).LAWS:
            lines += ["", "Laws:", "", *(f"- *{law}*: {meaning}." for law, meaning in laws.items())]
    return "\n".join(lines) + "\n"


PAGES = pages()

if __name__ == "__main__":
    (DOCS / "reference").mkdir(exist_ok=True)
    for path, render in PAGES.items():
        path.write_text(render(), encoding="utf-8")
