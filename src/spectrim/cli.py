"""The command line: each body checks, calls one function, prints."""

import json
import logging
import shutil
import signal
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from rich.console import Console
from torch import nn
from torch.utils._pytree import tree_map_only

from spectrim.arguments import parser
from spectrim.budget.allocate import allocate
from spectrim.budget.budget import Budget
from spectrim.budget.latency_table import latency_table
from spectrim.budget.plan import BUDGETS, plan
from spectrim.errors import FormatError, RecipeError, SettingError
from spectrim.files import read_json, temporary_beside
from spectrim.metrics.evaluate import evaluate
from spectrim.metrics.inputs import batch_size_of, first_examples, one_example
from spectrim.metrics.measurement import Measurement, compare_table, measure
from spectrim.pipeline.components import make_loss
from spectrim.pipeline.compress import Compressed, compress
from spectrim.pipeline.folders import RECIPE, Contents, contents, finish
from spectrim.pipeline.recipe import Recipe, read_recipe
from spectrim.pipeline.run import STAGE, Run, make_data, make_model
from spectrim.report import PLAN, text_report, write_report
from spectrim.runtimes.export import export
from spectrim.runtimes.formats import SUFFIXES, _format_of
from spectrim.runtimes.int8 import quantize
from spectrim.storage.save import load
from spectrim.surgery.coverage import coverage
from spectrim.surgery.factorize import factorize

LIMITS = ("macs", "params", "size", "size_bytes", "latency", "latency_s")
PAGE_BUDGETS = (0.65, 0.5, 0.33)
"""Budgets that the page of a run has a table for; its slider solves any other."""
NAMES = {"final": "low-rank", "truncated": "truncated SVD", "continued": "dense, trained on"}


def run(args: Namespace) -> None:
    """Run a recipe stage by stage; finished stages are skipped."""
    recipe = read_recipe(args.recipe, _changes(args))
    job = Run(recipe, Path(args.out or Path("runs") / Path(args.recipe).stem), progress=not args.quiet)
    with job.hold():
        result = job.run()
        _plan_of_run(job)
        page = write_report(job.out)
    measured = {NAMES.get(k, k): Measurement.from_dict(result[k]) for k in ("dense", "final", "truncated", "continued") if k in result}
    text = f"{compare_table(measured)}\nwritten to {job.out}; the page: {page}"
    _show(args, text, {name: result[name] for name in ("dense", "final")})


def compress_(args: Namespace) -> None:
    """Compress a recipe's dense network to a budget, or to several, each in a folder inside; one page shows them all."""
    budgets = _budgets(args)
    recipe = read_recipe(args.recipe, _changes(args), cut=False)
    names = ["-".join(f"{unit}{value:g}" for unit, value in budget.limits.items()) for budget in budgets]
    out = Path(args.out or Path("runs") / f"{Path(args.recipe).stem}-compress-{'-'.join(names)}")
    job = Run(recipe, out, progress=not args.quiet)
    with job.hold():
        _check_budgets(job, budgets)
        if len(budgets) == 1:
            made, measured, result = _compressed(job, budgets[0], args)
            finish(out, "compress", result, made.coverage)
            text = f"{made.stages()}\n{_table(measured)}"
        else:
            measured = _sweep(job, dict(zip(names, budgets, strict=True)), args)
            finish(out, "sweep", {name: entry.to_dict() for name, entry in measured.items()} | {"split": "test"})
            text = _table(measured)
        _plan_of_run(job)
        page = write_report(out)
    text = f"{text}\naccuracy and loss on the test split\nwritten to {out}; the page: {page}"
    _show(args, text, {name: entry.to_dict() for name, entry in measured.items()})


def _table(measured: dict[str, Measurement]) -> str:
    return compare_table({NAMES.get(name, name): entry for name, entry in measured.items()})


