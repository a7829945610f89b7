"""The arguments of the command line; nothing here imports torch, so that ``--help`` answers at once."""

import argparse
from importlib.metadata import version
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import NonNegativeInt, PositiveInt

from spectrim.tables import SUFFIXES

SHORT = {
    "run": "run a recipe stage by stage: train, cut, fine-tune, merge, measure",
    "compress": "compress a recipe's dense network to a budget, or to several",
    "measure": "accuracy, parameters, MACs, bytes and latency of a network",
    "coverage": "every layer: factorized, or why not",
    "plan": "predict the result of each budget, without training",
    "latency": "time the layers of a network: here, or on another device by a file that Python runs there",
    "report": "write the HTML page of a folder or of a plan",
    "export": "write a network for another runtime and compare its outputs",
    "pack": "write the final network of a folder as one coded file",
    "unpack": "write the tensors of a coded file as safetensors",
}
"""One line for each command, in ``spectrim --help``."""

HELP = {
    "run": "Run a recipe stage by stage; finished stages are skipped. The recipe's components are imported and called.",
    "compress": "Compress a recipe's dense network to a budget; only its model, data, loss, dense and factorize keys are read.",
    "measure": "Measure the network of a recipe; or show the results in a finished folder, without importing or calling its code; "
    "or the bytes of a coded file. "
    "With --split, --threads, --set or --seed the folder's final network is measured again, which calls the code that its recipe names.",
    "coverage": "List every parameterized layer: factorized, or why not. The code of a finished folder is neither imported nor called.",
    "plan": "Predict the result of each budget, without training: ranks, costs, and the error right after the cut. "
    "Calls the code named by the recipe, or by the recipe in the folder.",
    "latency": "Time the layers of a network, dense and as pairs of several ranks; write a table for compress --table and plan --table. "
    "With --kit a file is written that answers the same questions on another device, which needs Python, numpy and onnxruntime: "
    "python NET.pyz TABLE.json. Given a table, show what is in it. Calls the code named by the recipe, or by the recipe in the folder.",
    "report": "Write the HTML page of a run's folder or of a plan; it needs no server and no network, and nothing is imported or called.",
    "export": "Write the network of a recipe, or the final one of a folder, for another runtime; its outputs are compared before "
    "the file is kept. Calls the code named by the recipe, or by the recipe in the folder.",
    "pack": "Write the final network of a folder as one coded file, and say how many bytes it takes. Nothing is imported or called.",
    "unpack": "Write the tensors of a coded file as safetensors. Nothing is imported or called.",
}

EXAMPLES = {
    "run": """\
  spectrim run recipes/digits.yaml --out runs/digits
  spectrim run recipes/digits.yaml --set prune.budget.macs=0.25 --seed 1 --out runs/quarter""",
    "compress": """\
  spectrim compress net.yaml --macs 0.5                    half of the multiply-accumulates, no training
  spectrim compress net.yaml --macs 0.5 --weights net.pt   of a network that is trained already
  spectrim compress net.yaml --macs 0.7,0.5,0.35           three networks, one table, one page
  spectrim compress net.yaml --max-drop 0.5 --epochs 5     the smallest one at most half a point worse
  spectrim compress net.yaml --latency 0.7 --backend onnx  at most 70 % of the dense network's seconds
  spectrim compress net.yaml --latency 0.7 --table t.json  by the seconds of another device, see spectrim latency
  spectrim compress net.yaml --coded-bytes 0.07            a coded file of at most 7 % of the bytes, no training
  spectrim compress net.yaml --tiles 0.3 --crossbars rows=32,columns=32,bits=4    at most 30 % of the tiles of a crossbar chip""",
    "measure": """\
  spectrim measure runs/net-compress-macs0.5
  spectrim measure runs/net-compress-macs0.5 --split val --threads 4 --json
  spectrim measure net.spz                                 bytes of a coded file""",
    "coverage": """\
  spectrim coverage net.yaml
  spectrim coverage runs/net-compress-macs0.5""",
    "plan": """\
  spectrim plan net.yaml --budgets 0.7,0.5,0.3
  spectrim plan runs/digits --latency eager --out plan.json""",
    "latency": """\
  spectrim latency net.yaml --backend onnx --out table.json   time the layers here
  spectrim latency net.yaml --kit net.pyz                     then, on the device: python net.pyz table.json
  spectrim latency table.json                                 what a table says""",
    "report": """\
  spectrim report runs/net-compress-macs0.5 --open
  spectrim report plan.json --text""",
    "export": """\
  spectrim export runs/net-compress-macs0.5 --format onnx
  spectrim export runs/net-compress-macs0.5 --out net-int8.onnx --int8""",
    "pack": """\
  spectrim pack runs/net-compress-macs0.5 --out net.spz""",
    "unpack": """\
  spectrim unpack net.spz --out net.safetensors""",
}
"""Calls that work, at the end of each command's ``--help``."""


