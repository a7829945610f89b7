"""Writing the page and the text."""

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from spectrim.budget.plan_table import Plan
from spectrim.checks import check
from spectrim.errors import FormatError, SettingError
from spectrim.files import make_folder, read_json, write_text
from spectrim.metrics.measurement import compare_table
from spectrim.metrics.verdict import Verdict
from spectrim.report.data import WORDS, measurements, plan_data, result_data, run_data
from spectrim.report.shortfalls import shortfalls

PLAN = "plan.json"
"""Name of the plan in a run's folder."""

PAGE = "report.html"
"""Name of the page in a run's folder."""


def write_report(source: Plan | str | Path, path: str | Path | None = None, *, result: Mapping[str, Any] | None = None) -> Path:
    """Write one self-contained HTML page: no server, no network, no other file.

    Args:
        source: a `Plan`, the file that `Plan.save` wrote, or the folder of a run or of `compress`, with its ``plan.json`` if any.
        path: of the page; beside the plan's file or in the run's folder when omitted.
        result: what to show beside a plan: measured networks by name, as `Measurement.to_dict` gives them (``dense``, ``final``, ...), or
            the report of `compress`.

    Returns:
        The path of the page.

    Raises:
        FormatError: when `source` is neither, or is damaged, and for a `Plan` without a path.
        SettingError: when the page would take the place of the plan's file.

    Examples:
        >>> import tempfile, torch
        >>> from spectrim.budget.plan import plan
        >>> found = plan(torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.zeros(1, 8), budgets=[0.5])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_report(found, folder + "/plan.html").read_text().startswith("<!doctype html>")
        True
    """
    check("write_report", optional=("path",), source=source, path=path)
    plan, run = _read(source, result)
    if path is None and isinstance(source, Plan):
        raise FormatError("report", "has no path", hint="write_report(plan, 'plan.html')")
    target = Path(path) if path is not None else _beside(Path(str(source)))
    if not isinstance(source, Plan) and target.is_file() and Path(source).is_file() and target.samefile(source):
        raise SettingError("write_report", "path", got=str(target), rule="another file than that of the plan")
    make_folder(target.parent)
    write_text(target, _page(plan, run))
    return target


def text_report(source: Plan | str | Path, *, result: Mapping[str, Any] | None = None) -> str:
    """Return a summary of the page as text.

    Args:
        source: as for `write_report`.
        result: as for `write_report`.

    Raises:
        FormatError: as `write_report`.
    """
    return _text(*_read(source, result))


def _beside(source: Path) -> Path:
    return source / PAGE if source.is_dir() else source.with_suffix(".html")


def _read(source: Plan | str | Path, result: Mapping[str, Any] | None) -> tuple[Plan | None, dict[str, Any] | None]:
    """Return the plan and the run's data, whichever there is."""
    if not isinstance(source, Plan) and Path(source).is_dir():
        folder = Path(source)
        return _plan(folder / PLAN) if (folder / PLAN).exists() else None, run_data(folder)
    if not isinstance(source, Plan) and not Path(source).is_file():
        raise FormatError(source, "does not exist", hint="pass the folder of a run, or what spectrim plan --out wrote")
    plan = source if isinstance(source, Plan) else _plan(Path(source))
    return plan, None if result is None else result_data(result, {})


def _plan(path: Path) -> Plan:
    """Read a plan; an error names the file."""
    try:
        read_json(path)
        plan = Plan.load(path)
        plan_data(plan)
        str(plan)
    except Exception as error:  # any error from a damaged number
        if isinstance(error, FormatError) and str(error).startswith(str(path)):
            raise
        raise FormatError(path, f"is damaged ({error!r})", hint="plan again") from error
    return plan


def _page(plan: Plan | None, run: Mapping[str, Any] | None) -> str:
    title = (run or {}).get("name") or (plan.settings.get("model", "plan") if plan else "report")
    data = {"title": title, "plan": plan_data(plan) if plan else None, "run": run, "shortfalls": shortfalls(plan, run), "words": WORDS}
    folder = files("spectrim.report")
    parts = {
        "title": html.escape(str(title)),
        "style": "".join((folder / name).read_text(encoding="utf-8") for name in ("uplot.css", "page.css")),
        "script": "".join((folder / name).read_text(encoding="utf-8") for name in ("uplot.js", "knapsack.js", "charts.js", "page.js")),
        "data": escaped_json(data),
        "text": html.escape(_text(plan, run)),
    }
    page = (folder / "page.html").read_text(encoding="utf-8")
    pieces = page.split("%%")  # odd pieces name a part: the content of the parts is kept
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def escaped_json(data: Any) -> str:
    r"""Return JSON that no HTML parser can take for the end of a script; infinite numbers and NaN become null.

    Examples:
        >>> escaped_json("</script>")
        '"\\u003c/script\\u003e"'
    """
    try:
        text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {str(key): _finite(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_finite(value) for value in node]
    if isinstance(node, float) and (node != node or node in (float("inf"), float("-inf"))):
        return None
    return node


def _text(plan: Plan | None, run: Mapping[str, Any] | None) -> str:
    parts = []
    if run is not None and run["measured"]:
        parts.append(f"{compare_table(measurements(run))}\n\nAccuracy and loss on the {run['split']}.")
    fell_short = shortfalls(None, run) if plan else shortfalls(plan, run)  # a plan's own text names its budgets that cannot be met
    if fell_short:
        parts.append("\n".join(["What fell short:", *(f"- {line}" for line in fell_short)]))
    if run is not None:
        lines = [line for stage in run["stages"] for line in _stage_lines(stage)]
        parts.append("\n".join(["Validation split:", *lines]) if lines else "")
        if run["ranks"]:
            parts.append("\n".join(["Ranks:", *(f"  {name}: {rank}" for name, rank in run["ranks"].items())]))
    if plan is not None:
        parts.append(str(plan))
    if run is not None and run["verdict"]:
        parts.append(str(Verdict.from_dict(run["verdict"])))
    if run is not None and run["verdicts"]:
        parts.append("\n".join(f"{name}: {Verdict.from_dict(found)}" for name, found in run["verdicts"].items()))
    return "\n\n".join(part for part in parts if part)


def _stage_lines(stage: Mapping[str, Any]) -> list[str]:
    names = {
        "val_cut": "right after the cut",
        "val_recalibrated": "BatchNorm recalibrated",
        "val_corrected": "refitted",
        "val": "at the end",
    }
    return [
        f"  {stage['name']}, {names.get(key, key)}: " + ", ".join(f"{metric} {value:.4g}" for metric, value in values.items())
        for key, values in stage["val"].items()
    ]