def _sweep(job: Run, budgets: dict[str, Budget], args: Namespace) -> dict[str, Measurement]:
    """Compress one dense network to several budgets, each in a folder inside, and return the measurements."""
    found: dict[str, Measurement] = {}
    job.dense()
    for name, budget in budgets.items():
        one = Run(job.recipe, job.out / name, progress=job.progress)
        with one.hold():
            _copy_dense(job.out / "1-dense", one.out / "1-dense")
            made, measured, result = _compressed(one, budget, args)
            finish(one.out, "compress", result, made.coverage)
            _plan_of_run(one)
            write_report(one.out)
        found |= {"dense": found.get("dense", measured["dense"]), name: measured["final"]}
    return found


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
    recipe, dense, table = job.recipe, job.dense(), None
    for name in ("settings.json", "cut/cut.json"):
        if (job.out / "compress" / name).exists():
            read_json(job.out / "compress" / name, f"delete {job.out / 'compress'} to begin again")
    if args.backend or args.latency or args.latency_s:
        timed = factorize(dense, recipe.factorize.scheme, recipe.factorize.layers())
        table = latency_table(timed, job.example, backend=args.backend or "eager", progress=not args.quiet)
    job.begin("compress")
    data = job.data
    made = compress(
        dense, data.train, job.loss, budget, args.epochs, example_inputs=job.example, eval_data=data.val,
        scheme=recipe.factorize.scheme, where=recipe.factorize.layers(), cut=args.cut, squeeze=args.squeeze, examples=args.examples,
        precision=recipe.precision, compiled=recipe.compiled, latency=table, folder=job.out / "compress", progress=not args.quiet,
    )  # fmt: skip
    job.begin("measure")
    tested = {name: evaluate(model, job.data.test, job.loss) for name, model in (("dense", dense), ("final", made.model))}
    measured = {name: replace(made.measured[name], accuracy=found.get("accuracy"), loss=found["loss"]) for name, found in tested.items()}
    measured["final"] = replace(measured["final"], ranks=made.ranks)
    result = made.report | {name: entry.to_dict() for name, entry in measured.items()} | {"split": "test"}
    return made, measured, result


def _budgets(args: Namespace) -> list[Budget]:
    """Return the budgets that the options ask for, all of them checked."""
    listed: dict[str, list[float]] = {}
    for name in LIMITS:
        if (value := getattr(args, name)) is not None:
            listed[name] = _fractions(f"--{name}", value) if isinstance(value, str) else [value]
    if not listed:
        raise RecipeError("compress", "no budget", allowed=", ".join(f"--{name}" for name in LIMITS) + "; --macs 0.4 keeps 40 %")
    count = max(map(len, listed.values()))
    if any(len(values) not in (1, count) for values in listed.values()):
        raise RecipeError("compress", "lists of different lengths", allowed="lists of one length, or single values")
    if not 0 <= args.squeeze < 1:
        raise RecipeError("--squeeze", f"got {args.squeeze}", allowed="a share of the epochs in [0, 1)")
    try:
        return [Budget(**{name: values[index % len(values)] for name, values in listed.items()}) for index in range(count)]
    except SettingError as error:
        raise RecipeError("compress", str(error)) from error


def _check_budgets(job: Run, budgets: list[Budget]) -> None:
    """Check that ranks can meet the budgets before the dense network is trained, as far as no seconds are asked for."""
    counted = [budget for budget in budgets if not {"latency", "latency_s"} & set(budget.limits)]
    if not counted or not job.recipe.dense.epochs or (job.out / "1-dense" / STAGE).exists():
        return
    low = factorize(job.initial, job.recipe.factorize.scheme, job.recipe.factorize.layers())
    try:
        for budget in counted:
            allocate(low, budget, job.example)
    except SettingError as error:
        raise RecipeError("compress", str(error)) from error


