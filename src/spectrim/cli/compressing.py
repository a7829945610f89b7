"""`spectrim run` and `spectrim compress`: to one budget or several, in a folder."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from spectrim.budget.allocate import allocate
from spectrim.budget.budget import CODED, Budget
from spectrim.budget.plan import plan
from spectrim.budget.table_file import read_table
from spectrim.cli.shared import changes, coded_bytes, crossbars, fractions, show
from spectrim.errors import SettingError, UsageError
from spectrim.files import read_json, temporary_beside
from spectrim.metrics.evaluate import evaluate
from spectrim.metrics.measurement import Measurement, compare_table
from spectrim.metrics.verdict import Verdict
from spectrim.pipeline.compress import compress
from spectrim.pipeline.compressed import Compressed
from spectrim.pipeline.folders import RECIPE, finish
from spectrim.pipeline.recipe import read_recipe
from spectrim.pipeline.run import Run
from spectrim.pipeline.stages import STAGE
from spectrim.report import PLAN, write_report
from spectrim.storage.save import load
from spectrim.surgery.factorize import factorize
from spectrim.training.parts import Reconstruction
from spectrim.training.tuning import Tuning

LIMITS = (
    "macs",
    "params",
    "size",
    "size_bytes",
    "latency",
    "latency_s",
    "tiles",
    "tile_reads",
    "tile_count",
    "max_drop",
    "max_loss_rise",
    "coded_bytes",
)


PAGE_BUDGETS = (0.65, 0.5, 0.33)
"""Budgets that the page of a run has a table for; its slider solves any other."""


NAMES = {"final": "low-rank", "truncated": "truncated SVD", "continued": "dense, trained on"}


def run(args: Namespace) -> None:
    """Run a recipe stage by stage; finished stages are skipped."""
    recipe = read_recipe(args.recipe, changes(args))
    job = Run(recipe, Path(args.out or Path("runs") / Path(args.recipe).stem), progress=not args.quiet)
    _check_place(job, args.recipe)
    with job.hold():
        result = job.run()
        plan_of_run(job)
        page = write_report(job.out)
    measured = {NAMES.get(k, k): Measurement.from_dict(result[k]) for k in ("dense", "final", "truncated", "continued") if k in result}
    text = f"{compare_table(measured)}\nwritten to {job.out}; the page: {page}\n{Verdict.from_dict(result['verdict'])}"
    show(args, text, {name: result[name] for name in ("dense", "final", "verdict")})


def compress_(args: Namespace) -> None:
    """Compress a recipe's dense network to a budget, or to several, each in a folder inside; one page shows them all."""
    budgets = _budgets(args)
    recipe = read_recipe(args.recipe, changes(args), cut=False)
    names = ["-".join(f"{unit}{value:g}" for unit, value in budget.asked.items()) for budget in budgets]
    out = Path(args.out or Path("runs") / f"{Path(args.recipe).stem}-compress-{'-'.join(names)}")
    job = Run(recipe, out, progress=not args.quiet)
    _check_place(job, args.recipe)
    with job.hold():
        _check_budgets(job, budgets, args)
        if len(budgets) == 1:
            made, measured, result = _compressed(job, budgets[0], args)
            finish(out, "compress", result, made.coverage)
            text, verdicts = f"{made.stages()}\n{_table(measured)}", {"": result["verdict"]}
        else:
            measured, verdicts = _sweep(job, dict(zip(names, budgets, strict=True)), args)
            finish(out, "sweep", {name: entry.to_dict() for name, entry in measured.items()} | {"split": "test", "verdicts": verdicts})
            text = _table(measured)
        plan_of_run(job)
        page = write_report(out)
    last = "\n".join(f"{name}: {told}" if name else str(told) for name, told in _told(verdicts).items())
    text = f"{text}\naccuracy and loss on the test split\nwritten to {out}; the page: {page}\n{last}"
    told = {"verdict": verdicts[""]} if len(budgets) == 1 else {"verdicts": verdicts}
    show(args, text, {name: entry.to_dict() for name, entry in measured.items()} | told)


def _check_place(job: Run, recipe: str) -> None:
    """Raise where the folder's recipe is the one that was read and would be replaced by its complete form."""
    written = job.out / RECIPE
    if written.is_file() and written.samefile(recipe) and written.read_text(encoding="utf-8") != job.text:
        raise UsageError("--out", f"{written} is the recipe itself, which a run would overwrite", allowed="another folder")


def _told(verdicts: Mapping[str, Mapping[str, Any]]) -> dict[str, Verdict]:
    return {name: Verdict.from_dict(fields) for name, fields in verdicts.items()}


def _table(measured: dict[str, Measurement]) -> str:
    return compare_table({NAMES.get(name, name): entry for name, entry in measured.items()})


def _sweep(job: Run, budgets: dict[str, Budget], args: Namespace) -> tuple[dict[str, Measurement], dict[str, Any]]:
    """Compress one dense network to several budgets, each in a folder inside, and return the measurements and the verdicts."""
    found: dict[str, Measurement] = {}
    verdicts: dict[str, Any] = {}
    job.dense()
    for name, budget in budgets.items():
        one = Run(job.recipe, job.out / name, progress=job.progress)
        with one.hold():
            _copy_dense(job.out / "1-dense", one.out / "1-dense")
            made, measured, result = _compressed(one, budget, args)
            finish(one.out, "compress", result, made.coverage)
            plan_of_run(one)
            write_report(one.out)
        found |= {"dense": found.get("dense", measured["dense"]), name: measured["final"]}
        verdicts[name] = result["verdict"]
    return found, verdicts


