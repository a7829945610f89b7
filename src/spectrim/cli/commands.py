"""The body of each command: it checks, calls one function, prints."""

import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import nn
from torch.utils._pytree import tree_map_only

from spectrim.budget.budget import Budget
from spectrim.budget.device import latency_kit
from spectrim.budget.latency_table import latency_table
from spectrim.budget.plan import BUDGETS, plan
from spectrim.budget.table_file import read_table, save_table
from spectrim.cli.compressing import compress_, run
from spectrim.cli.shared import changes, crossbars, fractions, note, show
from spectrim.errors import FormatError, SettingError, UsageError
from spectrim.metrics.inputs import batch_size_of, first_examples, one_example
from spectrim.metrics.measurement import measure
from spectrim.pipeline.components import make_loss
from spectrim.pipeline.folders import MANIFEST, RECIPE, Contents, contents
from spectrim.pipeline.recipe import Recipe, read_recipe
from spectrim.pipeline.stages import make_data, make_model
from spectrim.report import text_report, write_report
from spectrim.runtimes.export import export
from spectrim.runtimes.formats import _format_of
from spectrim.runtimes.int8 import quantize
from spectrim.storage.pack import SUFFIX, pack, packed_sizes, unpack_file
from spectrim.storage.save import load
from spectrim.surgery.coverage import coverage
from spectrim.surgery.factorize import factorize
from spectrim.tables import SUFFIXES

NAMES = {"train": "training", "val": "validation", "test": "test"}
"""The splits in words."""


def measure_(args: Namespace) -> None:
    """Measure the network of a recipe or of a folder, or show what was measured when the folder was finished; or a coded file."""
    if args.target.endswith(SUFFIX):
        packed = packed_sizes(args.target)
        show(args, packed.summary(), packed.to_dict())
        return
    found, held, verdict, tiles = None, _contents(args.target), "", crossbars(args.crossbars)
    if held is not None and args.split is None and args.threads is None and tiles is None and not changes(args):
        found, verdict = held.measured("final"), held.verdict()
    if found is None:
        model, recipe = _network(args, held, "final")
        data = make_data(recipe)
        split = getattr(data, args.split or "val")
        if held is None and recipe.dense.epochs:
            note(f"the recipe trains its dense network first; measured is the untrained one. spectrim run {args.target} measures both")
        example = one_example(data.val, model)
        found = measure(model, example, data=split, loss=make_loss(recipe.loss), threads=args.threads or 1, crossbars=tiles)
        where = f"measured on the {NAMES[args.split or 'val']} split"
    else:
        where = "as measured on the test split when the folder was written; --split measures again, and calls the recipe's code"
    show(args, "\n".join(part for part in (found.summary(), where, verdict) if part), found.to_dict())


def coverage_(args: Namespace) -> None:
    """List every parameterized layer: factorized, or why not."""
    held = _contents(args.target)
    lines = held.coverage if held is not None and not changes(args) else None
    if lines is None:
        model, recipe = _network(args, held, "factorized")
        where = recipe.factorize.layers()
        if held is None:
            model = factorize(model, recipe.factorize.scheme, where)
        lines = coverage(model, where)
    show(args, str(lines), [vars(line) for line in lines])


def plan_(args: Namespace) -> None:
    """Predict the result of each budget, without training: ranks, costs, and the error right after the cut."""
    shares, tiles = fractions("--budgets", args.budgets) if args.budgets else BUDGETS, crossbars(args.crossbars)
    if args.tiles and tiles is None:
        raise UsageError("plan", "tiles of what size?", allowed="--crossbars rows=32,columns=32,bits=4,cell_bits=4")
    if args.out and Path(args.out).suffix == ".html":
        raise UsageError("--out", f"got {args.out!r}, where the page of the plan goes", allowed="a JSON file")
    budgets = [Budget(tiles=share) if args.tiles else share for share in shares]
    held = _contents(args.target)
    model, recipe = _network(args, held, "dense")
    if held is None and recipe.dense.epochs:
        note(f"the recipe trains its dense network first; planned is the untrained one. spectrim run {args.target}, then plan its folder")
    data, where = make_data(recipe), recipe.factorize.layers()
    scheme, inputs, table = recipe.factorize.scheme, one_example(data.val), None
    if args.table and args.latency:
        raise UsageError("--table and --latency", "given together", allowed="one of them: a table has been timed already")
    if args.table:
        table = read_table(args.table)
    elif args.latency:
        model = factorize(model, scheme, where)
        table = latency_table(model, inputs, backend=args.latency, threads=args.threads, progress=not args.quiet)
    calibrating, loss = (None, None) if args.weights_only else (data.train, make_loss(recipe.loss))
    found = plan(
        model, inputs, calibrating, loss, budgets=budgets, scheme=scheme, where=where, latency=table, crossbars=tiles,
        eval_data=None if args.weights_only else data.val, examples=args.examples, progress=not args.quiet,
    )  # fmt: skip
    text = str(found)
    if args.out:
        found.save(args.out)
        text += f"\nwritten to {args.out} and {write_report(args.out)}"
    show(args, text, found.to_dict())


