"""The command line: each body parses, calls one function, prints."""

import json
import logging
import sys
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console
from torch import nn
from torch.utils._pytree import tree_map_only

from spectrim.budget.budget import Budget
from spectrim.budget.latency_table import latency_table
from spectrim.budget.plan import BUDGETS, plan
from spectrim.errors import FormatError, RecipeError
from spectrim.metrics.evaluate import evaluate
from spectrim.metrics.inputs import batch_size_of, first_examples, one_example
from spectrim.metrics.measurement import Measurement, compare_table, measure
from spectrim.pipeline.components import make_loss
from spectrim.pipeline.compress import compress
from spectrim.pipeline.recipe import read_recipe
from spectrim.pipeline.run import RECIPE, Run, make_data, make_model
from spectrim.report import PLAN, text_report, write_report
from spectrim.runtimes.export import export
from spectrim.runtimes.formats import SUFFIXES
from spectrim.runtimes.int8 import quantize
from spectrim.storage.save import load
from spectrim.surgery.coverage import coverage
from spectrim.surgery.factorize import factorize

LIMITS = ("macs", "params", "size", "size_bytes", "latency", "latency_s")
PAGE_BUDGETS = (0.65, 0.5, 0.33)
"""Budgets that the page of a run has a table for; its slider solves any other."""
NAMES = {"final": "low-rank", "truncated": "truncated SVD", "continued": "dense, trained on"}


def run(args: Namespace) -> None:
    """Run a recipe, stage after stage; finished stages are skipped."""
    recipe = read_recipe(args.recipe, args.set or [])
    out = Path(args.out or Path("runs") / Path(args.recipe).stem)
    result = Run(recipe, out, progress=not args.quiet).run()
    measured = {NAMES.get(k, k): Measurement.from_dict(result[k]) for k in ("dense", "final", "truncated", "continued") if k in result}
    print(compare_table(measured))
    _plan_of_run(out)
    print(f"written to {out}; the page: {write_report(out)}")
    if args.json:
        print(json.dumps({name: result[name] for name in ("dense", "final")}))


def compress_(args: Namespace) -> None:
    """Compress a recipe's dense network to a budget; only its model, data, loss, dense and factorize keys are read."""
    recipe = read_recipe(args.recipe, args.set or [], cut=False)
    limits = {name: getattr(args, name) for name in LIMITS if getattr(args, name) is not None}
    if not limits:
        raise RecipeError("compress", "no budget", allowed=", ".join(f"--{name}" for name in LIMITS) + "; --macs 0.4 keeps 40 %")
    out = Path(args.out or Path("runs") / f"{Path(args.recipe).stem}-compress")
    job = Run(recipe, out, progress=not args.quiet)
    dense, table = job.dense(), None
    if args.backend or args.latency or args.latency_s:
        timed = factorize(dense, recipe.factorize.scheme, recipe.factorize.layers())
        table = latency_table(timed, job.example, backend=args.backend or "eager", progress=not args.quiet)
    made = compress(
        dense, job.data.train, job.loss, Budget(**limits), args.epochs, example_inputs=job.example, eval_data=job.data.val,
        scheme=recipe.factorize.scheme, where=recipe.factorize.layers(), cut=args.cut, squeeze=args.squeeze, examples=args.examples,
        precision=recipe.precision, compiled=recipe.compiled, latency=table, folder=out / "compress", progress=not args.quiet,
    )  # fmt: skip
    tested = {name: evaluate(model, job.data.test, job.loss) for name, model in (("dense", dense), ("final", made.model))}
    measured = {name: replace(made.measured[name], accuracy=found.get("accuracy"), loss=found["loss"]) for name, found in tested.items()}
    print(made.stages())
    print(compare_table({NAMES.get(name, name): entry for name, entry in measured.items()}))
    _plan_of_run(out)
    print(f"written to {out}; the page: {write_report(out)}")
    if args.json:
        print(json.dumps({name: entry.to_dict() for name, entry in measured.items()}))