class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help whose examples keep their lines, with defaults where a text does not give them."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        plain = action.default in (None, False, argparse.SUPPRESS) or "default" in text
        return text if plain else f"{text} (default: {action.default})"


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 100)


def _command(commands: Any, name: str) -> ArgumentParser:
    """Add a command with what all of them take."""
    epilog = f"examples:\n{EXAMPLES[name]}" if name in EXAMPLES else None
    sub = ArgumentParser(description=_wrapped(HELP[name]), epilog=epilog, formatter_class=Formatter)
    commands.add_subcommand(name, sub, help=SHORT.get(name, HELP[name].split(";")[0].split(".")[0]))
    sub.add_argument("--quiet", action="store_true", help="no progress")
    sub.add_argument("--verbose", action="store_true", help="the log with times on stderr, and the whole trace of an error")
    return sub


def _json(sub: ArgumentParser, what: str = "") -> None:
    sub.add_argument("--json", action="store_true", help=f"print one line of JSON and nothing else{what}")


def _changes(sub: ArgumentParser, whose: str = "the recipe") -> None:
    sub.add_argument("--set", type=str, action="append", metavar="KEY=VALUE", help=f"change a key of {whose}: train.0.epochs=3")
    sub.add_argument("--seed", type=int, help="the same as --set seed=N")
    sub.add_argument("--weights", type=str, metavar="FILE", help="trained weights, a .safetensors file or a state dict in .pt")
    sub.add_argument(
        "--device", type=str, metavar="cpu|cuda|cuda:N|mps", help="where to train (default: an accelerator where there is one)"
    )


def _crossbars(sub: ArgumentParser) -> None:
    sub.add_argument(
        "--crossbars",
        type=str,
        metavar="rows=128,columns=64,bits=8,cell_bits=4",
        help="count tiles of this size: inputs, outputs, bits of a weight and of a cell (what is left out is as here)",
    )


