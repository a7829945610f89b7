"""Write ``docs/supported-layers.md`` from the table of layer kinds: ``python docs/supported_layers.py``."""

from pathlib import Path

import torch
from torch import nn

import spectrim as sp
from spectrim.layers import METHODS
from spectrim.surgery.select import refusal

PAGE = Path(__file__).with_name("supported-layers.md")
HEAD = """# Supported layers

This page is written by `python docs/supported_layers.py` from the code; a test compares the two. Every example
was factorized, cut to rank 2 and merged. A merged layer stays an instance of its original class: [how layers are exchanged](exchange.md).

"""
SKIPPED: list[tuple[str, nn.Module]] = [
    ("depthwise", nn.Conv2d(8, 8, 3, groups=8)),
    ("one output", nn.Linear(16, 1)),
    ("max_norm", nn.Embedding(50, 16, max_norm=1.0)),
    ("sparse", nn.Embedding(50, 16, sparse=True)),
    ("", nn.RNN(16, 16)),
    ("", nn.EmbeddingBag(50, 16)),
    ("", nn.Bilinear(8, 8, 8)),
    ("", nn.BatchNorm2d(8)),
    ("parametrized", torch.nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))),
    ("lazy", nn.LazyLinear(8)),
]


def described(module: nn.Module) -> str:
    """Return what `merge` wrote, in short."""
    if isinstance(module, nn.Sequential):
        return " → ".join(f"`{type(part).__name__}`" for part in module)
    return f"`{type(module).__name__}`" + (" (plain inference module)" if type(module).__name__.startswith("Plain") else "")


def rows() -> list[str]:
    """Return the lines of both tables."""
    lines = ["| layer | case | weights | schemes | merges to |", "|---|---|---|---|---|"]
    for row in METHODS:
        for example in row.example:
            layer = example.make()
            schemes = row.method.schemes(layer)
            merged = [described(sp.merge(sp.factorize(layer, scheme, sp.match("*"), rank=2))) for scheme in schemes]
            weights = ", ".join(f"`{name}`" for name in dict.fromkeys(name.split("_l")[0] for name in row.method.weights(layer)))
            name = f"`{type(layer).__name__}`" + (f" of {example.of}" if example.of else "")
            lines.append(f"| {name} | {example.case} | {weights} | {', '.join(schemes)} | {'; '.join(dict.fromkeys(merged))} |")
    lines.append("| `FalconLinear` of transformers | Falcon | `weight` | channel | `Linear` → `Linear` |")
    lines.append("| sub-classes with a forward that reads `weight` | [products](exchange.md) | `weight` | channel | the same class |")
    lines.append("| modules of experts in 3-D parameters | [products](exchange.md) | each stack | channel | the same class |")
    lines += ["", "## Left dense, and why", "", "| layer | case | reason |", "|---|---|---|"]
    lines += [f"| `{type(layer).__name__.removeprefix('Parametrized')}` | {case} | {refusal(layer)} |" for case, layer in SKIPPED]
    return lines


def render() -> str:
    """Return the page."""
    note = "\nSchemes of a convolution: `channel` is the taps, then a 1x1; `input` a 1x1, then the taps; `spatial` the taps of the first\n"
    note += (
        "axis with more than one, then those of the others. Listed are those that differ; stride, padding and dilation follow the taps.\n"
    )
    note += "\nQuaternion layers take the scheme `quaternion`, whatever is asked for: [quaternion SVD](methods/quaternion-svd.md).\n"
    note += "\nThe projections of a recurrent or attention layer are cut one by one; where none pays, the dense fused layer is written.\n"
    return HEAD + "\n".join(rows()) + "\n" + note


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