def measure_(args: Namespace) -> None:
    """Measure the network of a recipe or of a folder, or show what was measured when the folder was finished."""
    found, held = None, _contents(args.target)
    if held is not None and args.split is None and args.threads is None:
        found = held.measured("final")
    if found is None:
        model, recipe = _network(args.target, held, "final")
        data = make_data(recipe)
        split = getattr(data, args.split or "val")
        example = one_example(data.val, model)
        found = measure(model, example, data=split, loss=make_loss(recipe.loss), threads=args.threads or 1)
        where = f"measured on the {args.split or 'val'} split"
    else:
        where = "as measured on the test split when the folder was written; --split measures again, and calls the recipe's code"
    _show(args, f"{found.summary()}\n{where}", found.to_dict())


def coverage_(args: Namespace) -> None:
    """List every parameterized layer: factorized, or why not."""
    held = _contents(args.target)
    lines = held.coverage if held is not None else None
    if lines is None:
        model, recipe = _network(args.target, held, "factorized")
        where = recipe.factorize.layers()
        if held is None:
            model = factorize(model, recipe.factorize.scheme, where)
        lines = coverage(model, where)
    _show(args, str(lines), [vars(line) for line in lines])


def plan_(args: Namespace) -> None:
    """Predict the result of each budget, without training: ranks, costs, and the error right after the cut."""
    budgets = _fractions("--budgets", args.budgets) if args.budgets else BUDGETS
    held = _contents(args.target)
    model, recipe = _network(args.target, held, "dense")
    if held is None and recipe.dense.epochs:
        _note(f"the recipe first trains its dense network; this plan is of the untrained one: spectrim run {args.target}, plan its folder")
    data, where = make_data(recipe), recipe.factorize.layers()
    scheme, inputs, table = recipe.factorize.scheme, one_example(data.val), None
    if args.latency:
        model = factorize(model, scheme, where)
        table = latency_table(model, inputs, backend=args.latency, threads=args.threads, progress=not args.quiet)
    calibrating, loss = (None, None) if args.weights_only else (data.train, make_loss(recipe.loss))
    found = plan(
        model, inputs, calibrating, loss, budgets=budgets, scheme=scheme, where=where, latency=table,
        eval_data=None if args.weights_only else data.val, examples=args.examples, progress=not args.quiet,
    )  # fmt: skip
    text = str(found)
    if args.out:
        found.save(args.out)
        text += f"\nwritten to {args.out} and {write_report(args.out)}"
    _show(args, text, found.to_dict())


def report_(args: Namespace) -> None:
    """Write the HTML page of a run's folder or of a plan; it needs no server and no network, and nothing is imported or called."""
    folder = Path(args.target)
    if args.text:
        print(text_report(folder))
        return
    path = write_report(folder, args.out)
    print(f"written to {path}")
    if args.open:
        webbrowser.open(path.resolve().as_uri())


def export_(args: Namespace) -> None:
    """Write the network of a recipe, or the final one of a folder, for another runtime."""
    if not args.int8 and not args.format and not args.out:
        raise RecipeError("export", "the format is missing", allowed=f"--format {', '.join(SUFFIXES.values())}; or --out with a suffix")
    if args.int8 and (args.format not in (None, "onnx") or args.static or args.tolerance is not None):
        raise RecipeError("--int8", "writes ONNX for any batch, and has no tolerance", allowed="--format onnx, --out FILE.onnx")
    if args.tolerance is not None and not args.tolerance > 0:
        raise RecipeError("--tolerance", f"got {args.tolerance}", allowed="a number above 0")
    held, path = _contents(args.target), _export_path(args)
    model, recipe = _network(args.target, held, "final")
    data = make_data(recipe)
    if args.int8:
        made: Any = quantize(model, data.train, path)
        _show(args, f"{made.summary()}\nwritten to {made.path}", made.to_dict())
        return
    (inputs, _), *_ = first_examples(data.val, 1)
    size = batch_size_of(inputs)
    if args.batch > size:
        raise RecipeError("--batch", f"got {args.batch}", allowed=f"up to {size}, a batch of the validation split")
    inputs = tree_map_only(torch.Tensor, lambda tensor: tensor[: args.batch], inputs)
    made = export(
        model, inputs, path, args.format, dynamic_batch=not args.static, max_batch=max(args.max_batch, args.batch),
        tolerance=args.tolerance, latency=True, threads=args.threads,
    )  # fmt: skip
    _show(args, made.summary(), made.to_dict())