def parser() -> ArgumentParser:
    """Return the parser of the whole command line."""
    epilog = """\
start with:
  spectrim compress recipes/digits.yaml --macs 0.5   train a small network and compress it
  spectrim COMMAND --help                            every option of a command, with examples

exit codes: 0 done, 1 failure, 2 wrong usage or a bad recipe, 130 stopped by Ctrl-C"""
    top = ArgumentParser(
        prog="spectrim",
        description="Train and ship low-rank neural networks.",
        epilog=epilog,
        formatter_class=Formatter,
        version=version("spectrim"),
    )
    commands = top.add_subcommands(required=True, dest="command")

    sub = _command(commands, "run")
    sub.add_argument("recipe", type=str, help="a YAML recipe")
    sub.add_argument("--out", type=str, help="folder of the run (default: runs/NAME)")
    _changes(sub)
    _json(sub, ": {dense: ..., final: ..., verdict: ...}")

    sub = _command(commands, "compress")
    sub.add_argument("recipe", type=str, help="a YAML recipe; model, data and loss are enough")
    sub.add_argument(
        "--macs", type=str, help="share of the multiply-accumulates to keep, in (0, 1]; several values, such as 0.7,0.5,0.35, make a sweep"
    )
    sub.add_argument("--params", type=str, help="share of the parameters to keep, in (0, 1]; or several")
    sub.add_argument("--size", type=str, help="share of the bytes to keep, in (0, 1]; or several")
    sub.add_argument("--size-bytes", type=PositiveInt, help="bytes to keep")
    sub.add_argument("--latency", type=float, help="share of the dense network's seconds to keep, in (0, 1]")
    sub.add_argument("--latency-s", type=float, help="seconds of one example")
    sub.add_argument("--tiles", type=str, help="share of the crossbar tiles to keep, in (0, 1]; or several; needs --crossbars")
    sub.add_argument("--tile-reads", type=str, help="share of the reads of tiles, and so of the energy, to keep; or several")
    sub.add_argument("--tile-count", type=PositiveInt, help="tiles to keep, both of each pair and all slices")
    _crossbars(sub)
    sub.add_argument(
        "--max-drop", type=float, help="find the smallest network at most so many points of accuracy worse on the validation split"
    )
    sub.add_argument("--max-loss-rise", type=float, help="the same by the loss, as a fraction of the dense network's: 0.05 for 5 percent")
    sub.add_argument(
        "--coded-bytes",
        type=str,
        help="size of the coded file model.spz: a share of the dense network's bytes, in (0, 1), or bytes; alone, nothing is cut; "
        "or several",
    )
    sub.add_argument(
        "--backend", choices=["eager", "compile", "onnx"], help="time layers in this backend; layers that no rank makes faster stay dense"
    )
    sub.add_argument("--table", type=str, help="a latency table, see spectrim latency; in place of --backend")
    sub.add_argument("--epochs", type=NonNegativeInt, default=0, help="of fine-tuning (default: none, calibration only)")
    sub.add_argument(
        "--examples", type=PositiveInt, default=None, help="training examples for calibration (default: 1024, fewer for large networks)"
    )
    sub.add_argument("--calibration-seconds", type=float, default=None, help="time for calibration and cuts; fewer examples and cuts then")
    ways = ["auto", "plain", "whitened", "sensitive", "mixed", "both", "curved"]
    sub.add_argument("--cut", choices=ways, default="auto", help="how the cut is made")
    sub.add_argument("--writing", choices=["pair", "interpolative"], default="pair", help="how cut weights are written")
    sub.add_argument(
        "--reconstruct",
        type=NonNegativeInt,
        default=0,
        help="after the cut, train each block for so many steps toward the dense one's output",
    )
    sub.add_argument("--recovery", type=NonNegativeInt, default=0, help="steps for which each cut is trained before the cuts are compared")
    sub.add_argument(
        "--narrow", type=str, help="share of the budget's unit to which hidden units are left out first; several, such as 1,0.9, are tried"
    )
    sub.add_argument("--squeeze", type=float, default=0.0, help="share of the epochs spent training toward the budget before the cut")
    sub.add_argument("--out", type=str, help="folder (default: runs/NAME-compress-BUDGET)")
    _changes(sub)
    _json(sub, ": {dense: ..., final: ..., verdict: ...}")

    sub = _command(commands, "measure")
    sub.add_argument(
        "target", type=str, help="a recipe (its dense network), the folder of a run (its final one), or a file that pack wrote"
    )
    sub.add_argument("--split", choices=["train", "val", "test"], help="split for accuracy and loss (default for a recipe: val)")
    sub.add_argument("--threads", type=PositiveInt, help="CPU threads of the latency measurement (default: 1)")
    _crossbars(sub)
    _changes(sub)
    _json(sub)

    sub = _command(commands, "coverage")
    sub.add_argument("target", type=str, help="a recipe (factorized at full rank) or the folder of a run (after the cut)")
    _changes(sub)
    _json(sub)

    sub = _command(commands, "plan")
    sub.add_argument(
        "target", type=str, help="a recipe (its dense network, as it is before training) or the folder of a run (its dense one)"
    )
    sub.add_argument("--budgets", type=str, help="fractions of the MACs kept: 0.5,0.33")
    sub.add_argument(
        "--examples", type=PositiveInt, default=512, help="training examples for calibration, and validation examples for the loss"
    )
    sub.add_argument("--weights-only", action="store_true", help="use no data: ranks and cuts by the weights alone")
    sub.add_argument("--latency", choices=["eager", "compile", "onnx"], help="time the layers, and predict seconds")
    sub.add_argument("--table", type=str, help="a latency table, see spectrim latency; in place of --latency")
    sub.add_argument("--threads", type=PositiveInt, default=1, help="CPU threads of that timing")
    sub.add_argument("--tiles", action="store_true", help="the budgets are fractions of the tiles; needs --crossbars")
    _crossbars(sub)
    sub.add_argument("--out", type=str, help="a JSON file; its page is written beside it")
    _changes(sub)
    _json(sub, ": the whole plan")

    sub = _command(commands, "latency")
    sub.add_argument("target", type=str, help="a recipe (its dense network), the folder of a run, or a table that was written before")
    sub.add_argument("--out", type=str, help="the table to write: a JSON file (default: NAME-latency.json)")
    sub.add_argument("--kit", type=str, metavar="NET.pyz", help="write a file for another device instead")
    sub.add_argument("--backend", choices=["eager", "compile", "onnx"], default="onnx", help="what runs the layers here")
    sub.add_argument("--batch", type=PositiveInt, default=1, help="examples of the validation split in one call")
    sub.add_argument("--threads", type=PositiveInt, default=1, help="CPU threads")
    sub.add_argument("--seconds", type=float, default=2.0, help="time for each distinct layer")
    _changes(sub)
    _json(sub, ": the whole table")

    sub = _command(commands, "report")
    sub.add_argument("target", type=str, help="the folder of a run, or what spectrim plan --out wrote")
    sub.add_argument("--out", type=str, help="the page (default: report.html in the folder, or beside the plan)")
    sub.add_argument("--open", action="store_true", help="show it in the browser")
    sub.add_argument("--text", action="store_true", help="print a summary instead")

    sub = _command(commands, "export")
    sub.add_argument("target", type=str, help="the folder of a run (its final network) or a recipe (its dense one, untrained)")
    sub.add_argument("--format", choices=list(SUFFIXES.values()), help="what to write (default: by the suffix of --out)")
    sub.add_argument("--out", type=str, help=f"the file: {', '.join(SUFFIXES)} (default: model.SUFFIX in the run's folder)")
    sub.add_argument("--batch", type=PositiveInt, default=1, help="examples of the validation split to compare and time with")
    sub.add_argument("--static", action="store_true", help="for that batch only")
    sub.add_argument("--int8", action="store_true", help="8-bit weights and activations, calibrated on training batches; ONNX only")
    sub.add_argument("--max-batch", type=PositiveInt, default=8, help="largest batch that an ExecuTorch file takes")
    sub.add_argument("--tolerance", type=float, help="largest difference allowed, as a fraction of the output's largest magnitude")
    sub.add_argument("--threads", type=PositiveInt, default=1, help="CPU threads of the latency measurement")
    _changes(sub)
    _json(sub)

    sub = _command(commands, "pack")
    sub.add_argument("target", type=str, help="the folder of a run (its final network), or one that save() wrote")
    sub.add_argument("--out", type=str, help="the file (default: model.spz in the folder)")
    _json(sub)

    sub = _command(commands, "unpack")
    sub.add_argument("target", type=str, help="a file that pack wrote")
    sub.add_argument("--out", type=str, help="a safetensors file (default: beside the coded one)")
    _json(sub)
    return top