def _copy_dense(source: Path, target: Path) -> None:
    """Copy a finished stage atomically, where it differs."""
    if (target / STAGE).is_file() and (target / STAGE).read_bytes() == (source / STAGE).read_bytes():
        return
    with temporary_beside(target, folder=True) as made:
        shutil.copytree(source, made, dirs_exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)


def _compressed(job: Run, budget: Budget, args: Namespace) -> tuple[Compressed, dict[str, Measurement], dict[str, Any]]:
    """Compress in the folder of a run; return what was made, its measurements on the test split, and the result as plain data."""
    recipe, dense = job.recipe, job.dense()
    for name in ("settings.json", "cut/cut.json"):
        if (job.out / "compress" / name).exists():
            read_json(job.out / "compress" / name, f"delete {job.out / 'compress'} to begin again")
    job.begin("compress")
    data = job.data
    made = compress(
        dense, data.train, job.loss, budget, args.epochs, example_inputs=job.example, eval_data=data.val,
        scheme=recipe.factorize.scheme, where=recipe.factorize.layers(), cut=args.cut, squeeze=args.squeeze, examples=args.examples,
        calibration_seconds=args.calibration_seconds, recovery=args.recovery, narrow=_shares(args),
        writing=args.writing, reconstruct=Reconstruction(args.reconstruct) if args.reconstruct else None,
        tuning=Tuning(precision=recipe.precision, compiled=recipe.compiled),
        latency=None if args.table is None else read_table(args.table), backend=args.backend,
        crossbars=crossbars(args.crossbars), folder=job.out / "compress", progress=not args.quiet,
    )  # fmt: skip
    job.begin("measure")
    tested = {name: evaluate(model, job.data.test, job.loss) for name, model in (("dense", dense), ("final", made.model))}
    measured = {name: made.measured[name].scored(found) for name, found in tested.items()}
    measured["final"] = replace(measured["final"], ranks=made.ranks)
    verdict = made.verdict_on(measured, "test split").to_dict()
    result = made.report | {name: entry.to_dict() for name, entry in measured.items()} | {"split": "test", "verdict": verdict}
    return made, measured, result


def _budgets(args: Namespace) -> list[Budget]:
    """Return the budgets that the options ask for, all of them checked."""
    listed: dict[str, list[float]] = {}
    for name in LIMITS:
        if (value := getattr(args, name)) is not None:
            read = coded_bytes if name == CODED else fractions
            listed[name] = read(_option(name), value) if isinstance(value, str) else [value]
    if not listed:
        raise UsageError("compress", "no budget", allowed=", ".join(map(_option, LIMITS)) + "; --macs 0.4 keeps 40 %")
    count = max(map(len, listed.values()))
    if any(len(values) not in (1, count) for values in listed.values()):
        raise UsageError("compress", "lists of different lengths", allowed="lists of one length, or single values")
    crossbars(args.crossbars)
    if args.crossbars is None and {"tiles", "tile_reads", "tile_count"} & set(listed):
        raise UsageError("compress", "tiles of what size?", allowed="--crossbars rows=32,columns=32,bits=4,cell_bits=4")
    if args.calibration_seconds is not None and not args.calibration_seconds > 0:
        raise UsageError("--calibration-seconds", f"got {args.calibration_seconds:g}", allowed="seconds above 0")
    _shares(args)
    if not 0 <= args.squeeze < 1:
        raise UsageError("--squeeze", f"got {args.squeeze}", allowed="a share of the epochs in [0, 1)")
    try:
        return [Budget(**{name: values[index % len(values)] for name, values in listed.items()}) for index in range(count)]
    except SettingError as error:
        raise UsageError("compress", str(error)) from error


def _shares(args: Namespace) -> list[float] | None:
    return None if args.narrow is None else fractions("--narrow", args.narrow)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_budgets(job: Run, budgets: list[Budget], args: Namespace) -> None:
    """Check that ranks can meet the budgets before the dense network is trained, as far as no seconds are asked for."""
    limited = [replace(budget, max_drop=None, max_loss_rise=None, coded_bytes=None) for budget in budgets if budget.limits]
    counted = [budget for budget in limited if not {"latency", "latency_s"} & set(budget.limits)]
    if not counted or not job.recipe.dense.epochs or (job.out / "1-dense" / STAGE).exists():
        return
    low = factorize(job.initial, job.recipe.factorize.scheme, job.recipe.factorize.layers())
    try:
        for budget in counted:
            allocate(low, budget, job.example, crossbars=crossbars(args.crossbars))
    except SettingError as error:
        raise UsageError("compress", str(error)) from error


def plan_of_run(job: Run) -> None:
    """Write the plan of the network that a run or `compress` cut, where there is none or the network is newer."""
    stage, path = job.out / ("2-train" if (job.out / "2-train").is_dir() else "1-dense"), job.out / PLAN
    weights = stage / "model.safetensors"
    if not weights.is_file() or (path.is_file() and path.stat().st_mtime >= weights.stat().st_mtime):
        return
    settings = job.recipe.factorize
    with Console(stderr=True, quiet=not job.progress).status("planning other budgets, for the page"):
        found = plan(load(stage, job.initial), job.example, budgets=PAGE_BUDGETS, scheme=settings.scheme, where=settings.layers())
    found.save(path)