def _export_path(args: Namespace) -> Path:
    """Return the file to write, whose suffix and format agree."""
    target = Path(args.target)
    suffix = "-int8.onnx" if args.int8 else next((suffix for suffix, format in SUFFIXES.items() if format == args.format), "")
    path = Path(args.out or f"{target / 'model' if target.is_dir() else target.stem}{suffix}")
    try:
        _format_of(path, "onnx" if args.int8 else args.format)
    except SettingError as error:
        raise RecipeError("--out", str(error)) from error
    return path


def _plan_of_run(job: Run) -> None:
    """Write the plan of the network that a run or `compress` cut, where there is none or the network is newer."""
    stage, path = job.out / ("2-train" if (job.out / "2-train").is_dir() else "1-dense"), job.out / PLAN
    weights = stage / "model.safetensors"
    if not weights.is_file() or (path.is_file() and path.stat().st_mtime >= weights.stat().st_mtime):
        return
    settings = job.recipe.factorize
    with Console(stderr=True, quiet=not job.progress).status("planning other budgets, for the page"):
        found = plan(load(stage, job.initial), job.example, budgets=PAGE_BUDGETS, scheme=settings.scheme, where=settings.layers())
    found.save(path)


def _fractions(option: str, text: str) -> list[float]:
    """Return the numbers of a list with commas."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value <= 1 for value in values) or len(set(values)) < len(values):
        raise RecipeError(option, f"got {text!r}", allowed="fractions kept, in (0, 1], each once, with commas: 0.5,0.33")
    return values


def _changes(args: Namespace) -> list[str]:
    return [*(args.set or []), *([] if args.seed is None else [f"seed={args.seed}"])]


def _show(args: Namespace, text: str, values: Any) -> None:
    """Print a result: for people, or as JSON alone."""
    print(json.dumps(values) if args.json else text)


def _note(text: str) -> None:
    Console(stderr=True).print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _contents(target: str) -> Contents | None:
    """Return what a folder holds; None for a recipe."""
    return contents(Path(target)) if Path(target).is_dir() else None


def _network(target: str, held: Contents | None, name: str) -> tuple[nn.Module, Recipe]:
    """Return the dense network of a recipe file, or one that a folder holds; both call what the recipe names."""
    if held is None:
        recipe = read_recipe(target, cut=False)
        return make_model(recipe), recipe
    place, path = held.network(name), held.folder / RECIPE
    _note(f"calling the code that {path} names; do so only for folders that you trust")
    try:
        recipe = read_recipe(path, cut=False)
    except RecipeError as error:
        raise error if str(path) in str(error) else FormatError(path, str(error)) from error
    return load(place, make_model(recipe)), recipe


BODIES: dict[str, Callable[[Namespace], None]] = {
    "run": run,
    "compress": compress_,
    "measure": measure_,
    "coverage": coverage_,
    "plan": plan_,
    "report": report_,
    "export": export_,
}


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def _termination() -> Iterator[None]:
    """Let SIGTERM end what runs inside as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exit codes: 0, 2 for wrong usage (a bad recipe too), 1 for a failure, 130 after Ctrl-C, 143 after SIGTERM."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    args = parser().parse_args(argv)
    errors = Console(stderr=True)
    try:
        with _termination():
            BODIES[args.command](args[args.command])
    except RecipeError as error:
        errors.print(f"spectrim: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        more = "; the same command resumes from the last checkpoint" if args.command in ("run", "compress") else ""
        errors.print(f"stopped{more}", markup=False)
        sys.exit(143 if isinstance(stopped, _Terminated) else 130)
    except (ValueError, RuntimeError, OSError, ImportError, torch.OutOfMemoryError) as error:
        errors.print(f"spectrim: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