def latency_(args: Namespace) -> None:
    """Time the layers of a network here, write a file that does so on another device, or show a table."""
    if args.target.endswith(".json"):
        if args.out is not None or args.kit is not None:
            raise UsageError("latency", f"{args.target} is a table, which is shown", allowed="--out and --kit with a recipe or a folder")
        table = read_table(args.target)
        show(args, str(table), table.to_dict())
        return
    if not args.seconds > 0:
        raise UsageError("--seconds", f"got {args.seconds:g}", allowed="seconds above 0")
    held = _contents(args.target)
    model, recipe = _network(args, held, "dense")
    low, inputs = factorize(model, recipe.factorize.scheme, recipe.factorize.layers()), _some(make_data(recipe).val, args.batch)
    how: Any = {"threads": args.threads, "time_box": args.seconds, "progress": not args.quiet}
    if args.kit:
        path = latency_kit(low, inputs, args.kit, **how)
        show(args, f"written to {path}; on the device: pip install numpy onnxruntime; python {path.name} table.json", {"kit": str(path)})
        return
    out = args.out or f"{Path(args.target).stem}-latency.json"
    table = latency_table(low, inputs, backend=args.backend, **how)
    save_table(table, out)
    show(args, f"{table}\nwritten to {out}", table.to_dict())


def _some(data: Any, count: int) -> Any:
    """Return the inputs of so many examples, of one batch."""
    (inputs, _), *_ = first_examples(data, 1)
    if count > (size := batch_size_of(inputs)):
        raise UsageError("--batch", f"got {count}", allowed=f"up to {size}, a batch of the validation split")
    return tree_map_only(torch.Tensor, lambda tensor: tensor[:count], inputs)


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
        raise UsageError("export", "the format is missing", allowed=f"--format {', '.join(SUFFIXES.values())}; or --out with a suffix")
    if args.int8 and (args.format not in (None, "onnx") or args.static or args.tolerance is not None):
        raise UsageError("--int8", "writes ONNX for any batch, and has no tolerance", allowed="--format onnx, --out FILE.onnx")
    if args.tolerance is not None and not args.tolerance > 0:
        raise UsageError("--tolerance", f"got {args.tolerance}", allowed="a number above 0")
    held, path = _contents(args.target), _export_path(args)
    model, recipe = _network(args, held, "final")
    data = make_data(recipe)
    if args.int8:
        made: Any = quantize(model, data.train, path)
        show(args, f"{made.summary()}\nwritten to {made.path}", made.to_dict())
        return
    inputs = _some(data.val, args.batch)
    made = export(
        model, inputs, path, args.format, dynamic_batch=not args.static, max_batch=max(args.max_batch, args.batch),
        tolerance=args.tolerance, latency=True, threads=args.threads, progress=not args.quiet,
    )  # fmt: skip
    show(args, made.summary(), made.to_dict())


def pack_(args: Namespace) -> None:
    """Write the final network of a folder as one coded file."""
    folder = Path(args.target)
    run = folder.is_dir() and any((folder / name).exists() for name in (MANIFEST, RECIPE))
    packed = pack(contents(folder).network("final") if run else folder, args.out or folder / "model.spz")
    show(args, f"{packed.summary()}\nwritten to {packed.path}", packed.to_dict())


def unpack_(args: Namespace) -> None:
    """Write the tensors of a coded file as safetensors."""
    path = Path(args.out or Path(args.target).with_suffix(".safetensors"))
    packed = unpack_file(args.target, path)
    text = f"{packed.size_bytes:,} bytes of tensors, {packed.coded_bytes:,} as a file: {packed.compression:.2f} times smaller"
    show(args, f"{text}\nwritten to {path}", packed.to_dict() | {"path": str(path)})


def _export_path(args: Namespace) -> Path:
    """Return the file to write, whose suffix and format agree."""
    target = Path(args.target)
    suffix = "-int8.onnx" if args.int8 else next((suffix for suffix, format in SUFFIXES.items() if format == args.format), "")
    path = Path(args.out or f"{target / 'model' if target.is_dir() else target.stem}{suffix}")
    try:
        _format_of(path, "onnx" if args.int8 else args.format)
    except SettingError as error:
        raise UsageError("--out", str(error)) from error
    return path


def _contents(target: str) -> Contents | None:
    """Return what a folder holds; None for a recipe."""
    return contents(Path(target)) if Path(target).is_dir() else None


def _network(args: Namespace, held: Contents | None, name: str) -> tuple[nn.Module, Recipe]:
    """Return the dense network of a recipe file, or one that a folder holds; both call what the recipe names."""
    if held is None:
        recipe = read_recipe(args.target, changes(args), cut=False)
        return make_model(recipe), recipe
    if args.weights is not None:
        raise UsageError("--weights", f"{held.folder} holds its own", allowed="with a recipe file")
    place, path = held.network(name), held.folder / RECIPE
    note(f"calling the code that {path} names; do so only for folders that you trust")
    try:
        recipe = read_recipe(path, changes(args), cut=False)
    except UsageError as error:
        raise error if str(path) in str(error) else FormatError(path, str(error)) from error
    return load(place, make_model(recipe, filled=False)), recipe


BODIES: dict[str, Callable[[Namespace], None]] = {
    "run": run,
    "compress": compress_,
    "measure": measure_,
    "coverage": coverage_,
    "plan": plan_,
    "latency": latency_,
    "report": report_,
    "export": export_,
    "pack": pack_,
    "unpack": unpack_,
}
