"""The command line: each body parses, calls one function, prints."""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from rich.console import Console
from torch import nn

from spectrim.checkpoint import load
from spectrim.errors import FormatError, RecipeError
from spectrim.factorize import factorize
from spectrim.measure import Measurement, compare_table, measure
from spectrim.recipe import RECIPE, Run, make_data, make_loss, make_model, one_example, read_recipe
from spectrim.surgery import coverage, match

NAMES = {"final": "low-rank", "truncated": "truncated SVD", "continued": "dense, trained on"}


def run(args: Namespace) -> None:
    """Run a recipe, stage after stage; finished stages are skipped."""
    recipe = read_recipe(args.recipe, args.set or [])
    out = Path(args.out or Path("runs") / Path(args.recipe).stem)
    result = Run(recipe, out, progress=not args.quiet).run()
    measured = {NAMES.get(k, k): Measurement.from_dict(result[k]) for k in ("dense", "final", "truncated", "continued") if k in result}
    print(compare_table(measured))
    print(f"written to {out}")
    if args.json:
        print(json.dumps({name: result[name] for name in ("dense", "final")}))


def measure_(args: Namespace) -> None:
    """Measure the network of a recipe, or the final one of a run."""
    model, recipe, _ = _network(args.target, "5-merge")
    data = make_data(recipe)
    split = getattr(data, args.split)
    found = measure(model, one_example(data.val), data=split, loss=make_loss(recipe.loss), threads=args.threads)
    print(found.summary())
    if args.json:
        print(json.dumps(found.to_dict()))


def coverage_(args: Namespace) -> None:
    """List every parameterised layer: factorized, or why not."""
    model, recipe, folder = _network(args.target, "4-finetune")
    where = None if recipe.factorize.where is None else match(*recipe.factorize.where)
    if folder is None:
        model = factorize(model, recipe.factorize.scheme, where)
    lines = coverage(model, where)
    print(lines)
    if args.json:
        print(json.dumps([vars(line) for line in lines]))


def _network(target: str, stage: str) -> tuple[nn.Module, Any, Path | None]:
    """Return the dense network of a recipe file, or the one that a stage of a run's folder left."""
    folder = Path(target)
    if not folder.is_dir():
        recipe = read_recipe(folder)
        return make_model(recipe), recipe, None
    if not (folder / RECIPE).is_file():
        raise FormatError(folder, f"is not the folder of a run: it has no {RECIPE}", hint="pass a recipe, or what spectrim run --out wrote")
    recipe = read_recipe(folder / RECIPE)
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
    return top


BODIES: dict[str, Callable[[Namespace], None]] = {"run": run, "measure": measure_, "coverage": coverage_}


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
