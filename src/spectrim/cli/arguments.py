"""The arguments of the command line."""

from importlib.metadata import version

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt

from spectrim.runtimes.formats import SUFFIXES

HELP = {
    "run": "Run a recipe stage by stage; finished stages are skipped. The recipe's components are imported and called.",
    "compress": "Compress a recipe's dense network to a budget; only its model, data, loss, dense and factorize keys are read.",
    "measure": "Measure the network of a recipe; or show the results in a finished folder, without importing or calling its code. "
    "With --split or --threads the folder's final network is measured again, which calls the code that its recipe names.",
    "coverage": "List every parameterized layer: factorized, or why not. The code of a finished folder is neither imported nor called.",
    "plan": "Predict the result of each budget, without training: ranks, costs, and the error right after the cut. "
    "Calls the code named by the recipe, or by the recipe in the folder.",
    "report": "Write the HTML page of a run's folder or of a plan; it needs no server and no network, and nothing is imported or called.",
    "export": "Write the network of a recipe, or the final one of a folder, for another runtime; its outputs are compared before "
    "the file is kept. Calls the code named by the recipe, or by the recipe in the folder.",
    "pack": "Write the final network of a folder as one coded file, and say how many bytes it takes. Nothing is imported or called.",
    "unpack": "Write the tensors of a coded file as safetensors. Nothing is imported or called.",
}