def measure_(args: Namespace) -> None:
    """Measure the network of a recipe, or the final one of a run."""
    model, recipe, _ = _network(args.target, "5-merge")
    data = make_data(recipe)
    split = getattr(data, args.split)
    found = measure(model, one_example(data.val, model), data=split, loss=make_loss(recipe.loss), threads=args.threads)
    print(found.summary())
    if args.json:
        print(json.dumps(found.to_dict()))


def coverage_(args: Namespace) -> None:
    """List every parameterised layer: factorized, or why not."""
    model, recipe, folder = _network(args.target, "4-finetune")
    where = recipe.factorize.layers()
    if folder is None:
        model = factorize(model, recipe.factorize.scheme, where)
    lines = coverage(model, where)
    print(lines)
    if args.json:
        print(json.dumps([vars(line) for line in lines]))


def plan_(args: Namespace) -> None:
    """Say what each budget would give, without training: ranks, costs, and the error right after the cut."""
    budgets = _fractions(args.budgets) if args.budgets else BUDGETS
    model, recipe, folder = _network(args.target, "1-dense")
    if folder is None and recipe.dense.epochs:
        note = f"the recipe trains its dense network first; planned is the untrained one. spectrim run {args.target}, then plan its folder"
        Console(stderr=True).print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
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
    if args.out:
        found.save(args.out)
    print(found)
    if args.out:
        print(f"written to {args.out} and {write_report(args.out)}")
    if args.json:
        print(json.dumps(found.to_dict()))


def report_(args: Namespace) -> None:
    """Write the HTML page of a run's folder or of a plan; it needs no server and no network."""
    folder = Path(args.target)
    if folder.is_dir():
        _plan_of_run(folder)
    if args.text:
        print(text_report(folder))
        return
    path = write_report(folder, args.out)
    print(f"written to {path}")
    if args.open:
        webbrowser.open(path.resolve().as_uri())


def export_(args: Namespace) -> None:
    """Write the network of a recipe, or the final one of a run, for another runtime; the file is proved equal before it gets its name."""
    if args.int8:
        _export_int8(args)
        return
    if not args.format and not args.out:
        raise RecipeError("export", "nothing says which format", allowed=f"--format {', '.join(SUFFIXES.values())}; or --out with a suffix")
    model, recipe, folder = _network(args.target, "5-merge")
    path = Path(args.out or (folder / "model" if folder else Path(args.target).stem))
    if not args.out:
        path = path.with_name(path.name + next(suffix for suffix, format in SUFFIXES.items() if format == args.format))
    (inputs, _), *_ = first_examples(make_data(recipe).val, 1)
    held = batch_size_of(inputs)
    if args.batch > held:
        raise RecipeError("--batch", f"got {args.batch}", allowed=f"up to {held}, a batch of the validation split")
    inputs = tree_map_only(torch.Tensor, lambda tensor: tensor[: args.batch], inputs)
    made = export(
        model, inputs, path, args.format, dynamic_batch=not args.static, max_batch=max(args.max_batch, args.batch),
        tolerance=args.tolerance, latency=True, threads=args.threads,
    )  # fmt: skip
    print(made.summary())
    if args.json:
        print(json.dumps(made.to_dict()))


def _export_int8(args: Namespace) -> None:
    """Write the same network as an int8 ONNX file, calibrated on the recipe's training batches."""
    if args.format not in (None, "onnx") or args.static or args.tolerance is not None:
        raise RecipeError("--int8", "writes ONNX for any batch, and has no tolerance", allowed="--format onnx, --out FILE.onnx")
    model, recipe, folder = _network(args.target, "5-merge")
    path = Path(args.out or (folder / "model-int8.onnx" if folder else f"{Path(args.target).stem}-int8.onnx"))
    made = quantize(model, make_data(recipe).train, path)
    print(made.summary())
    print(f"written to {made.path}")
    if args.json:
        print(json.dumps(made.to_dict()))


def _plan_of_run(folder: Path) -> None:
    """Write the plan of the network that a run or `compress` cut, where there is none or the network is newer."""
    stage, path = folder / ("2-train" if (folder / "2-train").is_dir() else "1-dense"), folder / PLAN
    weights = stage / "model.safetensors"
    if not weights.is_file() or (path.is_file() and path.stat().st_mtime >= weights.stat().st_mtime):
        return
    model, recipe, _ = _network(str(folder), stage.name)
    where = recipe.factorize.layers()
    with Console(stderr=True).status("planning other budgets, for the page"):
        found = plan(model, one_example(make_data(recipe).val), budgets=PAGE_BUDGETS, scheme=recipe.factorize.scheme, where=where)
    found.save(path)


def _fractions(text: str) -> list[float]:
    """Return the numbers of a list with commas."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value <= 1 for value in values):
        raise RecipeError("--budgets", f"got {text!r}", allowed="fractions kept, in (0, 1], with commas: 0.5,0.33")
    return values


def _network(target: str, stage: str) -> tuple[nn.Module, Any, Path | None]:
    """Return the dense network of a recipe file, or the one that a stage of a run's folder left."""
    folder = Path(target)
    if not folder.is_dir():
        recipe = read_recipe(folder, cut=False)
        return make_model(recipe), recipe, None
    if not (folder / RECIPE).is_file():
        raise FormatError(folder, f"is not the folder of a run: it has no {RECIPE}", hint="pass a recipe, or what spectrim run --out wrote")
    recipe = read_recipe(folder / RECIPE, cut=False)
    return load(folder / stage, make_model(recipe)), recipe, folder