def parser() -> ArgumentParser:
    """Return the parser of the whole command line."""
    top = ArgumentParser(prog="spectrim", description="Train and ship low-rank neural networks.", version=version("spectrim"))
    commands = top.add_subcommands(required=True, dest="command")

    sub = ArgumentParser(description=HELP["run"])
    sub.add_argument("recipe", type=str, help="a YAML recipe")
    sub.add_argument("--out", type=str, help="folder of the run (default: runs/NAME)")
    sub.add_argument("--set", type=str, action="append", metavar="KEY=VALUE", help="change a key of the recipe: train.0.epochs=3")
    sub.add_argument("--seed", type=int, help="the same as --set seed=N")
    sub.add_argument("--json", action="store_true", help="print one line of JSON and nothing else: {dense: ..., final: ...}")
    sub.add_argument("--quiet", action="store_true", help="no progress")
    commands.add_subcommand("run", sub)

    sub = ArgumentParser(description=HELP["compress"])
    sub.add_argument("recipe", type=str, help="a YAML recipe; model, data and loss are enough")
    sub.add_argument(
        "--macs", type=str, help="share of the multiply-accumulates to keep, in (0, 1]; several values, such as 0.7,0.5,0.35, make a sweep"
    )
    sub.add_argument("--params", type=str, help="share of the parameters to keep, in (0, 1]; or several")
    sub.add_argument("--size", type=str, help="share of the bytes to keep, in (0, 1]; or several")
    sub.add_argument("--size_bytes", type=PositiveInt, help="bytes to keep")
    sub.add_argument("--latency", type=float, help="share of the dense network's seconds to keep, in (0, 1]")
    sub.add_argument("--latency_s", type=float, help="seconds of one example")
    sub.add_argument(
        "--backend", choices=["eager", "compile", "onnx"], help="time layers in this backend; layers that no rank makes faster stay dense"
    )
    sub.add_argument("--epochs", type=NonNegativeInt, default=0, help="of fine-tuning (default: none, calibration only)")
    sub.add_argument("--examples", type=PositiveInt, default=1024, help="training examples for calibration")
    sub.add_argument("--cut", choices=["auto", "plain", "whitened", "sensitive", "mixed"], default="auto", help="how the cut is made")
    sub.add_argument("--squeeze", type=float, default=0.0, help="share of the epochs spent training toward the budget before the cut")
    sub.add_argument("--out", type=str, help="folder (default: runs/NAME-compress-BUDGET)")
    sub.add_argument("--set", type=str, action="append", metavar="KEY=VALUE", help="change a key of the recipe")
    sub.add_argument("--seed", type=int, help="the same as --set seed=N")
    sub.add_argument("--json", action="store_true", help="print one line of JSON and nothing else: {dense: ..., final: ...}")
    sub.add_argument("--quiet", action="store_true", help="no progress")
    commands.add_subcommand("compress", sub)

    sub = ArgumentParser(description=HELP["measure"])
    sub.add_argument("target", type=str, help="a recipe (its dense network) or the folder of a run (its final one)")
    sub.add_argument("--split", choices=["train", "val", "test"], help="split for accuracy and loss (default for a recipe: val)")
    sub.add_argument("--threads", type=PositiveInt, help="CPU threads of the latency measurement (default: 1)")
    sub.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")
    commands.add_subcommand("measure", sub)

    sub = ArgumentParser(description=HELP["coverage"])
    sub.add_argument("target", type=str, help="a recipe (factorized at full rank) or the folder of a run (after the cut)")
    sub.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")
    commands.add_subcommand("coverage", sub)

    sub = ArgumentParser(description=HELP["plan"])
    sub.add_argument(
        "target", type=str, help="a recipe (its dense network, as it is before training) or the folder of a run (its dense one)"
    )
    sub.add_argument("--budgets", type=str, help="fractions of the MACs kept: 0.5,0.33")
    sub.add_argument(
        "--examples", type=PositiveInt, default=512, help="training examples for calibration, and validation examples for the loss"
    )
    sub.add_argument("--weights-only", action="store_true", help="use no data: ranks and cuts by the weights alone")
    sub.add_argument("--latency", choices=["eager", "compile", "onnx"], help="time the layers, and predict seconds")
    sub.add_argument("--threads", type=PositiveInt, default=1, help="CPU threads of that timing")
    sub.add_argument("--out", type=str, help="a JSON file; its page is written beside it")
    sub.add_argument("--json", action="store_true", help="print one line of JSON and nothing else: the whole plan")
    sub.add_argument("--quiet", action="store_true", help="no progress")
    commands.add_subcommand("plan", sub)

    sub = ArgumentParser(description=HELP["report"])
    sub.add_argument("target", type=str, help="the folder of a run, or what spectrim plan --out wrote")
    sub.add_argument("--out", type=str, help="the page (default: report.html in the folder, or beside the plan)")
    sub.add_argument("--open", action="store_true", help="show it in the browser")
    sub.add_argument("--text", action="store_true", help="print a summary instead")
    commands.add_subcommand("report", sub)

    sub = ArgumentParser(description=HELP["export"])
    sub.add_argument("target", type=str, help="the folder of a run (its final network) or a recipe (its dense one, untrained)")
    sub.add_argument("--format", choices=list(SUFFIXES.values()), help="what to write (default: by the suffix of --out)")
    sub.add_argument("--out", type=str, help=f"the file: {', '.join(SUFFIXES)} (default: model.SUFFIX in the run's folder)")
    sub.add_argument("--batch", type=PositiveInt, default=1, help="examples of the validation split to compare and time with")
    sub.add_argument("--static", action="store_true", help="for that batch only")
    sub.add_argument("--int8", action="store_true", help="8-bit weights and activations, calibrated on training batches; ONNX only")
    sub.add_argument("--max_batch", type=PositiveInt, default=8, help="largest batch that an ExecuTorch file takes")
    sub.add_argument("--tolerance", type=float, help="largest difference allowed, as a fraction of the output's largest magnitude")
    sub.add_argument("--threads", type=PositiveInt, default=1, help="CPU threads of the latency measurement")
    sub.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")
    commands.add_subcommand("export", sub)

    sub = ArgumentParser(description=HELP["pack"])
    sub.add_argument("target", type=str, help="the folder of a run (its final network), or one that save() wrote")
    sub.add_argument("--out", type=str, help="the file (default: model.spz in the folder)")
    sub.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")
    commands.add_subcommand("pack", sub)

    sub = ArgumentParser(description=HELP["unpack"])
    sub.add_argument("target", type=str, help="a file that pack wrote")
    sub.add_argument("--out", type=str, help="a safetensors file (default: beside the coded one)")
    sub.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")
    commands.add_subcommand("unpack", sub)
    return top