def parser() -> ArgumentParser:
    """Return the parser of the whole command line."""
    top = ArgumentParser(prog="spectrim", description="Train and ship low-rank neural networks.", version=version("spectrim"))
    commands = top.add_subcommands(required=True, dest="command")

    sub = ArgumentParser(description=run.__doc__)
    sub.add_argument("recipe", type=str, help="a YAML recipe")
    sub.add_argument("--out", type=str, help="folder of the run (default: runs/NAME)")
    sub.add_argument("--set", type=str, action="append", metavar="KEY=VALUE", help="change a key of the recipe: train.0.epochs=3")
    sub.add_argument("--json", action="store_true", help="end with one line of JSON: {dense: ..., final: ...}")
    sub.add_argument("--quiet", action="store_true", help="no progress")
    commands.add_subcommand("run", sub)

    sub = ArgumentParser(description=compress_.__doc__)
    sub.add_argument("recipe", type=str, help="a YAML recipe; model, data and loss are enough")
    sub.add_argument("--macs", type=float, help="share of the multiply-accumulates to keep, in (0, 1]")
    sub.add_argument("--params", type=float, help="share of the parameters to keep, in (0, 1]")
    sub.add_argument("--size", type=float, help="share of the bytes to keep, in (0, 1]")
    sub.add_argument("--size_bytes", type=PositiveInt, help="bytes to keep")
    sub.add_argument("--latency", type=float, help="share of the dense network's seconds to keep, in (0, 1]")
    sub.add_argument("--latency_s", type=float, help="seconds of one example")
    sub.add_argument("--backend", choices=["eager", "compile", "onnx"], help="time layers there; what no rank makes faster stays dense")
    sub.add_argument("--epochs", type=NonNegativeInt, default=0, help="of fine-tuning (default: none, calibration only)")
    sub.add_argument("--examples", type=PositiveInt, default=1024, help="training examples that calibrate")
    sub.add_argument("--cut", choices=["auto", "plain", "whitened", "sensitive", "mixed"], default="auto", help="how the cut is made")
    sub.add_argument("--squeeze", type=float, default=0.0, help="share of the epochs spent training toward the budget before the cut")
    sub.add_argument("--out", type=str, help="folder (default: runs/NAME-compress)")
    sub.add_argument("--set", type=str, action="append", metavar="KEY=VALUE", help="change a key of the recipe")
    sub.add_argument("--json", action="store_true", help="end with one line of JSON: {dense: ..., final: ...}")
    sub.add_argument("--quiet", action="store_true", help="no progress")
    commands.add_subcommand("compress", sub)

    sub = ArgumentParser(description=measure_.__doc__)
    sub.add_argument("target", type=str, help="a recipe (its dense network) or the folder of a run (its final one)")
    sub.add_argument("--split", choices=["train", "val", "test"], default="val", help="what accuracy and loss are measured on")
    sub.add_argument("--threads", type=PositiveInt, default=1, help="CPU threads of the latency measurement")
    sub.add_argument("--json", action="store_true", help="end with one line of JSON")
    commands.add_subcommand("measure", sub)

    sub = ArgumentParser(description=coverage_.__doc__)
    sub.add_argument("target", type=str, help="a recipe (factorized at full rank) or the folder of a run (after the cut)")
    sub.add_argument("--json", action="store_true", help="end with one line of JSON")
    commands.add_subcommand("coverage", sub)

    sub = ArgumentParser(description=plan_.__doc__)
    sub.add_argument(
        "target", type=str, help="a recipe (its dense network, as it is before training) or the folder of a run (its dense one)"
    )
    sub.add_argument("--budgets", type=str, help="fractions of the MACs kept: 0.5,0.33")
    sub.add_argument("--examples", type=PositiveInt, default=512, help="training examples that calibrate, validation ones that judge")
    sub.add_argument("--weights-only", action="store_true", help="no data: ranks and cuts by the weights alone")
    sub.add_argument("--latency", choices=["eager", "compile", "onnx"], help="time the layers, and predict seconds")
    sub.add_argument("--threads", type=PositiveInt, default=1, help="CPU threads of that timing")
    sub.add_argument("--out", type=str, help="a JSON file; its page is written beside it")
    sub.add_argument("--json", action="store_true", help="end with one line of JSON: the whole plan")
    sub.add_argument("--quiet", action="store_true", help="no progress")
    commands.add_subcommand("plan", sub)

    sub = ArgumentParser(description=report_.__doc__)
    sub.add_argument("target", type=str, help="the folder of a run, or what spectrim plan --out wrote")
    sub.add_argument("--out", type=str, help="the page (default: report.html in the folder, or beside the plan)")
    sub.add_argument("--open", action="store_true", help="show it in the browser")
    sub.add_argument("--text", action="store_true", help="print the essentials instead")
    commands.add_subcommand("report", sub)

    sub = ArgumentParser(description=export_.__doc__)
    sub.add_argument("target", type=str, help="the folder of a run (its final network) or a recipe (its dense one, untrained)")
    sub.add_argument("--format", choices=list(SUFFIXES.values()), help="what to write (default: by the suffix of --out)")
    sub.add_argument("--out", type=str, help=f"the file: {', '.join(SUFFIXES)} (default: model.SUFFIX in the run's folder)")
    sub.add_argument("--batch", type=PositiveInt, default=1, help="examples of the validation split to compare and time with")
    sub.add_argument("--static", action="store_true", help="for that batch only")
    sub.add_argument("--int8", action="store_true", help="8-bit weights and activations, calibrated on training batches; ONNX only")
    sub.add_argument("--max_batch", type=PositiveInt, default=8, help="largest batch that an ExecuTorch file takes")
    sub.add_argument("--tolerance", type=float, help="largest difference allowed, as a fraction of the output's largest magnitude")
    sub.add_argument("--threads", type=PositiveInt, default=1, help="CPU threads of the latency measurement")
    sub.add_argument("--json", action="store_true", help="end with one line of JSON")
    commands.add_subcommand("export", sub)
    return top


BODIES: dict[str, Callable[[Namespace], None]] = {
    "run": run,
    "compress": compress_,
    "measure": measure_,
    "coverage": coverage_,
    "plan": plan_,
    "report": report_,
    "export": export_,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exit codes: 0, 2 for wrong usage (a bad recipe too), 1 for a failure."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    args = parser().parse_args(argv)
    errors = Console(stderr=True)
    try:
        BODIES[args.command](args[args.command])
    except RecipeError as error:
        errors.print(f"spectrim: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("stopped; the same command goes on from the last checkpoint", markup=False)
        sys.exit(1)
    except (ValueError, RuntimeError, OSError, ImportError, torch.OutOfMemoryError) as error:
        errors.print(f"spectrim: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
